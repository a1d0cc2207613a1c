"""The parameters that vLLM reads a packed linear layer into: which part of each tensor a rank keeps.

vLLM's loaders call a method of the parameter for each kind of layer; what is told here is what differs from its own
classes. A rank of a row-parallel layer keeps the rows of its inputs ("rows"), some columns with all their rows
("columns", see linear.py). With an `order` rows of it, or columns of what comes before it, are shared out in that
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter, PerTensorScaleParameter

from ropewalk.gptq.format import expected_tensors, pack, unpack
from ropewalk.gptq.layout import PLANE
from ropewalk.patches.vllm.config import Packing

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def take_rows(qweight: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Return some rows of packed codes int32 [K * bits / 32, N], in that order."""
    return pack(unpack(qweight, bits)[rows.to(qweight.device, torch.int64)], bits)


def take_columns(tensor: Tensor, columns: Tensor, bits: int | None) -> Tensor:
    """Return some columns of a tensor, in that order; with bits of one that is packed along them."""
    columns = columns.to(tensor.device, torch.int64)
    if bits is None:
        return tensor.index_select(1, columns)
    return pack(unpack(tensor, bits, dim=1)[:, columns], bits, dim=1)


class _Kept:
    """What a rank keeps of a tensor.

    Attributes:
        keeps: of a row-parallel layer.
        order: int32 [K] of a row-parallel layer, or of the one that reads what this layer writes; rank r of n has the
            r-th n-th of it.
        groups: int64 [G], of scales and zero points of which it keeps rows: which of all groups its own are.
        bits: of what is packed.
        along: the dimension along which the tensor is packed, or None.
    """

    keeps = "rows"
    order: Tensor | None = None
    groups: Tensor | None = None
    bits = 0
    along: int | None = None

    def load_row_parallel_weight(self: Any, loaded_weight: Tensor) -> None:
        """Take this rank's rows or columns."""
        if self.keeps == "columns":
            self.load_column_parallel_weight(loaded_weight)
        elif self.groups is not None:  # of sorted rows the groups of a rank follow one another, too
            self._assert_and_load(loaded_weight.index_select(0, self.groups.to(loaded_weight.device)))
        elif self.order is not None:
            self._assert_and_load(take_rows(loaded_weight.to(self.device), self._own(), self.bits))
        else:
            super().load_row_parallel_weight(loaded_weight)  # type: ignore[misc]

    def load_merged_column_weight(self: Any, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Take this rank's columns of one of the layers that vLLM takes as one."""
        if self.order is None:
            super().load_merged_column_weight(loaded_weight, **kwargs)  # type: ignore[misc]
            return
        bits = self.bits if self.along == 1 else None
        found = take_columns(loaded_weight.to(self.device), self._own(), bits)
        start = kwargs["shard_offset"] * found.shape[1] // kwargs["shard_size"]
        self.data[:, start : start + found.shape[1]].copy_(found)

    def _own(self: Any) -> Tensor:
        own = len(self.order) // self.tp_size
        order: Tensor = self.order[self.tp_rank * own :][:own]
        return order


class Words(_Kept, PackedvLLMParameter):
    """Packed codes or zero points."""


class Scales(_Kept, GroupQuantScaleParameter):
    """Scales [G, N]."""


class GroupIndex(PerTensorScaleParameter):
    """g_idx of each of the layers that vLLM takes as one: int32 [layers, K].

    vLLM's loaders take it for one number for each layer, and bring it whole.
    """

    keeps = "rows"
    order: Tensor | None = None

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take all of it."""
        self.data[0].copy_(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take what belongs to this rank's rows."""
        if self.order is not None:
            return  # sorted rows are in the order of their groups
        rows = self.data.shape[1]
        start = self.tp_rank * rows if self.keeps == "rows" else 0
        self.data[0].copy_(loaded_weight[start : start + rows])

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **_: Any) -> None:
        self.data[self._shard_id_as_int(shard_id)].copy_(loaded_weight)


def make_parameters(
    packing: Packing,
    rows: int,
    sizes: tuple[int, ...],
    keeps: str,
    weight_loader: Callable[..., None],
    *,
    g_idx: Tensor,
    order: Tensor | None = None,
    groups: Tensor | None = None,
) -> dict[str, Any]:
    """Return empty parameters for the tensors of a layer, on the device that is torch's default.

    Args:
        rows: K of this rank.
        sizes: N of this rank, of each of the layers that vLLM takes as one.
        keeps: what a rank of a row-parallel layer keeps of the weight.
        weight_loader: what vLLM calls with a parameter and a tensor.
        g_idx: int32 [rows], what files from before act-order mean, which have none.
        order, groups: as in `_Kept`.
    """
    shapes = expected_tensors(rows, sum(sizes), packing.bits, packing.group_size)
    dims: dict[str, Any] = {"input_dim": 0, "output_dim": 1, "weight_loader": weight_loader}
    words = {"packed_factor": Fraction(32, packing.bits), **dims}

    def empty(name: str, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shapes[name][0], dtype=dtype)

    made: dict[str, Any] = {
        "qweight": Words(data=empty("qweight"), packed_dim=0, **words),
        "qzeros": Words(data=empty("qzeros"), packed_dim=1, **words),
        "scales": Scales(data=empty("scales", packing.scales), **dims),
        "g_idx": GroupIndex(data=g_idx.repeat(len(sizes), 1), weight_loader=weight_loader),
    }
    for name, parameter in made.items():
        parameter.keeps, parameter.order, parameter.bits = keeps, order, packing.bits
        parameter.along = {"qweight": 0, "qzeros": 1}.get(name)
        parameter.groups = groups if name in ("scales", "qzeros") else None
    return made


def group_size_of_share(group_size: int, rows: int) -> int | None:
    """Return the size of groups of which so many rows from any multiple of them on are whole ones, each with the scales
    of the group that it is a part of; None where they would be too small for the kernels.
    """
    if group_size == -1:
        return -1
    size = math.gcd(group_size, rows)
    return size if size == group_size or size % PLANE == 0 else None


def groups_of_share(group_size: int, rows: int, start: int) -> Tensor:
    """Return int64 [G], which of all groups those of `rows` rows are that begin at row `start`."""
    if group_size == -1:
        return torch.zeros(1, dtype=torch.int64)
    size = group_size_of_share(group_size, rows)
    assert size is not None
    return (start + torch.arange(0, rows, size)) // group_size


def head_loader(layer: Any) -> Callable[[Any, Tensor], None]:
    """Return what loads a packed output embedding: this rank's words of the vocabulary, and zeros for those that vLLM
    adds to make their number even.
    """

    def load(param: Any, loaded_weight: Tensor) -> None:
        if isinstance(param, GroupIndex):
            return param.load_column_parallel_weight(loaded_weight)
        each = param.packed_factor if getattr(param, "packed_dim", None) == param.output_dim else 1
        indices = layer.shard_indices
        first, last = (int(i / each) for i in (indices.org_vocab_start_index, indices.org_vocab_end_index))
        param.data.zero_()
        param.data[:, : last - first].copy_(loaded_weight[:, first:last])
        return None

    return load
