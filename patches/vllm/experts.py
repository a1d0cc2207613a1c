"""Packed experts in vLLM: whole ones where experts are spread over the ranks, or a share of each.

Under tensor parallelism a rank keeps some of the inner channels of every expert: those columns of gate and up, and
those rows of down. Which, is its own choice, since the sum over the ranks has them all; so with act-order it takes them
in the order in which down's rows are sorted. Its groups are whole then, and its rows need no order any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from ropewalk.errors import FormatError, UsageError
from ropewalk.gptq.format import expected_tensors, sequential_g_idx
from ropewalk.gptq.layout import row_order
from ropewalk.loader.experts import PackedExperts
from ropewalk.patches.vllm.config import Packing
from ropewalk.patches.vllm.linear import packed_layer
from ropewalk.patches.vllm.parameters import PARTS, group_size_of_share, groups_of_share, take_columns, take_rows

_ACTIVATIONS: dict[MoEActivation, Callable[[], nn.Module]] = {
    MoEActivation.SILU: nn.SiLU,
    MoEActivation.GELU: nn.GELU,
    MoEActivation.GELU_TANH: lambda: nn.GELU(approximate="tanh"),
}
_GATE_UP = {"w1": 0, "w3": 1}


class RopewalkExpertsMethod(FusedMoEMethodBase):
    """The experts of a layer of vLLM, computed with packed weights.

    Args:
        packing: of their layers.
        moe: vLLM's description of the layer.
        prefix: the layer's name.

    Raises:
        UsageError: experts that compute something else than down(act(gate(x)) * up(x)).
    """

    def __init__(self, packing: Packing, moe: Any, prefix: str):
        super().__init__(moe)
        self.packing, self.prefix = packing, prefix
        if moe.activation not in _ACTIVATIONS or moe.has_bias:
            found = "a bias" if moe.has_bias else moe.activation.value
            known = ", ".join(each.value for each in _ACTIVATIONS)
            raise UsageError(f"{prefix}: expected packed experts without bias and with {known}, found {found}")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that vLLM reads the checkpoint into, each with a loader of ours.

        Raises:
            FormatError: a share of a rank that has too small parts of groups, or does not fill whole words.
        """
        inner, packing = intermediate_size_per_partition, self.packing
        if layer.apply_router_weight_on_input:
            raise UsageError(f"{self.prefix}: expected routing weights on the output of experts, found on the input")
        self._ranks, self._rank = self.moe.moe_parallel_config.tp_size, self.moe.moe_parallel_config.tp_rank
        group_size = group_size_of_share(packing.group_size, inner) if self._ranks > 1 else packing.group_size
        if group_size is None:
            expected = f"inner channels of a rank that are whole parts of groups of {packing.group_size}"
            raise FormatError(f"{self.prefix} (of {inner * self._ranks} on {self._ranks} ranks)", expected, inner)
        self._of_down = replace(packing, group_size=group_size)
        self._sizes = {"w1": (hidden_size, inner), "w3": (hidden_size, inner), "w2": (inner, hidden_size)}
        # What cannot be cut before the order of its expert's rows is known.
        self._waiting: dict[int, list[tuple[str, str, Tensor]]] = {}
        self._orders: dict[int, Tensor | None] = {}
        for stem, count in (("w13", 2), ("w2", 1)):
            rows, columns = self._sizes["w1" if stem == "w13" else "w2"]
            packing = self._packing_of(stem)
            try:
                shapes = expected_tensors(rows, columns, packing.bits, packing.group_size)
            except FormatError as error:
                name = f"{self.prefix}.{stem} of one rank: {error.tensor}"
                raise FormatError(name, error.expected, error.found) from None
            for part in PARTS:
                shape, dtype = shapes[part]
                data = torch.empty((num_experts, count, *shape), dtype=packing.scales if part == "scales" else dtype)
                if part == "g_idx":
                    data.copy_(sequential_g_idx(rows, packing.group_size))
                parameter: Any = nn.Parameter(data, requires_grad=False)
                parameter.weight_loader = self._loader(layer, part)
                layer.register_parameter(f"{stem}_{part}", parameter)

    def _packing_of(self, stem: str) -> Packing:
        return self._of_down if stem == "w2" else self.packing

    def _loader(self, layer: Any, part: str) -> Callable[..., bool | None]:
        """Return what vLLM calls with a tensor of an expert."""

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if expert == -1:
                return False if return_success else None
            self._take(layer, expert, shard_id, part, loaded_weight)
            return True if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def _take(self, layer: Any, expert: int, shard: str, part: str, tensor: Tensor) -> None:
        """Put a tensor of the checkpoint where it belongs, or keep it until that can be told.

        Raises:
            FormatError: an act-order that the config denies.
        """
        if self._ranks == 1:
            return self._put(layer, expert, shard, part, tensor)
        if shard == "w2" and part == "g_idx":
            order = self._orders[expert] = row_order(tensor.cpu(), self.packing.group_size)
            if order is not None and not self.packing.desc_act:  # tensors may have been cut already
                expected = "groups one after the other (desc_act is false), or desc_act true in the config"
                raise FormatError(f"{self.prefix}.{expert}.w2.g_idx", expected, "rows in another order")
            for waiting in self._waiting.pop(expert, []):
                self._put(layer, expert, waiting[0], waiting[1], self._share(expert, *waiting))
            return None
        if self.packing.desc_act and expert not in self._orders:
            self._waiting.setdefault(expert, []).append((shard, part, tensor))
            return None
        return self._put(layer, expert, shard, part, self._share(expert, shard, part, tensor))

    def _share(self, expert: int, shard: str, part: str, tensor: Tensor) -> Tensor:
        """Return this rank's share of a tensor."""
        bits, inner = self.packing.bits, self._sizes["w1"][1]
        start = self._rank * inner
        order = self._orders.get(expert)
        if shard == "w2":
            if part in ("scales", "qzeros"):
                groups = groups_of_share(self.packing.group_size, inner, start)
                return tensor.index_select(0, groups.to(tensor.device))
            if order is None:
                return tensor[start * bits // 32 : (start + inner) * bits // 32]
            return take_rows(tensor, order[start : start + inner], bits)
        if part == "g_idx":
            return tensor
        if order is None:
            each = bits if part == "qzeros" else 32  # of 32 bits
            return tensor[:, start * each // 32 : (start + inner) * each // 32]
        return take_columns(tensor, order[start : start + inner], bits if part == "qzeros" else None)

    def _put(self, layer: Any, expert: int, shard: str, part: str, tensor: Tensor) -> None:
        stem = "w2" if shard == "w2" else "w13"
        place = getattr(layer, f"{stem}_{part}").data[expert, _GATE_UP.get(shard, 0)]
        if place.shape != tensor.shape:
            name = f"{self.prefix}.{expert}.{shard}.{part}"
            raise FormatError(name, f"shape {list(place.shape)}", list(tensor.shape))
        place.copy_(tensor)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn what was read into our experts, and let go of it.

        Raises:
            FormatError: values that cannot be, or an expert whose act-order is missing.
        """
        if hasattr(layer, "ropewalk"):
            return
        if self._waiting:
            expert = min(self._waiting)
            raise FormatError(f"{self.prefix}.{expert}.w2.g_idx", "a tensor of this name (desc_act is true)", "none")
        tensors = {name: getattr(layer, name).data for stem in ("w13", "w2") for name in _names(stem)}
        device = tensors["w2_qweight"].device
        experts = []
        for expert in range(tensors["w2_qweight"].shape[0]):
            layers = {}
            for shard, (rows, _) in self._sizes.items():
                stem = "w2" if shard == "w2" else "w13"
                parts = {part: tensors[f"{stem}_{part}"][expert, _GATE_UP.get(shard, 0)] for part in PARTS}
                name = f"{self.prefix}.{expert}.{shard}"
                layers[shard] = packed_layer(self._packing_of(stem), rows, parts, device, name)
            experts.append(layers)
        for name in tensors:
            delattr(layer, name)
        del tensors
        layer.ropewalk = PackedExperts(experts, _ACTIVATIONS[self.moe.activation]())
        layer.ropewalk.stack()

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return None: none of vLLM's kernels is called."""
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of each token's experts, [tokens, hidden]; experts of other ranks give zeros."""
        if layer._expert_map is not None:
            topk_ids = layer._expert_map[topk_ids.long()]
        y: Tensor = layer.ropewalk(x, topk_ids, topk_weights)
        return y


def _names(stem: str) -> list[str]:
    return [f"{stem}_{part}" for part in PARTS]
