"""`cache_packed`: the execution layout of the CPU, kept on disk beside the checkpoint, and mapped the next time.

A .safetensors file, `.ropewalk/NAME.safetensors` in the checkpoint's folder or, where that cannot be written, in the
user's cache, has for each packed layer what `QuantLinear` has once it is filled: `words`, `scales`, `zeros` and `rows`
as in `ropewalk.gptq.cpu_layout`, and `qzeros`, `g_idx` and `bias` as the checkpoint has them, so that saving gives the
checkpoint back. Tensors begin at multiples of 64 bytes. Everything else still comes from the checkpoint.

The file is used if its header is sound, this version of ropewalk wrote it on a machine of this byte order from the
files that are there (by names, sizes, times and headers), and every tensor has its checksum; else it is written anew.
It is mapped, so that processes share its pages, and each has those for itself that it writes to. Nobody ever changes
such a file: a new one takes its name. Layers on a GPU, and such as no kernel of the CPU takes, are not in it. Experts
are, one by one; as they compute from a stack of them all (`ropewalk.loader.experts`), theirs are copied, not shared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ropewalk
from ropewalk import cpu
from ropewalk.cpu.build import caches
from ropewalk.errors import CheckpointError
from ropewalk.gptq import cpu_layout, cpu_ops
from ropewalk.gptq.format import expected_tensors
from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.checksum import checksum
from ropewalk.loader.fuse import FUSIONS, groups_of
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.safetensors_file import TensorEntry, read_header
from ropewalk.loader.skeleton import Skeleton
from ropewalk.loader.tensor_file import PADDING, Spec, TensorFile
from ropewalk.loader.write import publish, work_folder

log = logging.getLogger("ropewalk")

FOLDER = ".ropewalk"
LINE = 64  # bytes
_KEY = "ropewalk"  # of the header's metadata

Parts = dict[str, Tensor]


@contextlib.contextmanager
def cached_layers(
    wanted: bool, skeleton: Skeleton, checkpoint: Checkpoint, device_of: Callable[[str], torch.device]
) -> Iterator[Mapping[str, Parts]]:
    """Yield the packed layers that are in the cache, name -> parts for `adopt`. Where it has none, write it at the
    end, when all layers are filled.

    Args:
        wanted: False to yield none and write nothing.
        device_of: name of a module -> where it goes.
    """
    if not wanted or not _can_be_cached(skeleton, device_of):
        yield {}
        return
    about = _about(checkpoint)
    for path in places(checkpoint):
        found = _open(path, about, skeleton)
        if found is not None:
            log.info("cache_packed: %d packed layers come from %s", len(found), path)
            yield found
            return
    yield {}
    with contextlib.suppress(OSError):  # files that have gone meanwhile
        if _about(checkpoint) == about:
            _write(skeleton, checkpoint, about)
            return
    log.warning("cache_packed: nothing is kept, since the files of %s have changed meanwhile", checkpoint.folder)


def adopt(module: QuantLinear, parts: Parts) -> None:
    """Let a layer compute with tensors of the cache.

    Args:
        parts: as `cached_layers` yields them.
    """
    module._forget()
    module.qweight, module.scales, module.qzeros = parts["words"], parts["scales"], parts["qzeros"]
    module.g_idx, module.bias = parts.get("g_idx"), parts.get("bias")
    module._zeros, module._order = parts.get("zeros"), parts.get("rows")
    module._scales_dtype = parts["scales_dtype"].dtype
    module._default_mode = cpu_ops.default_mode()
    module._layout, module._ready = "cpu", True


def places(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield where the cache of a checkpoint may be, best first."""
    name = f"{checkpoint.files[0].stem}.safetensors"
    yield checkpoint.folder / FOLDER / name
    folder = hashlib.sha256(str(checkpoint.folder.resolve()).encode()).hexdigest()[:16]
    for cache in caches():
        yield cache / "packed" / folder / name


def _can_be_cached(skeleton: Skeleton, device_of: Callable[[str], torch.device]) -> bool:
    names = {module: name for name, module in skeleton.model.named_modules()}
    devices = {device_of(names[module]).type for module in skeleton.packed.values()}
    if devices - {"cpu"}:
        log.info("cache_packed: nothing is kept, since packed layers are on a GPU")
    elif not cpu.load():
        log.info("cache_packed: nothing is kept, since there are no kernels for the CPU (ropewalk doctor)")
    else:
        return True
    return False


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return all that the layers of a cache depend on."""
    tensors = [
        (name, entry.file.name, entry.dtype_name, entry.shape, entry.offset, entry.nbytes)
        for name, entry in checkpoint.tensors.items()
    ]
    layers = [
        (layer.name, layer.encoding, layer.settings.bits, layer.settings.group_size, layer.settings.checkpoint_format)
        for layer in checkpoint.layers.values()
    ]
    stats = [(path.name, path.stat()) for path in checkpoint.files]
    return {
        "layout": cpu_layout.LAYOUT,
        "byte order": sys.byteorder,
        "version of ropewalk": ropewalk.__version__,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "headers": hashlib.sha256(repr((tensors, layers)).encode()).hexdigest(),
    }


def _open(path: Path, about: Mapping[str, Any], skeleton: Skeleton) -> dict[str, Parts] | None:
    """Return name -> parts of the layers in a file, or None with a line in the log if it cannot be used."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            entries, metadata = read_header(path)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return _open(path, about, skeleton)  # another process has just put a new one there
            found = json.loads(metadata.get(_KEY, "{}"))
            differs = [name for name in about if found.get("about", {}).get(name) != about[name]]
            if differs:
                raise CheckpointError(path, f"a cache of the same {differs[0]}", "another")
            return _map(file.fileno(), path, entries, found, skeleton)
    except (CheckpointError, OSError) as error:
        log.info("cache_packed: written anew: %s", error)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.info("cache_packed: written anew: %s: expected what ropewalk writes, found %r", path, error)
    return None


def _map(
    file: int, path: Path, entries: Mapping[str, TensorEntry], found: Mapping[str, Any], skeleton: Skeleton
) -> dict[str, Parts]:
    """Map a file and check all that is in it."""
    # Writing to a tensor, as loading a state dict does, gives this process a page of its own.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(mmap.mmap(file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8)
    tensors = {
        name: memory[entry.offset : entry.offset + entry.nbytes].view(entry.dtype).view(entry.shape)
        for name, entry in entries.items()
        if not name.startswith(PADDING)
    }
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        sums = dict(zip(tensors, pool.map(checksum, tensors.values()), strict=True))
    wrong = [name for name in sums if sums[name] != found["checksums"][name]]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]}", "its checksum", "another")
    layers: dict[str, Parts] = {}
    for name, dtype in found["layers"].items():
        module = skeleton.packed[name]
        parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        _check(path, name, module, parts)
        layers[name] = {**parts, "scales_dtype": torch.empty(0, dtype=_DTYPES[dtype])}
    return layers


_PARTS = ("words", "scales", "zeros", "rows", "qzeros", "g_idx", "bias")
_FLOATS = (torch.float16, torch.float32)
_ALLOWED: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(_PARTS, (torch.int32,))
_ALLOWED |= {"scales": _FLOATS, "zeros": (torch.uint8,), "bias": (*_FLOATS, torch.bfloat16, torch.float64)}
_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def _check(path: Path, name: str, module: QuantLinear, parts: Mapping[str, Tensor]) -> None:
    """See that the tensors of a layer are such as its kernel takes, and lead it nowhere outside of them.

    Raises:
        CheckpointError: they are not.
    """
    blocks = cpu_layout.block_count(module.infeatures, module.group_size)
    tiles = -(-module.outfeatures // cpu_layout.COLUMNS)
    usual = expected_tensors(module.infeatures, module.outfeatures, module.bits, module.group_size)
    groups, rows = usual["scales"][0][0], module.infeatures
    expected = {
        "words": (tiles, blocks, cpu_layout.BLOCK * module.bits),
        "scales": (tiles, groups, cpu_layout.COLUMNS),
        "zeros": (tiles, groups, cpu_layout.COLUMNS),
        "rows": (blocks * cpu_layout.BLOCK,),
        "qzeros": usual["qzeros"][0],
        "g_idx": (rows,),
        "bias": (module.outfeatures,),
    }
    needed = {"words", "scales", "qzeros"} | {n for n in ("g_idx", "bias") if getattr(module, n) is not None}
    for part in needed | set(parts):
        found = (parts[part].dtype, *parts[part].shape) if part in parts else ()
        if found not in {(dtype, *expected[part]) for dtype in _ALLOWED[part]}:
            raise CheckpointError(f"{path}: {name}.{part}", f"{_ALLOWED[part][0]} {expected[part]}", found)
    for part, least, most in (("rows", -1, rows), ("g_idx", 0, groups)):
        if part in parts and parts[part].numel():
            low, high = (int(n) for n in parts[part].aminmax())
            if low < least or high >= most:
                raise CheckpointError(f"{path}: {name}.{part}", f"numbers from {least} to {most - 1}", f"{low}, {high}")


def _write(skeleton: Skeleton, checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Write the layers of a filled model to the first place that can hold them; say in the log where that is."""
    layers = {name: module for name, module in skeleton.packed.items() if module._layout == "cpu"}
    tensors = {
        f"{name}.{part}": tensor
        for group in _groups(skeleton.model, layers)
        for part in _PARTS
        for name in group
        if (tensor := _parts(layers[name]).get(part)) is not None
    }
    if not tensors:
        log.info("cache_packed: nothing is kept, since no kernel for the CPU takes the layers of %s", checkpoint.folder)
        return
    said = {
        "about": about,
        "layers": {name: str(module._scales_dtype) for name, module in layers.items()},
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    needed = sum(spec.nbytes for spec in specs)
    why: object = "no folder"
    for path in places(checkpoint):
        try:
            with work_folder(path) as work:
                free = shutil.disk_usage(work.folder).free
                if needed > free:
                    raise OSError(f"{path.parent}: expected {needed / 1e9:.2f} GB free, found {free / 1e9:.2f}")
                with TensorFile(work.folder / "new", specs, {_KEY: json.dumps(said)}, LINE) as file:
                    for name, tensor in tensors.items():
                        file.write(name, tensor)
                publish(work.folder / "new", path)
        except OSError as error:
            why = error
            continue
        log.info("cache_packed: %d packed layers are kept in %s (%.2f GB)", len(layers), path, needed / 1e9)
        return
    log.warning("cache_packed: nothing is kept: %s", why)


def _groups(model: Any, layers: Mapping[str, QuantLinear]) -> list[list[str]]:
    """Return the names of layers that are to lie side by side, part by part, so that they are mapped as one
    (`ropewalk.loader.merged`), and each other layer by itself.
    """
    names = {module: name for name, module in layers.items()}
    merged = [
        [names[layer] for layer in group] for group in groups_of(model, frozenset(FUSIONS)) if names.keys() >= {*group}
    ]
    taken = {name for group in merged for name in group}
    return merged + [[name] for name in layers if name not in taken]


def _parts(module: QuantLinear) -> Parts:
    """Return what a filled layer has on the CPU."""
    tensors = {
        "words": module.qweight,
        "scales": module.scales,
        "zeros": module._zeros,
        "rows": module._order,
        "qzeros": module.qzeros,
        "g_idx": module.g_idx,
        "bias": module.bias,
    }
    return {part: tensor for part, tensor in tensors.items() if tensor is not None}
