"""Filling a model from its checkpoint: tensors stream from the files to their devices, one layer at a time.

A packed layer is rearranged for its device as soon as its tensors are there, so that memory never holds more than
the model and one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.loader.arena import Arena
from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.experts import PackedExperts
from ropewalk.loader.halves import HALVES, HalfEmbedding, HalfLinear
from ropewalk.loader.merged import Slots, can_merge
from ropewalk.loader.packed_cache import Parts, adopt
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.reader import Reader
from ropewalk.loader.safetensors_file import TensorEntry
from ropewalk.loader.skeleton import Skeleton

DeviceOf = Callable[[str], torch.device]
Progress = Callable[[int], Any]


def fill(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    device_of: DeviceOf,
    dtype: torch.dtype,
    progress: Progress,
    cached: Mapping[str, Parts],
    groups: Iterable[Sequence[QuantLinear]] = (),
) -> None:
    """Read every tensor of a checkpoint to its place.

    Args:
        device_of: name of a module, parameter or buffer -> where it goes.
        dtype: of what is not packed.
        progress: called with a number of bytes whenever so many more have been read.
        cached: packed layers that need not be read (see packed_cache.py).
        groups: packed layers that read one input: on the CPU they get memory side by side (see merged.py).

    Raises:
        OffsetsError: a file that has become shorter since its header was read.
    """
    model = skeleton.model
    names = {module: name for name, module in model.named_modules()}
    waiting = {
        module: sum(isinstance(layer, nn.Module) for name in module.names for layer in module.layers(name))
        for module in model.modules()
        if isinstance(module, PackedExperts)
    }
    stack_of = {layer: stack for stack in waiting for name in stack.names for layer in stack.layers(name)}
    arena = Arena()
    slots = {}
    for group in groups:
        if can_merge(group) and all(device_of(names[layer]).type == "cpu" for layer in group):
            slots.update(dict.fromkeys(group, Slots(group, arena.empty)))
    with checkpoint.reader() as reader:
        for entry, layer_name in _in_order(checkpoint):
            if layer_name is None:
                _fill_plain(skeleton, reader, entry, device_of, dtype)
                progress(entry.nbytes)
                continue
            layer = checkpoint.layers[layer_name]
            module = skeleton.packed[layer_name]
            if layer_name in cached:
                adopt(module, cached[layer_name])
            else:
                empty = slots[module].empty_for(module) if module in slots else arena.empty
                module.fill(reader.read_layer(layer), device_of(names[module]), empty)
            if stack := stack_of.get(module):
                waiting[stack] -= 1
                if waiting[stack] == 0:
                    stack.stack()
            progress(layer.nbytes())
    _move_buffers(model, device_of)
    _tie(skeleton)


def _in_order(checkpoint: Checkpoint) -> Iterator[tuple[TensorEntry, str | None]]:
    """Yield, as they lie in the files, tensors (with None) and packed layers (with their name)."""
    items: list[tuple[TensorEntry, str | None]] = [(checkpoint.tensors[n], None) for n in checkpoint.plain_tensors()]
    for name, layer in checkpoint.layers.items():
        items.append((min(layer.entries.values(), key=lambda entry: (str(entry.file), entry.offset)), name))
    yield from sorted(items, key=lambda item: (str(item[0].file), item[0].offset))


def _fill_plain(
    skeleton: Skeleton, reader: Reader, entry: TensorEntry, device_of: DeviceOf, dtype: torch.dtype
) -> None:
    """Read a tensor that is not packed to its parameter or buffer."""
    model = skeleton.model
    if entry.name in skeleton.stacked:
        target, part = skeleton.stacked[entry.name]
        parameter = _parameter(model, target)
        if parameter.is_meta:
            parameter = _set(model, target, torch.empty(parameter.shape, dtype=dtype, device=device_of(target)))
        parameter.detach()[part] = reader.read(entry.name).to(parameter.device, dtype)
        return
    if entry.name not in skeleton.plain:
        return  # one that is computed today
    target = skeleton.plain[entry.name]
    device = device_of(target)
    tensor = reader.read(entry.name)
    name, _, attribute = target.rpartition(".")
    module = model.get_submodule(name)
    if attribute == "weight" and _stays_half(module, entry, device, dtype):
        _replace(model, name, _half(module, tensor, dtype))
    elif attribute == "bias" and isinstance(module, HalfLinear):
        module.register_buffer("bias", tensor)
    else:
        current = _parameter(model, target)
        _set(model, target, tensor.to(device, current.dtype if current.dtype == torch.float32 else dtype))


def _stays_half(module: nn.Module, entry: TensorEntry, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a weight keeps the 16 bits of its file: on the CPU, where the model is float32."""
    plain = type(module) in (nn.Linear, nn.Embedding)
    return plain and device.type == "cpu" and dtype == torch.float32 and entry.dtype in HALVES


def _half(module: Any, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return HalfEmbedding(weight, module.padding_idx, dtype)
    half = HalfLinear(weight)
    if module.bias is not None:
        # Its values may be there already, or yet to come.
        del half.bias
        half.register_buffer("bias", module.bias.detach())
    return half


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _parameter(model: Any, name: str) -> Tensor:
    parent, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(parent), attribute)
    return tensor


def _set(model: Any, name: str, tensor: Tensor) -> Tensor:
    """Put a tensor where a parameter or a buffer is."""
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    if attribute in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=module._parameters[attribute].requires_grad)
        # Not by setattr: what that calls is changed for all modules while another thread builds a model.
        module._parameters[attribute] = tensor
    else:
        setattr(module, attribute, tensor)
    return tensor


def _move_buffers(model: Any, device_of: DeviceOf) -> None:
    """Bring the buffers that were computed while building, and never were in a file, to their devices."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta and buffer.device != device_of(name):
            _set(model, name, buffer.to(device_of(name)))


def _tie(skeleton: Skeleton) -> None:
    """Let the parameters that have no tensor of their own share that of another; most often the output embedding."""
    model = skeleton.model
    for target, source in skeleton.tied.items():
        weight = _parameter(model, source)
        name, _, attribute = target.rpartition(".")
        module = model.get_submodule(name)
        if attribute == "weight" and type(module) is nn.Linear and not isinstance(weight, nn.Parameter):
            _replace(model, name, HalfLinear(weight, None if module.bias is None else module.bias.detach()))
        elif isinstance(weight, nn.Parameter):
            module._parameters[attribute] = weight  # as in _set
        else:
            setattr(module, attribute, weight)
