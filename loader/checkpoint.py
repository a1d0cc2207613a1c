"""A checkpoint on disk: which files belong to it, what their headers say, and whether it all fits together.

Nothing here reads a weight but the small tensors that only their values can vouch for; a faulty
checkpoint is refused before a model is built or a device touched.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ropewalk.errors import CheckpointError, HeaderError, MissingFileError, QuantizeConfigError, TensorEntryError
from ropewalk.gptq.format import check_shapes, check_values, infer_features, is_sequential, is_symmetric
from ropewalk.loader.quantize_config import QuantizeConfig, parse_quantize_config, read_json, read_quantize_config
from ropewalk.loader.safetensors_file import TensorEntry, read_header

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


@dataclass
class Checkpoint:
    """A folder with a model in it.

    Attributes:
        folder: where it is.
        config: config.json as read.
        files: the .safetensors files that hold the weights.
        tensors: name -> entry of a header, over all files.
        quantize_config: how the layers are packed; None for a checkpoint that is not quantized.
        warnings: what was odd but could be dealt with, a sentence each.
    """

    folder: Path
    config: dict[str, Any]
    files: list[Path]
    tensors: dict[str, TensorEntry]
    quantize_config: QuantizeConfig | None = None
    warnings: list[str] = field(default_factory=list)

    def packed_layers(self) -> list[str]:
        """Return the names of the layers that have a qweight, in the order of the files."""
        return [name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")]

    def layer_entries(self, layer: str) -> dict[str, TensorEntry]:
        """Return part ("qweight", …) -> entry for a packed layer."""
        names = ((part, f"{layer}.{part}") for part in PARTS)
        return {part: self.tensors[name] for part, name in names if name in self.tensors}

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU."""
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def nbytes(self) -> int:
        """Return how many bytes the tensors take on disk."""
        return sum(entry.nbytes for entry in self.tensors.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find and check the checkpoint in a folder.

    Raises:
        MissingFileError: no folder, no config.json, or no weights in a format that is read here.
        CheckpointError: one of its kinds, for a file at fault; FormatError for packed tensors at fault.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise MissingFileError(folder, "a folder with a model (config.json and .safetensors)", "nothing of this name")
    if not folder.is_dir():
        raise MissingFileError(folder, "a folder with a model (config.json and .safetensors)", "a file")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise MissingFileError(folder, "a model's config.json", _listing(folder))
    config = read_json(config_file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(config_file, "a JSON object with a model_type", repr(config)[:80])

    settings = read_quantize_config(folder, config)
    files = _weight_files(folder, settings)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file)[0].items():
            if name in tensors:
                raise TensorEntryError(
                    f"{file}: {name}", "every tensor once", f"it in {tensors[name].file.name} as well"
                )
            tensors[name] = entry
    checkpoint = Checkpoint(folder, config, files, tensors, settings)
    layers = checkpoint.packed_layers()
    if layers and settings is None:
        checkpoint.quantize_config = _infer(checkpoint, layers)
        checkpoint.warnings.append(f"no quantize_config.json: {checkpoint.quantize_config.source}")
    if not layers and settings is not None:
        raise QuantizeConfigError(settings.source, "packed layers (.qweight) in the weights", "none")
    if layers:
        _check_packed(checkpoint, layers)
    return checkpoint


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "an empty folder"


def _weight_files(folder: Path, settings: QuantizeConfig | None) -> list[Path]:
    """Return the files that hold the weights, by the first rule that finds some."""
    base_name = settings.raw.get("model_file_base_name") if settings else None
    if isinstance(base_name, str) and (folder / f"{Path(base_name).name}.safetensors").is_file():
        return [folder / f"{Path(base_name).name}.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _shards(folder, index)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    named = [p for p in found if re.fullmatch(r"gptq_model-\d+bit-+\d+g", p.stem)]
    if len(named or found) == 1:
        return named or found
    if found:
        raise CheckpointError(folder, "one .safetensors file or an index of several", ", ".join(p.name for p in found))
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    raise MissingFileError(folder, "weights in .safetensors files", ", ".join(others) or _listing(folder))


def _shards(folder: Path, index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(index, "a weight_map from tensor names to files", repr(weight_map)[:80])
    if not isinstance(content.get("metadata"), dict):  # transformers, which reads the shards, insists
        raise HeaderError(index, "metadata, an object", repr(content.get("metadata"))[:80])
    names = dict.fromkeys(weight_map.values())
    for name in names:
        if not isinstance(name, str) or len(PurePosixPath(name).parts) != 1 or "\\" in name or name.startswith("."):
            raise HeaderError(index, "names of files in the same folder", repr(name))
        if not (folder / name).is_file():
            raise MissingFileError(index, f"the shard {name} beside it", "no such file")
    return [folder / name for name in names]


def _infer(checkpoint: Checkpoint, layers: list[str]) -> QuantizeConfig:
    """Draw the settings from the tensors of the first layer, where they leave no choice."""
    entries = checkpoint.layer_entries(layers[0])
    file = entries["qweight"].file

    def unclear(what: str, found: str) -> QuantizeConfigError:
        return QuantizeConfigError(checkpoint.folder, f"a quantize_config.json, for {what}", found)

    if "scales" not in entries or "qzeros" not in entries:
        raise unclear("the bits", f"none, and no scales or qzeros of {layers[0]} to infer them from")
    columns, words = entries["scales"].shape[-1], entries["qzeros"].shape[-1]
    bits = next((b for b in (2, 3, 4, 8) if columns * b == words * 32), None)
    if bits is None:
        raise unclear("the bits", f"none, and {words} words of zero points for {columns} columns in {file.name}")
    rows, _ = infer_features(entries["qweight"].shape, bits)
    groups = entries["scales"].shape[0]
    if groups > 1 and rows % groups:
        raise unclear("the group size", f"none, and {groups} groups of {rows} rows")
    group_size = -1 if groups == 1 else rows // groups
    desc_act = "g_idx" in entries and not is_sequential(checkpoint.read(f"{layers[0]}.g_idx"), group_size)
    qzeros = checkpoint.read(f"{layers[0]}.qzeros")
    symmetric = {f: is_symmetric(qzeros, bits, f) for f in ("gptq", "gptq_v2")}
    raw = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": any(symmetric.values()),
        "checkpoint_format": "gptq_v2" if symmetric["gptq_v2"] else "gptq",
        "quant_method": "gptq",
    }
    settings = parse_quantize_config(raw, file)
    text = f"bits {bits}, group_size {group_size}, desc_act {str(desc_act).lower()} inferred from {layers[0]}"
    return replace(settings, source=text)


def _check_packed(checkpoint: Checkpoint, layers: list[str]) -> None:
    """Check every packed layer against the settings; correct the settings where the tensors prove them wrong."""
    _check_format_version(checkpoint, layers[0])
    settings = checkpoint.quantize_config
    assert settings is not None
    out_of_order = []
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in checkpoint.files}
        for layer in layers:
            entries = checkpoint.layer_entries(layer)
            place = {"prefix": f"{layer}.", "file": str(entries["qweight"].file)}
            check_shapes(
                {part: (entry.shape, entry.dtype) for part, entry in entries.items()},
                bits=settings.bits,
                group_size=settings.group_size,
                desc_act=settings.desc_act and settings.group_size != -1,
                **place,
            )
            small = {part: entries[part] for part in ("scales", "g_idx") if part in entries}
            values: dict[str, Tensor] = {p: opened[e.file].get_tensor(e.name) for p, e in small.items()}
            check_values(values, **place)
            if not settings.desc_act and "g_idx" in values and not is_sequential(values["g_idx"], settings.group_size):
                out_of_order.append(layer)
    if out_of_order:
        checkpoint.warnings.append(
            f"desc_act is false, but {out_of_order[0]}.g_idx is not sequential ({len(out_of_order)} such layers); "
            "the tensors are followed"
        )


def _check_format_version(checkpoint: Checkpoint, layer: str) -> None:
    """Where all zero points are symmetric, the words themselves tell v1 from v2; believe them."""
    settings = checkpoint.quantize_config
    name = f"{layer}.qzeros"
    if settings is None or name not in checkpoint.tensors or checkpoint.tensors[name].dtype_name != "I32":
        return
    qzeros = checkpoint.read(name)
    stated = settings.checkpoint_format
    other = "gptq" if stated == "gptq_v2" else "gptq_v2"
    if qzeros.ndim != 2 or is_symmetric(qzeros, settings.bits, stated):
        return
    if is_symmetric(qzeros, settings.bits, other):
        checkpoint.quantize_config = replace(settings, checkpoint_format=other)
        checkpoint.warnings.append(f"checkpoint_format is {stated}, but the zero points are {other}'s; {other} is used")
