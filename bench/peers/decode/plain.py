"""transformers' own models with a packed model's weights: what is compared with, and what results are checked against.

Our loader has no part in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.weight import Weight
from ropewalk.bench.shapes import Mixtral


class Unpacking(nn.Module):
    """A linear layer that unpacks its weight at every call, in float32: slow, small and plain."""

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Return x W."""
        return linear(x, self.weight.dense().t())


class UnpackingExperts(nn.Module):
    """The experts of a mixture, each of whose weights is unpacked at every call, in float32.

    Args:
        experts: (gate, up, down) of each.
        act_fn: the activation.
    """

    def __init__(self, experts: list[tuple[Unpacking, Unpacking, Unpacking]], act_fn: Any):
        super().__init__()
        self.experts = experts
        self.act_fn = act_fn

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Return [T, H] for tokens [T, H], the experts of each [T, top_k], and their weights [T, top_k]."""
        total = torch.zeros_like(x)
        for number, (gate, up, down) in enumerate(self.experts):
            token, place = torch.where(expert_ids == number)
            if len(token):
                rows = x[token]
                y = down(self.act_fn(gate(rows)) * up(rows)) * weights[token, place, None]
                total.index_add_(0, token, y.to(total.dtype))
        return total


def plain_model(model: PackedModel, dtype: torch.dtype, device: torch.device, *, unpack: bool = True) -> nn.Module:
    """Return transformers' own model with a packed model's weights.

    Args:
        unpack: whether to unpack the weights now, or at every call.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {key: value for key, value in model.checkpoint.config.items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype)
    if hasattr(plain.base_model, "rotary_emb"):
        # Its frequencies are computed and not loaded, so it must not be one of nowhere.
        plain.base_model.rotary_emb = type(plain.base_model.rotary_emb)(plain.config).to(device)
    shape, read = model.shape, model.checkpoint.read
    tensors = {}
    for name in (*shape.norms(), *shape.routers(), *shape.embeddings):
        tensors[_own_name(name)] = read(name).to(device, dtype)
    if shape.head == shape.embedding:
        tensors["lm_head.weight"] = tensors[shape.embedding]
    for layer, _, _ in shape.linears():
        if ".experts." in layer:
            continue
        weight = model.weight(layer)
        if unpack:
            tensors[f"{layer}.weight"] = _unpacked(weight, dtype, device)
        else:
            parent, _, name = layer.rpartition(".")
            setattr(plain.get_submodule(parent), name, Unpacking(weight.to(device)))
    if isinstance(shape, Mixtral):
        for i in range(shape.layers):
            tensors |= _experts(model, shape, i, plain, dtype, device, unpack)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


def _own_name(name: str) -> str:
    return name.replace(".block_sparse_moe.", ".mlp.")


def _unpacked(weight: Weight, dtype: torch.dtype, device: torch.device) -> Tensor:
    return weight.dense().t().to(device, dtype).contiguous()


def _experts(
    model: PackedModel, shape: Mixtral, layer: int, plain: Any, dtype: torch.dtype, device: torch.device, unpack: bool
) -> dict[str, Tensor]:
    """Give a layer its experts; return the tensors that are still to be loaded."""
    names = [f"model.layers.{layer}.block_sparse_moe.experts.{e}" for e in range(shape.experts)]
    mlp = f"model.layers.{layer}.mlp"
    if not unpack:
        experts = [
            tuple(Unpacking(model.weight(f"{name}.{part}").to(device)) for part in ("w1", "w3", "w2")) for name in names
        ]
        block = plain.get_submodule(mlp)
        block.experts = UnpackingExperts(experts, block.experts.act_fn)  # type: ignore[arg-type]
        return {}
    both = torch.empty(shape.experts, 2 * shape.ffn, shape.hidden, dtype=dtype, device=device)
    down = torch.empty(shape.experts, shape.hidden, shape.ffn, dtype=dtype, device=device)
    for e, name in enumerate(names):
        both[e, : shape.ffn] = _unpacked(model.weight(f"{name}.w1"), dtype, device)
        both[e, shape.ffn :] = _unpacked(model.weight(f"{name}.w3"), dtype, device)
        down[e] = _unpacked(model.weight(f"{name}.w2"), dtype, device)
    return {f"{mlp}.experts.gate_up_proj": both, f"{mlp}.experts.down_proj": down}
