"""PackedExperts: the experts of a mixture, each packed by itself, computed together.

transformers keeps the experts of a layer in two parameters, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]; a
GPTQ checkpoint has three packed layers for each expert, each with an act-order of its own. Here they stay three
layers with the checkpoint's names, `3.w1` or `3.gate_proj`, so that saving writes them back; their tensors are views of
stacks over all experts, which one operator multiplies with: no loop, and on a GPU no waiting for the routing. Gate and
up are one stack where every expert has them in one order, and one call then computes act(gate) * up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ropewalk.gptq.ops_experts  # noqa: F401  registers ropewalk::packed_experts
from ropewalk.gptq import cpu_layout
from ropewalk.loader.quant_linear import QuantLinear

# What the layers of an expert are called in checkpoints: (gate, up, down).
NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
# Activations that the kernels of gate and up apply.
_SILU = ("SiLU", "SiLUActivation")
# Classes of transformers that compute down(act(gate(x)) * up(x)) for each expert, and nothing else.
CLASSES = frozenset({"MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts", "OlmoeExperts"})


class Stack:
    """One layer of all experts, or their gates and ups together, as the operators take it.

    Args:
        gates: a layer of the experts in turn, filled, of the same sizes and packing. Their tensors become views of
            the stack.
        ups: their counterparts, where the layers are gates, each in the order of its gate (`share_orders`).
    """

    def __init__(self, gates: Sequence[QuantLinear], ups: Sequence[QuantLinear] = ()):
        first = gates[0]
        self.gate_up = bool(ups)
        # An expert's gate and up follow one another.
        layers = [layer for pair in zip(gates, ups, strict=True) for layer in pair] if ups else gates
        self.layout = first._layout
        self.bits, self.group_size = first.bits, first.group_size
        self.out_features = first.out_features * (2 if ups else 1)
        self.words = self._by_expert(_stacked(layers, "qweight"))
        self.scales = self._by_expert(_stacked(layers, "scales"))
        symmetric = partial(torch.full, first.scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)
        no_bias = partial(torch.zeros, first.out_features, dtype=torch.float16)
        device = self.words.device
        self.zeros = self._by_expert(_stacked_or_none([layer._zeros for layer in layers], symmetric, device))
        self.order = _stacked_or_none([layer._order for layer in gates], partial(self._unmoved, first), device)
        self.bias = self._by_expert(_stacked_or_none([layer.bias for layer in layers], no_bias, device))
        self._first = first

    def _by_expert(self, whole: Any) -> Any:
        """Return a stack of layers as one of experts: [E, 2, ...] on a GPU, and on the CPU, whose tiles of up follow
        those of gate, [E, 2 * ..., ...].
        """
        if whole is None or not self.gate_up:
            return whole
        pairs = whole.unflatten(0, (-1, 2))
        return pairs if self.layout == "gpu" else pairs.flatten(1, 2)

    def _unmoved(self, layer: QuantLinear, device: torch.device) -> Tensor:
        """Return the order of a layer whose rows stay where they are."""
        rows = layer.infeatures
        if self.layout == "cpu":
            rows = cpu_layout.block_count(layer.infeatures, layer.group_size) * cpu_layout.BLOCK
        return torch.arange(rows, dtype=torch.int32, device=device)

    def multiply(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None) -> Tensor:
        """Return [T, top_k, N], or [T, N] with routing weights, for x [T, K] or [T, top_k, K]; of gates and ups
        silu(gate) * up.
        """
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
                self.gate_up,
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
            self.gate_up,
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
        # Of gate, up and down, or of the first two together, and down.
        self._stacks: tuple[Stack, ...] | None = None
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
        gate, up, down = layers
        if type(self.act_fn).__name__ in _SILU and share_orders(gate, up):
            self._stacks = Stack(gate, up), Stack(down)
        else:
            self._stacks = Stack(gate), Stack(up), Stack(down)
        return True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [T, H] for tokens [T, H], the experts of each [T, top_k], and their weights [T, top_k]."""
        if self._stacks is None and self._stackable:
            self.stack()
        stacks = self._stacks
        needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        if stacks is None or (needs_grad and stacks[0].layout == "cpu"):
            return self._one_by_one(hidden_states, top_k_index, top_k_weights)
        *first, down = stacks
        inner = first[0].multiply(hidden_states, top_k_index, None)
        if not first[0].gate_up:
            inner = self.act_fn(inner) * first[1].multiply(hidden_states, top_k_index, None)
        return down.multiply(inner, top_k_index, top_k_weights)

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


def share_orders(gates: Sequence[QuantLinear], ups: Sequence[QuantLinear]) -> bool:
    """Return whether the gate and the up of each expert are packed alike and have their rows in one order, as those do
    that were quantized on the same inputs.
    """
    if _kind(gates[0]) != _kind(ups[0]):
        return False
    if gates[0]._layout == "cpu" and gates[0].outfeatures % cpu_layout.COLUMNS:
        return False  # a tile would hold columns of both
    for gate, up in zip(gates, ups, strict=True):
        if gate.computes_exactly != up.computes_exactly or (gate._order is None) != (up._order is None):
            return False
        if gate._order is not None and up._order is not None and not torch.equal(gate._order, up._order):
            return False
    return True


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


def _stacked_or_none(
    tensors: Sequence[Tensor | None], default: Callable[..., Tensor], device: torch.device
) -> Tensor | None:
    dtype = next((tensor.dtype for tensor in tensors if tensor is not None), None)
    if dtype is None:
        return None
    return torch.stack([(default(device=device) if tensor is None else tensor).to(dtype) for tensor in tensors])
