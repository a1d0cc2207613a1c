"""Packed layers that read the same input, multiplied as one.

On the CPU the layers' tensors become views of what lies side by side, each with its own columns, and go on as layers
of their own; nothing is held twice. On a GPU, whose layout has no such views, the merged weight holds what was theirs,
and a layer that is called or saved by itself takes its columns from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ropewalk.gptq.ops  # noqa: F401  registers ropewalk::packed_linear
from ropewalk.gptq import cpu_layout, cpu_ops
from ropewalk.gptq.layout import interleave, side_by_side, take_columns

if TYPE_CHECKING:
    from ropewalk.loader.quant_linear import QuantLinear


class Merged:
    """The weights of several packed layers side by side.

    Args:
        layers: of one input, in the order of their columns.
        gated: whether they are a gate and what it opens: the product is then silu(x @ gate) * (x @ up).
        reader: the layer that reads the product, if its act-order is to be folded into the columns here.

    Attributes:
        order: int32 [K]: sorted row j is row order[j] of the layers, on a GPU; what writes x in that order spares the
            product the gather. None where rows are not moved, or on the CPU, where nothing is gained by it.
        folded: the reader's order, in which the product's columns are; None where they are as the layers have them.
    """

    def __init__(self, layers: Sequence[QuantLinear], gated: bool = False, reader: QuantLinear | None = None):
        self.layers = tuple(layers)
        self.gated = gated
        self.reader = reader
        self.forget()
        for layer in self.layers:
            layer._merged = self

    def forget(self) -> None:
        """Let the layers be on their own; the next call tries anew."""
        if vars(self).get("layout") == "gpu":
            self._split()
        self.layout: str | None = None
        self._was_tried = False
        self.words: Tensor | None = None
        self.scales: Tensor | None = None
        self.zeros: Tensor | None = None
        self.bias: Tensor | None = None
        self._rows: Tensor | None = None  # on the CPU
        self.order: Tensor | None = None
        self.folded: Tensor | None = None
        self._place: Tensor | None = None  # of each column of the layers, one after another, on a GPU

    def part(self) -> None:
        """Let the layers be on their own for good: one of them is wanted by itself."""
        self.forget()
        self._was_tried = True

    def is_ready(self) -> bool:
        """Return whether the layers compute as one, after trying once to bring them together."""
        if not self._was_tried:
            for layer in self.layers:
                if not layer._ready:
                    layer.post_init()
            self._was_tried = True
            self._merge()
        return self.layout is not None

    def __call__(self, x: Tensor, in_order: bool = False) -> Tensor:
        """Return the products of all layers side by side, [..., the sum of N], or gated [..., N], in x's dtype.

        Args:
            x: [..., K]; with `in_order` its channels are in `order`.
        """
        first = self.layers[0]
        packed = self.words, self.scales, self.zeros
        how = self.bias, first.bits, first.group_size
        multiply: Any
        if self.layout == "cpu":
            multiply = cpu_ops.gate_up if self.gated else cpu_ops.linear
            return multiply(x, *packed, self._rows, *how, self.columns, first.computes_exactly)
        multiply = torch.ops.ropewalk.packed_gate_up if self.gated else torch.ops.ropewalk.packed_linear
        return multiply(x, *packed, None if in_order else self.order, *how)

    def columns_of(self, layer: QuantLinear) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the words, scales and zero points of a layer that is merged on a GPU."""
        assert self.words is not None and self.scales is not None and self._place is not None
        start = sum(other.outfeatures for other in self.layers[: self.layers.index(layer)])
        columns = self._place[start : start + layer.outfeatures]
        zeros = None if self.zeros is None or layer._is_symmetric else self.zeros.index_select(1, columns)
        return take_columns(self.words, columns, layer.bits), self.scales.index_select(1, columns), zeros

    @torch.inference_mode(False)  # or what is made here could never be trained through
    def _merge(self) -> None:
        if not can_merge(self.layers, self.gated):
            return
        layout = self.layers[0]._layout
        if layout not in ("cpu", "gpu") or not _all_equal([layer._order for layer in self.layers]):
            return
        if len({layer.computes_exactly for layer in self.layers}) > 1:
            return
        self.columns = sum(layer.outfeatures for layer in self.layers)
        if layout == "gpu":
            self._merge_on_gpu()
        else:
            self.words = _joined(self.layers, "qweight")
            self.scales = _joined(self.layers, "scales")
            self.zeros = _zeros(self.layers, dim=0)
            self.bias = _bias(self.layers)
            self._rows = self.layers[0]._order
        self.layout = layout

    def _merge_on_gpu(self) -> None:
        layers, bits = self.layers, self.layers[0].bits
        words = side_by_side([layer.qweight for layer in layers], bits)
        scales = torch.cat([layer.scales for layer in layers], dim=1)
        zeros, bias = _zeros(layers, dim=1), _bias(layers)
        columns = torch.arange(self.columns, device=words.device)
        reader = self.reader
        if reader is not None and reader._layout == "gpu" and reader._order is not None:
            self.folded = reader._order
        if self.gated or self.folded is not None:
            parts = columns.chunk(2) if self.gated else (columns,)
            if self.folded is not None:
                parts = tuple(part[self.folded.long()] for part in parts)
            source = interleave(*parts) if self.gated else parts[0]
            words, scales = take_columns(words, source, bits), scales[:, source]
            zeros = None if zeros is None else zeros[:, source]
            bias = None if bias is None else bias[source]
            columns[source] = columns.clone()
        self.words, self.scales, self.zeros, self.bias, self._place = words, scales, zeros, bias, columns
        self.order = layers[0]._order
        for layer in layers:
            layer.qweight, layer.scales = layer.qweight.new_empty(0), layer.scales.new_empty(0)
            layer._zeros, layer._layout = None, "merged"

    @torch.inference_mode(False)
    def _split(self) -> None:
        for layer in self.layers:
            layer.qweight, layer.scales, layer._zeros = self.columns_of(layer)
            layer._layout = "gpu"


def can_merge(layers: Sequence[QuantLinear], gated: bool = False) -> bool:
    """Return whether layers agree in all that is known of them before their values are."""
    kinds = {(layer.bits, layer.group_size, layer.infeatures, layer.scales.dtype, layer._layout) for layer in layers}
    widths = [layer.outfeatures for layer in layers]
    # On the CPU the last tile of the last one may have room; 3 bits on a GPU want pairs of columns.
    whole = widths if gated or layers[0]._layout == "gpu" else widths[:-1]
    step = cpu_layout.COLUMNS if layers[0]._layout != "gpu" else 2
    return len(kinds) == 1 and all(n % step == 0 for n in whole) and (not gated or len(set(widths)) == 1)


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


def _zeros(layers: Sequence[QuantLinear], dim: int) -> Tensor | None:
    """Return the zero points side by side; where some are asymmetric, all are written out."""
    if all(layer._zeros is None for layer in layers):
        return None
    parts = []
    for layer in layers:
        symmetric = torch.full_like(layer.scales, 1 << (layer.bits - 1), dtype=torch.uint8)
        parts.append(symmetric if layer._zeros is None else layer._zeros)
    whole = torch.cat(parts, dim)
    if dim == 0:
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
