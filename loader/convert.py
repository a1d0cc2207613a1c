"""Write any checkpoint that is read here as a folder of safetensors: packed layers in the checkpoint layout of
`ropewalk.gptq.format`, whatever they were, all other tensors and all names as they are.

Codes, scales, group numbers and dtypes are those of the source, bit for bit. Zero points may change their version:
from v1 to v2 that is exact, and so is the way back unless a zero point is 0, which v1 stores as -1. Programs differ in
what they make of that (whole words are added to, or single codes, with or without a carry), so it is not written.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from ropewalk.errors import CheckpointError, FormatError, RopewalkError, UsageError
from ropewalk.gptq.format import FORMATS, expected_tensors, is_sequential, unpack, zeros_v1_to_v2, zeros_v2_to_v1
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.packed_layer import PARTS, PackedLayer
from ropewalk.loader.quantize_config import CONFIG_KEY, FILES, with_values
from ropewalk.loader.reader import Reader
from ropewalk.loader.repository_files import NEVER, SIDE_FILES, WEIGHTS
from ropewalk.loader.source import find_source
from ropewalk.loader.tensor_file import Spec
from ropewalk.loader.write import SHARD_BYTES, check_out, publish, work_folder, write_json, write_streaming

Progress = Callable[[int, int], None]

# Files that are written anew, or belong to something else.
_NOT_COPIED = ("config.json", *FILES, "adapter_config.json", "*.index.json")
_ALONG = (*SIDE_FILES, "LICENSE*", "NOTICE*")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def convert(
    model: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    shard_size: int | str = SHARD_BYTES,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint anew as safetensors; memory holds one layer at a time.

    Args:
        model: as `ropewalk.load` takes it; packed or in float.
        out: folder to write, new or empty.
        format: how zero points are stored: "gptq" (v1) or "gptq_v2"; by default as the source has them.
        bits, group_size: of checkpoints that do not say how they are packed.
        shard_size: bytes of a file at most, or text such as "5GB".
        revision, token, cache_dir, local_files_only: for the Hub, as `ropewalk.load` takes them.
        progress: called with (bytes done, bytes in all).

    Returns:
        {"out", "files", "bytes", "layers", "from", "quantize_config", "warnings"}: names of the files with tensors,
        their size, how many layers are packed, how they lay on disk ("gptq", "marlin", …; "float" where none is), the
        quantization config written or None, and what was odd in the source.

    Raises:
        CheckpointError, FormatError: the source, or `out`, is not as it should be; a zero point that `format` does
            not hold.
        UsageError: an argument that is not understood.
    """
    if format not in (None, *FORMATS):
        raise UsageError(f"format: expected {' or '.join(FORMATS)}, found {format!r}")
    shard_bytes = parse_size(shard_size)
    folder = check_out(out)
    source = find_source(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    checkpoint = open_checkpoint(source.folder, file=source.file, bits=bits, group_size=group_size)
    if format is not None and checkpoint.quantize_config is None:
        raise UsageError(f"format: expected it with packed weights, found float ones in {checkpoint.folder}")
    format = format or (checkpoint.quantize_config.checkpoint_format if checkpoint.quantize_config else None)
    _check_zeros(checkpoint, format)
    config = config_of(checkpoint, format)
    with work_folder(folder) as work:
        check_space(work.folder, folder, written_bytes(checkpoint))
        finished = work.folder / "finished"
        finished.mkdir()
        files = rewrite(checkpoint, finished, format, shard_bytes, progress)
        write_companions(checkpoint, checkpoint.config, config, finished)
        check_written(checkpoint, finished, format)
        publish(finished, folder)
    return {
        "out": str(folder),
        "files": [path.name for path in files],
        "bytes": written_bytes(checkpoint),
        "layers": len(checkpoint.layers),
        "from": encodings_of(checkpoint),
        "quantize_config": config,
        "warnings": list(checkpoint.warnings),
    }


def rewrite(
    checkpoint: Checkpoint, folder: Path, format: str | None, shard_bytes: int, progress: Progress | None
) -> list[Path]:
    """Write all tensors of a checkpoint into a folder as safetensors, packed layers in the checkpoint layout.

    Args:
        format: the version of zero points; None for a checkpoint in float.
        shard_bytes, progress: as `convert` takes them.

    Returns:
        The files written.
    """
    specs = _specs(checkpoint)
    return write_streaming(specs, _counted(_tensors(checkpoint, format), specs, progress), folder, shard_bytes)


def written_bytes(checkpoint: Checkpoint) -> int:
    """Return how many bytes the tensors take that `rewrite` writes."""
    return sum(spec.nbytes for spec in _specs(checkpoint))


def is_as_rewritten(checkpoint: Checkpoint) -> bool:
    """Tell whether the tensors of a checkpoint are those that `rewrite` would write, by name, dtype and shape."""
    found = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    return found == {spec.name: (spec.dtype, spec.shape) for spec in _specs(checkpoint)}


def encodings_of(checkpoint: Checkpoint) -> str:
    """Return how the layers lie on disk, in a word: "gptq", "marlin", …; "float" where none is packed."""
    return "+".join(sorted({layer.encoding for layer in checkpoint.layers.values()})) or "float"


def parse_size(size: int | str) -> int:
    """Return a number of bytes from text such as "5GB", "500MB" or "2GiB".

    Raises:
        UsageError: not a size above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    value = 0
    if found and not isinstance(size, bool):
        unit = _UNITS[found[2].upper()]
        value = int(float(found[1]) * (1 << (10 * round(len(str(unit)) / 3)) if found[3] else unit))
    if value < 1:
        raise UsageError(f"shard_size: expected a size such as 5GB, found {size!r}")
    return value


def check_space(place: Path, out: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(place).free
    if needed > free > 0:  # some network file systems say 0, whatever they have
        raise CheckpointError(out, f"{needed / 1e9:.2f} GB free on its disk", f"{free / 1e9:.2f} GB")


def _check_zeros(checkpoint: Checkpoint, format: str | None) -> None:
    """Refuse v1 for zero points that it does not hold, before anything is written."""
    if format != "gptq":
        return
    with checkpoint.reader() as reader:
        for layer in checkpoint.layers.values():
            if layer.settings.checkpoint_format == "gptq_v2":
                zeros = unpack(reader.read_zeros(layer), layer.settings.bits, dim=1)
                if zeros.numel() and int(zeros.min()) == 0:
                    file = next(iter(layer.entries.values())).file
                    expected = "zero points from 1 on, which is what format gptq (v1) holds; gptq_v2 holds these"
                    raise FormatError(f"{layer.name}.qzeros", expected, "one of 0", str(file))


def _specs(checkpoint: Checkpoint) -> list[Spec]:
    """Return what is written, in the order in which the files have it."""
    specs: list[Spec] = []
    for item in _in_order(checkpoint):
        if isinstance(item, str):
            entry = checkpoint.tensors[item]
            specs.append(Spec(item, entry.dtype, entry.shape))
            continue
        settings = item.settings
        expected = expected_tensors(
            item.in_features, item.out_features, settings.bits, settings.group_size, item.has_bias
        )
        if not item.has_g_idx:
            del expected["g_idx"]
        for part in (part for part in PARTS if part in expected):
            shape, dtype = expected[part]
            if dtype.is_floating_point:
                dtype = item.entries["s" if part == "scales" and item.encoding == "marlin" else part].dtype
            specs.append(Spec(f"{item.name}.{part}", dtype, shape))
    return specs


def _in_order(checkpoint: Checkpoint) -> list[str | PackedLayer]:
    """Return names of plain tensors and packed layers, as they come in the files."""
    of_tensor = {entry.name: layer for layer in checkpoint.layers.values() for entry in layer.entries.values()}
    items: dict[str, str | PackedLayer] = {}
    for name in checkpoint.tensors:
        layer = of_tensor.get(name)
        items.setdefault(name if layer is None else f"{layer.name}.", name if layer is None else layer)
    return list(items.values())


def _tensors(checkpoint: Checkpoint, format: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the order of `_specs`."""
    with checkpoint.reader() as reader:
        for item in _in_order(checkpoint):
            if isinstance(item, str):
                yield from reader.read_together([(item, checkpoint.tensors[item])]).items()
                continue
            parts = _read(reader, item, format)
            yield from ((f"{item.name}.{part}", parts[part]) for part in PARTS if part in parts)


def _read(reader: Reader, layer: PackedLayer, format: str | None) -> dict[str, Tensor]:
    """Return the parts of a layer with zero points of a version."""
    parts = dict(reader.read_layer(layer))
    if layer.settings.checkpoint_format != format:
        to_version = zeros_v2_to_v1 if format == "gptq" else zeros_v1_to_v2
        parts["qzeros"] = to_version(parts["qzeros"], layer.settings.bits)
    return parts


def _counted(
    tensors: Iterator[tuple[str, Tensor]], specs: list[Spec], progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    done, total = 0, sum(spec.nbytes for spec in specs)
    for name, tensor in tensors:
        done += tensor.nbytes
        if progress is not None:  # before it is written: nobody comes back after the last one
            progress(done, total)
        yield name, tensor


def config_of(checkpoint: Checkpoint, format: str | None) -> dict[str, Any] | None:
    """Return the quantization config of what is written: the source's, in the words of the checkpoint layout; None for
    a checkpoint in float.
    """
    settings = checkpoint.quantize_config
    if settings is None:
        return None
    layers = checkpoint.layers.values()
    changes: dict[str, Any] = {"checkpoint_format": format, "desc_act": settings.desc_act}
    if not settings.desc_act and all(layer.has_g_idx for layer in layers) and _has_hidden_order(checkpoint):
        changes["desc_act"] = True  # some programs read g_idx only where this is said
    raw = {k: v for k, v in with_values(settings, **changes).raw.items() if k != "model_file_base_name"}
    if settings.sym is not None:
        raw.setdefault("sym", settings.sym)
    if isinstance(raw.get("dynamic"), dict):
        raw["dynamic"] = {pattern: _without_format(changed) for pattern, changed in raw["dynamic"].items()}
    return {**raw, "checkpoint_format": format, "quant_method": "gptq"}


def _has_hidden_order(checkpoint: Checkpoint) -> bool:
    """Tell whether layers have an act-order that no setting tells of."""
    with checkpoint.reader() as reader:
        return any(
            not is_sequential(reader.read(layer.entries["g_idx"].name), layer.settings.group_size)
            for layer in checkpoint.layers.values()
            if layer.has_g_idx and not layer.settings.desc_act
        )


def _without_format(overrides: Any) -> Any:
    """Return what `dynamic` changes without the format, which is the same for all layers."""
    if not isinstance(overrides, dict):
        return overrides
    return {name: value for name, value in overrides.items() if name not in ("format", "checkpoint_format")}


def write_companions(
    checkpoint: Checkpoint, model_config: Mapping[str, Any], config: dict[str, Any] | None, folder: Path
) -> None:
    """Write the configs, and copy what belongs to a model besides: tokenizer, generation config, licence.

    Args:
        model_config: config.json, whose quantization config is replaced.
        config: the quantization config, or None.
        folder: where to.
    """
    model_config = {name: value for name, value in model_config.items() if config or name != CONFIG_KEY}
    if config is not None:
        model_config[CONFIG_KEY] = config
        write_json(folder / "quantize_config.json", {**config, "model_file_base_name": "model"})
    write_json(folder / "config.json", model_config)
    for path in sorted(checkpoint.folder.iterdir()):
        name = path.name
        wanted = _matches(name, _ALONG) and not _matches(name, _NOT_COPIED)
        if wanted and path.is_file() and not name.endswith((*NEVER, *WEIGHTS)):
            shutil.copyfile(path, folder / name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_written(checkpoint: Checkpoint, folder: Path, format: str | None) -> None:
    """Open what was written, and compare it with what was meant.

    Raises:
        RopewalkError: it differs.
    """
    written = open_checkpoint(folder)
    expected: dict[str, object] = {spec.name: (spec.dtype, spec.shape) for spec in _specs(checkpoint)}
    found: dict[str, object] = {name: (entry.dtype, entry.shape) for name, entry in written.tensors.items()}
    for name, layer in checkpoint.layers.items():
        expected[name] = _kind(layer, format)
    for name, layer in written.layers.items():
        found[name] = _kind(layer, layer.settings.checkpoint_format)
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise RopewalkError(
                f"convert: expected {name} to be written as {expected.get(name)}, found {found.get(name)}; "
                "nothing was kept"
            )


def _kind(layer: PackedLayer, format: str | None) -> tuple[object, ...]:
    settings = layer.settings
    return settings.bits, settings.group_size, format, layer.in_features, layer.out_features, layer.has_g_idx
