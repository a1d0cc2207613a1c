"""Packed linear layers in vLLM: its parameters take what a rank needs of a checkpoint, our layers compute with it.

Column-parallel layers (q, k and v; gate and up) keep some columns of the weight with all their rows, whatever the
order of these. A row-parallel layer (o, down) keeps some rows, and the scales of their groups. With act-order that does
not do: the rows of a rank are a part of every group, in no even numbers, and no kernel of ours takes such a weight.

Down's rows can be shared out in their sorted order, in whole groups, if gate's and up's columns are shared out in the
same; between them is but an activation of each channel by itself. Nothing is left to be put in order then.

Of o, whose input is attention's, a rank keeps some of the columns as well: it gathers the input, multiplies, and puts
zeros where the columns of the others are, which vLLM's own sum over the ranks then fills. Memory is the same; the price
is the gathering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.utils.torch_utils import direct_register_custom_op

from ropewalk.errors import FormatError
from ropewalk.gptq.format import check_values, expected_tensors, sequential_g_idx
from ropewalk.loader.merged import Merged
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.patches.vllm.config import Packing
from ropewalk.patches.vllm.parameters import (
    PARTS,
    group_size_of_share,
    groups_of_share,
    head_loader,
    make_parameters,
)


@dataclass(frozen=True)
class Share:
    """What one rank has of a layer.

    Attributes:
        rows: K.
        sizes: N, of each of the layers that vLLM takes as one.
        group_size: rows that share a scale here.
        start: the first of the rows, where other ranks have other ones; else None.
        around: of a row-parallel layer whose columns are split, how many columns are to the left and to the right of
            these; else None.
    """

    rows: int
    sizes: tuple[int, ...]
    group_size: int
    start: int | None = None
    around: tuple[int, int] | None = None

    @classmethod
    def of(cls, packing: Packing, rows: int, sizes: Sequence[int], all_rows: int, rank: int, prefix: str) -> Share:
        """Return the share of a rank that vLLM would give `rows` of `all_rows` rows, and columns of `sizes`.

        Raises:
            FormatError: one that does not fill whole words.
        """
        share = cls(rows, tuple(sizes), packing.group_size)
        if rows != all_rows:
            group_size = group_size_of_share(packing.group_size, rows)
            if group_size is not None and not packing.desc_act and rows * packing.bits % 32 == 0:
                share = cls(rows, tuple(sizes), group_size, start=rank * rows)
            else:
                columns, ranks = sum(sizes), all_rows // rows
                if columns % ranks:
                    raise FormatError(prefix, f"output features that {ranks} ranks can share", columns)
                own = columns // ranks
                share = cls(all_rows, (own,), packing.group_size, around=(rank * own, (ranks - rank - 1) * own))
        for size in share.sizes:
            try:
                expected_tensors(share.rows, size, packing.bits, share.group_size)
            except FormatError as error:
                raise FormatError(f"{prefix} of one rank: {error.tensor}", error.expected, error.found) from None
        return share

    def sequential(self, group_size: int) -> Tensor:
        """Return int32 [rows], the groups of these rows in a checkpoint that does not move them."""
        rows = (self.start or 0) + torch.arange(self.rows, dtype=torch.int32)
        return torch.zeros_like(rows) if group_size == -1 else rows // group_size


class PackedWeight(nn.Module):
    """The packed layers that vLLM takes as one, on one rank.

    Args:
        layers: ready, in the order of their columns.
        around: as in `Share`.
    """

    def __init__(self, layers: Sequence[QuantLinear], around: tuple[int, int] | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.columns = sum(layer.outfeatures for layer in layers) + sum(around or ())
        merged = Merged(layers) if len(layers) > 1 else None
        # Now, before vLLM looks how much memory is left.
        self._merged = merged if merged is not None and merged.is_ready() else None
        self._around = around

    def forward(self, x: Tensor) -> Tensor:
        """Return the products side by side, [tokens, columns], for x [tokens, K], or what of K the rank has."""
        if self._around is not None:
            x = tensor_model_parallel_all_gather(x)
        if self._merged is not None:
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
        order: in which down's rows are sorted, where this is a down, or the gate and up before one.
    """

    def __init__(self, packing: Packing, prefix: str, order: Tensor | None = None):
        self.packing = packing
        self.prefix = prefix
        self.order = order

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that vLLM reads the checkpoint into.

        Raises:
            FormatError: a share of this rank that does not fill whole words.
        """
        rows, sizes, rank = input_size_per_partition, output_partition_sizes, getattr(layer, "tp_rank", 0)
        config = get_current_vllm_config()
        between = rows if rows != input_size else sizes[0]  # channels of this rank between gate and up, and down
        self.order = self.order if getattr(layer, "tp_size", 1) > 1 and self._can_be_shared(between) else None
        if config.lora_config is not None:
            self.order = None  # an adapter's factors would be shared out in another order than the channels
        packing = self.packing
        if rows != input_size and self.order is not None:
            packing = replace(packing, desc_act=False)
        self.share = share = Share.of(packing, rows, sizes, input_size, rank, self.prefix)
        self.packing_here = replace(packing, group_size=share.group_size)
        made = make_parameters(
            self.packing_here,
            share.rows,
            share.sizes,
            "rows" if share.around is None else "columns",
            head_loader(layer) if isinstance(layer, ParallelLMHead) else extra_weight_attrs["weight_loader"],
            g_idx=share.sequential(packing.group_size),
            order=self.order,
            groups=None if share.start is None else groups_of_share(packing.group_size, share.rows, share.start),
        )
        for name, parameter in made.items():
            layer.register_parameter(name, parameter)
        config.compilation_config.static_forward_context[_key(self.prefix)] = layer

    def _can_be_shared(self, rows: int) -> bool:
        """Return whether a rank can have so many rows, sorted, from any multiple of them on."""
        return group_size_of_share(self.packing.group_size, rows) is not None and rows * self.packing.bits % 32 == 0

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn what was read into our layers, and let go of it.

        Raises:
            FormatError: scales that are not finite, groups that do not exist, or an act-order that the config denies.
        """
        if hasattr(layer, "ropewalk"):
            return
        tensors = {name: getattr(layer, name).data for name in PARTS}
        bits, device = self.packing.bits, tensors["qweight"].device
        layers, start = [], 0
        for size, g_idx in zip(self.share.sizes, tensors["g_idx"], strict=True):
            end = start + size
            parts = {
                "qweight": tensors["qweight"][:, start:end].contiguous(),
                "scales": tensors["scales"][:, start:end].contiguous(),
                "qzeros": tensors["qzeros"][:, start * bits // 32 : end * bits // 32].contiguous(),
                "g_idx": self._in_share(g_idx).contiguous(),
            }
            layers.append(packed_layer(self.packing_here, self.share.rows, parts, device, self.prefix))
            start = end
        for name in PARTS:
            delattr(layer, name)
        # vLLM's LoRA looks here for the device.
        layer.register_parameter("qweight", nn.Parameter(torch.empty(0, device=device), requires_grad=False))
        layer.ropewalk = PackedWeight(layers, self.share.around)

    def _in_share(self, g_idx: Tensor) -> Tensor:
        """Return g_idx with the groups of this rank's scales."""
        if self.share.start is None:
            return g_idx
        if self.order is None and not torch.equal(
            g_idx, self.share.sequential(self.packing.group_size).to(g_idx.device)
        ):
            expected = "groups one after the other (desc_act is false), or desc_act true in the config"
            raise FormatError(f"{self.prefix}.g_idx", expected, "rows in another order")
        return sequential_g_idx(self.share.rows, self.share.group_size).to(g_idx.device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W + bias, [..., N], for x [..., K]."""
        if torch.compiler.is_compiling():
            # By name: what a graph is, is the same then for all checkpoints of a config, and vLLM keeps graphs.
            y: Tensor = torch.ops.vllm.ropewalk_linear(x, _key(self.prefix), layer.ropewalk.columns)
        else:
            y = layer.ropewalk(x)
        return y if bias is None else y + bias


def packed_layer(
    packing: Packing, rows: int, parts: Mapping[str, Tensor], device: torch.device, prefix: str
) -> QuantLinear:
    """Return a layer that is filled with the tensors of a checkpoint, of which nothing is kept.

    Raises:
        FormatError: values that cannot be.
    """
    check_values(parts, prefix=f"{prefix}.")
    columns = parts["scales"].shape[1]
    layer = QuantLinear(
        *(packing.bits, packing.group_size, rows, columns, False),
        checkpoint_format=packing.checkpoint_format,
        device="meta",
    )
    layer.fill(parts, device)
    return layer


def _key(prefix: str) -> str:
    return f"{prefix}.ropewalk"


def _linear(x: Tensor, name: str, columns: int) -> Tensor:
    y: Tensor = get_forward_context().no_compile_layers[name].ropewalk(x)
    return y


def _linear_fake(x: Tensor, name: str, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


direct_register_custom_op(op_name="ropewalk_linear", op_func=_linear, fake_impl=_linear_fake)
