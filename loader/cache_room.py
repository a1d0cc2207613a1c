"""Room at the end of a transformers cache, so that a new token is written and not all that came before it copied.

A DynamicCache grows by torch.cat: every token of every layer is copied for each new one, into memory that has just been
asked for. Here its tensors are the filled part of larger ones, which are replaced when they are full. From outside
nothing differs: `keys` and `values` are tensors of the right shape, never changed where somebody may hold them, and
whoever puts others in their place (crop, reorder, batches selected) is followed.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LEAST = 256  # tokens of new room
_ATTRIBUTE = "_ropewalk_room"


class Room(NamedTuple):
    """Where the next tokens of a layer go.

    Attributes:
        keys, values: [batch, heads, capacity, dim].
        length: int64, one number: how many tokens are there.
    """

    keys: Tensor
    values: Tensor
    length: Tensor


class _Grown:
    """The tensors behind those of a DynamicLayer.

    Attributes:
        owner: of the layer, so that a copy of it, which shares them, does not write over what the first wrote.
        shown: what the layer had for keys and values when it was last looked at.
    """

    def __init__(self, owner: Any, keys: Tensor, values: Tensor, length: int):
        self.owner = weakref.ref(owner)
        self.room = Room(keys, values, torch.tensor(length))
        self.shown: tuple[Tensor, Tensor] | None = None

    def show(self, layer: Any, length: int) -> None:
        layer.keys, layer.values = self.room.keys[:, :, :length], self.room.values[:, :, :length]
        self.shown = layer.keys, layer.values

    def __deepcopy__(self, memo: Any) -> None:
        return None  # the copy begins with room of its own

    def __reduce__(self) -> Any:
        return (type(None), ())


def room_in(cache: Any, index: int, tokens: int, like: Tensor, heads: int, dim: int) -> Room | None:
    """Return room for new tokens in a layer of a cache, or None for a kind of cache that is not known here.

    Whoever writes them calls `wrote`.

    Args:
        cache: of transformers, DynamicCache or StaticCache.
        index: of the layer.
        tokens: how many.
        like: a tensor [batch, ...] of the dtype and on the device of keys and values, on the CPU.
        heads, dim: of keys and values.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        return None
    if index == len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    if index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    shape = (like.shape[0], heads, 0, dim)
    if type(layer) is StaticLayer and hasattr(layer, "cumulative_length"):
        if not layer.is_initialized:
            layer.lazy_initialization(like.new_empty(shape), like.new_empty(shape))
        room = Room(layer.keys, layer.values, layer.cumulative_length)
        fits = room.keys.dtype == like.dtype and room.keys.shape[:2] == shape[:2] and room.length.is_cpu
        return room if fits and int(room.length) + tokens <= room.keys.shape[2] else None
    if type(layer) is not DynamicLayer:
        return None
    if not layer.is_initialized:
        layer.lazy_initialization(like.new_empty(shape), like.new_empty(shape))
    past = layer.keys.shape[2] if layer.keys.ndim == 4 else 0
    if past and (layer.keys.dtype != like.dtype or layer.keys.shape[:2] != shape[:2] or layer.keys.shape[3] != dim):
        return None
    return _grown(layer, past, past + tokens, like, shape).room


def static_layer(cache: Any, index: int) -> Any:
    """Return a layer of a StaticCache that has its memory already, or None."""
    from transformers.cache_utils import StaticCache, StaticLayer

    if type(cache) is not StaticCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    known = type(layer) is StaticLayer and hasattr(layer, "cumulative_length") and layer.is_initialized
    return layer if known else None


def _grown(layer: Any, past: int, needed: int, like: Tensor, shape: tuple[int, ...]) -> _Grown:
    """Return the tensors behind a DynamicLayer's, made anew where there are none or they are full."""
    found = vars(layer).get(_ATTRIBUTE)
    if (
        found is not None
        and found.owner() is layer
        and found.shown is not None
        and layer.keys is found.shown[0]
        and layer.values is found.shown[1]
        and needed <= found.room.keys.shape[2]
    ):
        return found
    capacity = needed + max(_LEAST, needed // 4)
    keys, values = (like.new_empty((*shape[:2], capacity, shape[3])) for _ in range(2))
    if past:
        keys[:, :, :past] = layer.keys
        values[:, :, :past] = layer.values
    found = _Grown(layer, keys, values, past)
    setattr(layer, _ATTRIBUTE, found)
    return found


def wrote(cache: Any, index: int, length: int) -> None:
    """Have a layer show what was written into its room; `Room.length` tells so already.

    Args:
        length: how many tokens are there now.
    """
    layer = cache.layers[index]
    grown = vars(layer).get(_ATTRIBUTE)
    if grown is not None:
        grown.show(layer, length)
