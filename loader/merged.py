"""Packed layers that read the same input, multiplied as one.

On the CPU the layers' tensors become views of what lies side by side, each with its own columns, and go on as layers of
their own; nothing is held twice. On a GPU, whose layout has no such views, the merged weight holds what was theirs, and a
layer that is called or saved by itself takes its columns from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ropewalk.gptq import cpu_layout, cpu_ops

if TYPE_CHECKING:
    from ropewalk.loader.quant_linear import QuantLinear


class Merged:
    """The weights of several packed layers side by side.

    Args:
        layers: of one input, in the order of their columns.
        gated: whether they are a gate and what it opens: the product is then silu(x @ gate) * (x @ up).
    """

    def __init__(self, layers: Sequence[QuantLinear], gated: bool = False):
        self.layers = tuple(layers)
        self.gated = gated
        self._is_merged = self._was_tried = False
        for layer in self.layers:
            layer._merged = self

    def forget(self) -> None:
        """Let the layers be on their own; the next call tries anew."""
        self._is_merged = self._was_tried = False
        self.words = self.scales = self.zeros = self.order = self.bias = None

    def is_ready(self) -> bool:
        """Return whether the layers compute as one, after trying once to bring them together."""
        if not self._was_tried:
            self._was_tried = True
            self._is_merged = self._merge()
        return self._is_merged

    def __call__(self, x: Tensor) -> Tensor:
        """Return the products of all layers side by side, [..., the sum of N], or gated [..., N], in x's dtype."""
        first = self.layers[0]
        multiply: Any = cpu_ops.gate_up if self.gated else cpu_ops.linear
        return multiply(
            x,
            self.words,
            self.scales,
            self.zeros,
            self.order,
            self.bias,
            first.bits,
            first.group_size,
            self.columns,
            first.computes_exactly,
        )

    def _merge(self) -> bool:
        if any(not layer._ready for layer in self.layers) or not can_merge(self.layers, self.gated):
            return False
        first = self.layers[0]
        if first._layout != "cpu" or not _all_equal([layer._order for layer in self.layers]):
            return False
        if len({layer.computes_exactly for layer in self.layers}) > 1:
            return False
        self.words = _joined(self.layers, "qweight")
        self.scales = _joined(self.layers, "scales")
        self.zeros = _zeros(self.layers)
        self.order = first._order
        self.bias = _bias(self.layers)
        self.columns = sum(layer.outfeatures for layer in self.layers)
        return True


def can_merge(layers: Sequence[QuantLinear], gated: bool = False) -> bool:
    """Return whether layers agree in all that is known of them before their values are."""
    kinds = {(layer.bits, layer.group_size, layer.infeatures, layer.scales.dtype, layer._layout) for layer in layers}
    widths = [layer.outfeatures for layer in layers]
    whole = widths if gated else widths[:-1]  # the last tile of the last one may have room
    return len(kinds) == 1 and all(n % cpu_layout.COLUMNS == 0 for n in whole) and (not gated or len(set(widths)) == 1)


class Slots:
    """Memory in which the layers of a group will lie side by side, for `QuantLinear.fill` on the CPU.

    Args:
        empty: gives the memory, called as torch.empty is.
    """

    def __init__(self, layers: Sequence[QuantLinear], empty: Callable[..., Tensor]):
        self._starts: dict[Any, int] = {}
        self._tiles = 0
        for layer in layers:
            self._starts[layer] = self._tiles
            self._tiles += -(-layer.outfeatures // cpu_layout.COLUMNS)
        self._empty = empty
        self._whole: dict[torch.dtype, Tensor] = {}

    def empty_for(self, layer: QuantLinear) -> Callable[..., Tensor]:
        """Return what gives a layer its memory, for tensors whose first dimension is tiles."""

        def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            if dtype not in self._whole:
                self._whole[dtype] = self._empty((self._tiles, *shape[1:]), dtype=dtype)
            start = self._starts[layer]
            return self._whole[dtype][start : start + shape[0]]

        return empty


def _joined(layers: Sequence[QuantLinear], name: str) -> Tensor:
    """Return a buffer of the layers as one tensor, of which theirs are views from now on."""
    parts: list[Tensor] = [getattr(layer, name) for layer in layers]
    whole = _as_one(parts)
    if whole is None:
        whole = torch.cat(parts)
        for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
            setattr(layer, name, part)
    return whole


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """Return tensors that follow each other in memory as one, or None where they do not."""
    first = parts[0]
    at = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != at or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        at += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def _zeros(layers: Sequence[QuantLinear]) -> Tensor | None:
    """Return the zero points side by side; where some are asymmetric, all are written out."""
    if all(layer._zeros is None for layer in layers):
        return None
    parts = []
    for layer in layers:
        symmetric = torch.full(layer.scales.shape, 1 << (layer.bits - 1), dtype=torch.uint8)
        parts.append(symmetric if layer._zeros is None else layer._zeros)
    whole = torch.cat(parts)
    for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
        layer._zeros = None if layer._zeros is None else part
    return whole


def _bias(layers: Sequence[QuantLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [
        torch.zeros(layer.outfeatures, device=layer.scales.device) if layer.bias is None else layer.bias.float()
        for layer in layers
    ]
    return torch.cat(parts)


def _all_equal(tensors: Sequence[Tensor | None]) -> bool:
    first = tensors[0]
    if first is None:
        return all(tensor is None for tensor in tensors)
    return all(tensor is not None and torch.equal(first, tensor) for tensor in tensors[1:])
