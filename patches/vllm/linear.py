"""Packed linear layers in vLLM: its parameters take what a rank needs of a checkpoint, our layers compute with it.

Column-parallel layers (q, k and v; gate and up) keep some columns of the weight with all their rows, whatever the
order of these. A row-parallel layer (o, down) keeps some rows, and the scales of their groups. With act-order that does
not do: the rows of a rank are a part of every group, in no even numbers, and no kernel of ours takes such a weight. So
there a rank keeps some of the columns as well: it gathers the input, multiplies, and puts zeros where the columns of
the others are, which vLLM's own sum over the ranks then fills. Memory is the same; the price is the gathering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)
from vllm.utils.torch_utils import direct_register_custom_op

from ropewalk.errors import FormatError
from ropewalk.gptq.format import check_values, expected_tensors, group_count, is_sequential, sequential_g_idx
from ropewalk.loader.merged import Merged
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.patches.vllm.config import Packing

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class PackedColumns(PackedvLLMParameter):
    """Packed words of a row-parallel layer of which a rank keeps columns, not rows."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take this rank's columns."""
        self.load_column_parallel_weight(loaded_weight)


class Columns(GroupQuantScaleParameter):
    """Scales of a row-parallel layer of which a rank keeps columns, not rows."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take this rank's columns."""
        self.load_column_parallel_weight(loaded_weight)


class GroupIndex(PerTensorScaleParameter):
    """g_idx of each of the layers that vLLM takes as one: int32 [layers, K].

    vLLM's loaders take it for one number for each layer, and bring it whole.
    """

    by_rows = False  # whether a rank of a row-parallel layer keeps rows

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take all of it."""
        self.data[0].copy_(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take what belongs to this rank's rows."""
        rows = self.data.shape[1]
        start = self.tp_rank * rows if self.by_rows else 0
        self.data[0].copy_(loaded_weight[start : start + rows])

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **_: Any) -> None:
        self.data[self._shard_id_as_int(shard_id)].copy_(loaded_weight)


class PackedWeight(nn.Module):
    """The packed layers that vLLM takes as one, on one rank.

    Args:
        layers: ready, in the order of their columns.
        start, columns: where these columns lie among so many, for a row-parallel layer that keeps columns.
    """

    def __init__(self, layers: Sequence[QuantLinear], start: int = 0, columns: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.columns = columns or sum(layer.outfeatures for layer in layers)
        self._merged = Merged(layers) if len(layers) > 1 else None
        own = sum(layer.outfeatures for layer in layers)
        self._around = (start, columns - start - own) if columns else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the products side by side, [tokens, columns], for x [tokens, K], or what of K the rank has."""
        if self._around is not None:
            x = tensor_model_parallel_all_gather(x)
        if self._merged is not None and self._merged.is_ready():
            y = self._merged(x)
        else:
            products = [layer(x) for layer in self.layers]
            y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return y if self._around is None else F.pad(y, self._around)


@register_weight_loader_v2_supported_method
class RopewalkLinearMethod(LinearMethodBase):
    """A linear layer of vLLM that computes with packed weights.

    Args:
        packing: of the layer.
        prefix: its name, by which compiled code finds it.
    """

    def __init__(self, packing: Packing, prefix: str):
        self.packing = packing
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that vLLM reads the checkpoint into.

        Raises:
            FormatError: a share of a rank that does not fill whole words.
        """
        packing, rows = self.packing, input_size_per_partition
        is_split = rows != input_size
        by_rows = not is_split or self._splits_by_rows(rows)
        self._around: tuple[int, int] | None = None  # where a rank's columns begin, and how many all have
        if not by_rows:
            ranks, columns = input_size // rows, sum(output_partition_sizes)
            if columns % ranks:
                raise FormatError(self.prefix, f"output features that {ranks} ranks can share", columns)
            output_partition_sizes, rows = [columns // ranks], input_size
            self._around = layer.tp_rank * output_partition_sizes[0], columns
        self._sizes, self._rows = tuple(output_partition_sizes), rows
        for columns in output_partition_sizes:
            self._check(rows, columns)
        shapes = expected_tensors(rows, sum(output_partition_sizes), packing.bits, packing.group_size)
        words = Fraction(32, packing.bits)
        is_head = isinstance(layer, ParallelLMHead)
        loader = {"weight_loader": _load_head(layer) if is_head else extra_weight_attrs["weight_loader"]}
        packed, scales = (PackedvLLMParameter, GroupQuantScaleParameter) if by_rows else (PackedColumns, Columns)
        if by_rows and is_split and packing.group_size == -1:
            # One group: each rank has its scales. What is packed along its columns is whole then, too.
            scales, of_zeros = ChannelQuantScaleParameter, _WholeZeros
        else:
            of_zeros = packed

        def empty(name: str) -> Tensor:
            shape, dtype = shapes[name]
            return torch.empty(shape, dtype=dtype)

        dims = {"output_dim": 1, **loader}
        both = {"input_dim": 0, **dims}
        of_scales = dims if scales is ChannelQuantScaleParameter else both
        parameters = {
            "qweight": packed(data=empty("qweight"), packed_dim=0, packed_factor=words, **both),
            "qzeros": of_zeros(data=empty("qzeros"), packed_dim=1, packed_factor=words, **both),
            "scales": scales(data=empty("scales"), **of_scales),
        }
        sequential = sequential_g_idx(rows, packing.group_size)
        g_idx = GroupIndex(data=sequential.repeat(len(output_partition_sizes), 1), **loader)
        g_idx.by_rows = by_rows
        for name, parameter in (*parameters.items(), ("g_idx", g_idx)):
            layer.register_parameter(name, parameter)
        forward = get_current_vllm_config().compilation_config.static_forward_context
        forward[_key(self.prefix)] = layer

    def _splits_by_rows(self, rows: int) -> bool:
        """Return whether so many rows of a rank are whole groups and whole words."""
        packing = self.packing
        groups = packing.group_size == -1 or rows % packing.group_size == 0
        return not packing.desc_act and groups and rows * packing.bits % 32 == 0

    def _check(self, rows: int, columns: int) -> None:
        try:
            expected_tensors(rows, columns, self.packing.bits, self.packing.group_size)
        except FormatError as error:
            raise FormatError(f"{self.prefix} of one rank: {error.tensor}", error.expected, error.found) from None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn what was read into our layers, and let go of it.

        Raises:
            FormatError: scales that are not finite, groups that do not exist, or an act-order that the config denies.
        """
        if hasattr(layer, "ropewalk"):
            return
        tensors = {name: getattr(layer, name).data for name in PARTS}
        device = tensors["qweight"].device
        made, start = [], 0
        for i, columns in enumerate(self._sizes):
            words = columns * self.packing.bits // 32
            first = start * self.packing.bits // 32
            parts = {
                "qweight": tensors["qweight"][:, start : start + columns].contiguous(),
                "scales": tensors["scales"][:, start : start + columns].contiguous(),
                "qzeros": tensors["qzeros"][:, first : first + words].contiguous(),
                "g_idx": self._g_idx(tensors["g_idx"][i]),
            }
            made.append(packed_layer(self.packing, self._rows, parts, device, self.prefix))
            start += columns
        for name in PARTS:
            delattr(layer, name)
        # vLLM's LoRA looks here for the device.
        layer.register_parameter("qweight", nn.Parameter(torch.empty(0, device=device), requires_grad=False))
        around = getattr(self, "_around", None)
        layer.ropewalk = PackedWeight(made, *(around or ()))

    def _g_idx(self, g_idx: Tensor) -> Tensor:
        """Return a rank's g_idx with its groups counted from 0."""
        if self._around is None and not self.packing.desc_act and len(g_idx):
            g_idx = g_idx - g_idx[0]
            if not is_sequential(g_idx, self.packing.group_size):
                expected = "groups one after the other, as desc_act false says"
                raise FormatError(f"{self.prefix}.g_idx", expected, "rows in another order")
        return g_idx.contiguous()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W + bias, [..., N], for x [..., K]."""
        if torch.compiler.is_compiling():
            # By name: what a graph is, is the same then for all checkpoints of a config, and vLLM keeps graphs.
            y: Tensor = torch.ops.vllm.ropewalk_linear(x, _key(self.prefix), layer.ropewalk.columns)
        else:
            y = layer.ropewalk(x)
        return y if bias is None else y + bias


def _load_head(layer: Any) -> Callable[[Any, Tensor], None]:
    """Return what loads a packed output embedding: this rank's words of the vocabulary, and nothing for those that
    vLLM adds to make the number of them even.
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


class _WholeZeros(PackedvLLMParameter):
    """Zero points of the one group that all ranks of a row-parallel layer have."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._assert_and_load(loaded_weight)


def packed_layer(
    packing: Packing, rows: int, parts: dict[str, Tensor], device: torch.device, prefix: str
) -> QuantLinear:
    """Return a layer that is filled with the tensors of a checkpoint, of which nothing is kept.

    Raises:
        FormatError: values that cannot be.
    """
    check_values(parts, prefix=f"{prefix}.")
    columns = parts["scales"].shape[1]
    layer = QuantLinear(
        packing.bits, packing.group_size, rows, columns, False, checkpoint_format=packing.checkpoint_format, device="meta"
    )
    assert parts["scales"].shape[0] == group_count(rows, packing.group_size)
    layer.fill(parts, device)
    return layer.requires_grad_(False)


def _key(prefix: str) -> str:
    return f"{prefix}.ropewalk"


def _linear(x: Tensor, name: str, columns: int) -> Tensor:
    layer = get_forward_context().no_compile_layers[name]
    y: Tensor = layer.ropewalk(x)
    return y


def _linear_fake(x: Tensor, name: str, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


direct_register_custom_op(op_name="ropewalk_linear", op_func=_linear, fake_impl=_linear_fake)
