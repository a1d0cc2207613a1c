"""Which device each module of a model goes to: planned by accelerate, from the sizes of what is packed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ropewalk.errors import NotEnoughMemoryError, UsageError

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
CPU_LAYERS = "cpu-layers:"


def plan(model: Any, device_map: Any, max_memory: Mapping[Any, Any] | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return module name -> device ("" for all), as accelerate has it.

    Args:
        model: on the meta device, with its packed layers.
        device_map: "auto" and the like, a device ("cpu", "cuda:1", 1, torch.device), a dict, "cpu-layers:4" for the
            last four layers on the CPU and the rest on the GPU, or None for the GPU if there is one, else the CPU.
        max_memory: device -> bytes, or text such as "10GiB"; only for "auto" and the like.
        dtype: of what is not packed.

    Raises:
        UsageError: a device that is not here, names that the model does not have, disk offload.
        NotEnoughMemoryError: no plan fits.
    """
    if max_memory is not None and device_map not in PLANS:
        raise UsageError(f"max_memory: expected device_map {' or '.join(PLANS)} with it, found {device_map!r}")
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, dict):
        placed = {name: _device(device) for name, device in device_map.items()}
        _check_names(model, placed)
    elif str(device_map).startswith(CPU_LAYERS):
        placed = _cpu_layers(model, str(device_map).removeprefix(CPU_LAYERS))
    elif device_map in PLANS:
        placed = _planned(model, device_map, max_memory, dtype)
    else:
        placed = {"": _device(device_map)}
    if "disk" in placed.values():
        where = next(name for name, device in placed.items() if device == "disk")
        raise UsageError(
            f"device_map: expected GPUs and cpu, found disk for {where}: packed layers are not offloaded to disk; "
            "layers on the CPU compute there, so give it more memory (max_memory) or take a smaller packing"
        )
    _check_memory(model, placed, dtype)
    return placed


def _device(device: Any) -> Any:
    """Return a device as a name or number, checked.

    Raises:
        UsageError: none, or none that is here.
    """
    if device in ("disk", "meta"):
        return "disk"
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device_map: expected cpu, cuda or cuda:N, found {device!r}") from None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise UsageError(f"device_map: expected cpu or one of the {count} GPUs here, found {device!r}")
        return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found
    if found.type != "cpu":
        raise UsageError(f"device_map: expected cpu, cuda or cuda:N, found {device!r}")
    return found


def _check_names(model: Any, placed: Mapping[str, Any]) -> None:
    """Refuse a dict that names what the model does not have, or leaves something out."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in placed:
        if name and not any(tensor == name or tensor.startswith(f"{name}.") for tensor in tensors):
            raise UsageError(f"device_map: expected names of modules of {type(model).__name__}, found {name!r}")
    for tensor in tensors:
        if not any(name == "" or tensor == name or tensor.startswith(f"{name}.") for name in placed):
            raise UsageError(f"device_map: expected a device for every module, found none for {tensor}")


def _planned(model: Any, device_map: str, max_memory: Mapping[Any, Any] | None, dtype: torch.dtype) -> dict[str, Any]:
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    given = None if max_memory is None else {_key(k): v for k, v in max_memory.items()}
    whole = getattr(model, "_no_split_modules", None) or []
    whole = [*whole] if isinstance(whole, (list, tuple, set)) else [whole]
    try:
        if device_map == "sequential":
            budget = get_max_memory(given)
        else:
            low = device_map == "balanced_low_0"
            budget = get_balanced_memory(model, given, whole, dtype=dtype, low_zero=low)
        placed = infer_auto_device_map(model, budget, whole, dtype=dtype)
    except ValueError as error:  # sizes that are none, devices that are not there
        raise UsageError(f"max_memory: {error}") from None
    return {name: "disk" if device == "disk" else _device(device) for name, device in placed.items()}


def _cpu_layers(model: Any, count: str) -> dict[str, Any]:
    """Return a map with so many of the last layers on the CPU and all else on the GPU."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    layers = next((name for name, stack in stacks.items() if len(stack) == model.config.num_hidden_layers), None)
    if layers is None:
        raise UsageError(f"device_map: expected a model with a list of its layers, found {type(model).__name__}")
    total = len(stacks[layers])
    if not count.isdecimal() or int(count) > total:
        raise UsageError(f"device_map: expected 0 to {total} layers on the CPU, found {count!r}")
    gpu = _device("cuda")
    placed: dict[str, Any] = {}
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        module = name.rpartition(".")[0]
        if name.startswith(f"{layers}."):
            number = int(name.removeprefix(f"{layers}.").partition(".")[0])
            placed[f"{layers}.{number}"] = torch.device("cpu") if number >= total - int(count) else gpu
        else:
            placed[module or name] = gpu
    return placed


def _key(device: Any) -> Any:
    """Return a device as accelerate counts them: a number for a GPU, else its name."""
    text = str(device).removeprefix("cuda:")
    return int(text) if text.isdecimal() else text


def device_of(placed: Mapping[str, Any]) -> Callable[[str], torch.device]:
    """Return a function from the name of a module or tensor to its device: that of the longest name it lies in."""

    def find(name: str) -> torch.device:
        while name and name not in placed:
            name = name.rpartition(".")[0]
        device: torch.device = placed[name]
        return device

    return find


def dispatch(model: Any, placed: Mapping[str, Any]) -> None:
    """Have activations move to where each module is; for a model on one device there is nothing to do.

    Modules on the CPU compute there: accelerate's `dispatch_model` would copy their weights to a GPU for every call.
    """
    if len(set(placed.values())) == 1:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model.hf_device_map = {name: _shown(device) for name, device in placed.items()}
    modules = dict(model.named_modules())
    skip = getattr(model, "_skip_keys_device_placement", None)  # the cache, whose layers lie where they are used
    for name, device in placed.items():
        if name in modules:
            add_hook_to_module(modules[name], AlignDevicesHook(device, skip_keys=skip))
    first = next(iter(placed.values()))
    add_hook_to_module(model, AlignDevicesHook(first, io_same_device=True, skip_keys=skip))


def _shown(device: torch.device) -> Any:
    return device.index if device.type == "cuda" else str(device)


def _check_memory(model: Any, placed: Mapping[str, Any], dtype: torch.dtype) -> None:
    """See that every device has the memory for what it is to hold.

    Raises:
        NotEnoughMemoryError: with what is needed and what is free.
    """
    find = device_of(placed)
    needed: dict[torch.device, int] = {}
    for name, tensor in _tensors(model):
        itemsize = min(tensor.dtype.itemsize, dtype.itemsize) if tensor.dtype.is_floating_point else tensor.itemsize
        device = find(name)
        # On the CPU embeddings keep their 16 bits even where the model is float32.
        itemsize = min(itemsize, 2) if device.type == "cpu" and tensor.ndim > 1 else itemsize
        needed[device] = needed.get(device, 0) + tensor.numel() * itemsize
    for device, size in needed.items():
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        if size > free:
            raise NotEnoughMemoryError(str(device), size, free)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def free_memory() -> int:
    """Return how many bytes of memory this process can still take: the system's, or less where a limit is set."""
    try:
        lines = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return 1 << 62  # not known
    return min(free, _left_of_limit())


def _read(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


def _left_of_limit(folder: str = "/sys/fs/cgroup") -> int:
    """Return what a container's limit leaves, not counting pages of files, which are given up when memory is short."""
    try:
        limit, used = (int(_read(f"{folder}/memory.{name}")) for name in ("max", "current"))
        stat = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
    except (OSError, ValueError):
        return 1 << 62  # none is set
    files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return max(limit - used + files, 0)
