"""PackedExperts: the experts of a mixture, each packed by itself, computed together.

transformers keeps the experts of a layer in two parameters, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]; a
GPTQ checkpoint has three packed layers for each expert, each with an act-order of its own. Here they stay three
layers with the checkpoint's names, `3.w1` or `3.gate_proj`, so that saving writes them back; their tensors are views of
stacks over all experts, which one operator multiplies with: no loop, and on a GPU no waiting for the routing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ropewalk.gptq.ops_experts  # noqa: F401  registers ropewalk::packed_experts
from ropewalk.gptq import cpu_layout
from ropewalk.loader.quant_linear import QuantLinear

# What the layers of an expert are called in checkpoints: (gate, up, down).
NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
# Classes of transformers that compute down(act(gate(x)) * up(x)) for each expert, and nothing else.
CLASSES = frozenset({"MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts", "OlmoeExperts"})


class Stack:
    """One layer of all experts, as the operators take it.

    Args:
        layers: of the experts in turn, filled, of the same sizes and packing. Their tensors become views of the stack.
    """

    def __init__(self, layers: Sequence[QuantLinear]):
        first = layers[0]
        self.layout = first._layout
        self.bits, self.group_size = first.bits, first.group_size
        self.out_features = first.out_features
        self.words = _stacked(layers, "qweight")
        self.scales = _stacked(layers, "scales")
        self.zeros = _stacked_or_none([layer._zeros for layer in layers], self._symmetric)
        self.order = _stacked_or_none([layer._order for layer in layers], lambda: self._unmoved(first))
        self.bias = _stacked_or_none([layer.bias for layer in layers], self._no_bias)
        self._first = first

    def _symmetric(self) -> Tensor:
        return torch.full(self.scales.shape[1:], 1 << (self.bits - 1), dtype=torch.uint8, device=self.scales.device)

    def _no_bias(self) -> Tensor:
        return torch.zeros(self.out_features, dtype=torch.float16, device=self.words.device)

    def _unmoved(self, layer: QuantLinear) -> Tensor:
        """Return the order of a layer whose rows stay where they are."""
        rows = layer.infeatures
        if self.layout == "cpu":
            rows = cpu_layout.block_count(layer.infeatures, layer.group_size) * cpu_layout.BLOCK
        return torch.arange(rows, dtype=torch.int32, device=self.words.device)

    def multiply(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None) -> Tensor:
        """Return [T, top_k, N], or [T, N] with routing weights, for x [T, K] or [T, top_k, K]."""
        if self.layout == "gpu":
            return torch.ops.ropewalk.packed_experts(
                x,
                self.words,
                self.scales,
                self.zeros,
                self.order,
                self.bias,
                expert_ids,
                routing_weights,
                self.bits,
                self.group_size,
            )
        return torch.ops.ropewalk.cpu_experts(
            x,
            self.words,
            self.scales,
            self.zeros,
            self.order,
            self.bias,
            expert_ids,
            routing_weights,
            self.bits,
            self.group_size,
            self.out_features,
            self._first.computes_exactly,
        )


class _Expert(nn.Module):
    """The layers of one expert; it tells when one of them is replaced, as by an adapter."""

    def __init__(self, layers: Mapping[str, QuantLinear], replaced: Callable[[], None]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._replaced = replaced

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self._replaced()


class PackedExperts(nn.Module):
    """Stands in for the experts module of a mixture in transformers.

    Args:
        experts: for each expert, name -> layer; the names are one of NAMES.
        act_fn: the module's activation.
    """

    def __init__(self, experts: Sequence[Mapping[str, QuantLinear]], act_fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.num_experts = len(experts)
        self.act_fn = act_fn
        self.names = next(names for names in NAMES if set(names) == set(experts[0]))
        for number, layers in enumerate(experts):
            self.add_module(str(number), _Expert({name: layers[name] for name in self.names}, self._unstack))
        self._stacks: tuple[Stack, Stack, Stack] | None = None
        self._stackable = True
        self.register_load_state_dict_post_hook(PackedExperts._unstack)

    def _unstack(self, *_: Any) -> None:
        """Forget the stacks; the next call makes them anew, if that can still be done."""
        self._stacks, self._stackable = None, True

    def layers(self, name: str) -> list[Any]:
        """Return the layers of that name, in the order of the experts."""
        return [getattr(getattr(self, str(number)), name) for number in range(self.num_experts)]

    def stack(self) -> bool:
        """Put the tensors of the layers into stacks, once all are filled.

        Returns:
            whether that can be done: not where an adapter stands in place of a layer, or where no kernel takes them.
        """
        self._stacks, self._stackable = None, False
        layers = [self.layers(name) for name in self.names]
        every = [layer for of_name in layers for layer in of_name]
        if not all(type(layer) is QuantLinear and layer._ready for layer in every):
            return False
        if any(layer._layout not in ("cpu", "gpu") for layer in every):
            return False
        if any(len({_kind(layer) for layer in of_name}) > 1 for of_name in layers):
            return False
        gate, up, down = (Stack(of_name) for of_name in layers)
        self._stacks = gate, up, down
        return True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [T, H] for tokens [T, H], the experts of each [T, top_k], and their weights [T, top_k]."""
        if self._stacks is None and self._stackable:
            self.stack()
        stacks = self._stacks
        needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        if stacks is None or (needs_grad and stacks[0].layout == "cpu"):
            return self._one_by_one(hidden_states, top_k_index, top_k_weights)
        gate, up, down = stacks
        inner = self.act_fn(gate.multiply(hidden_states, top_k_index, None))
        return down.multiply(inner * up.multiply(hidden_states, top_k_index, None), top_k_index, top_k_weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._unstack()
        return super()._apply(fn, recurse)

    def _one_by_one(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Compute expert by expert; this differentiates, and calls whatever layers are there."""
        gate, up, down = (self.layers(name) for name in self.names)
        total = torch.zeros_like(x)
        for expert in expert_ids.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, place = torch.where(expert_ids == expert)
            rows = x[token]
            y = down[expert](self.act_fn(gate[expert](rows)) * up[expert](rows))
            total = total.index_add(0, token, (y * weights[token, place, None]).to(total.dtype))
        return total

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"{self.num_experts} experts of {', '.join(self.names)}"


def _kind(layer: QuantLinear) -> tuple[Any, ...]:
    """Return what the layers of a stack must agree in."""
    return layer._layout, layer.bits, layer.group_size, layer.infeatures, layer.outfeatures, layer.scales.dtype


def _stacked(layers: Sequence[QuantLinear], name: str) -> Tensor:
    """Put a buffer of the layers into one tensor, and views of it into the layers, one after the other."""
    first = getattr(layers[0], name)
    whole = first.new_empty((len(layers), *first.shape))
    for layer, place in zip(layers, whole, strict=True):
        place.copy_(getattr(layer, name))
        setattr(layer, name, place)
    return whole


def _stacked_or_none(tensors: Sequence[Tensor | None], default: Callable[[], Tensor]) -> Tensor | None:
    dtype = next((tensor.dtype for tensor in tensors if tensor is not None), None)
    if dtype is None:
        return None
    return torch.stack([(default() if tensor is None else tensor).to(dtype) for tensor in tensors])
