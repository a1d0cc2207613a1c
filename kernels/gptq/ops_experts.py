"""The operator `ropewalk::packed_experts`: a batch of routed tokens times a packed stack of experts.

On a GPU it runs the kernels of triton_grouped.py: no size depends on the routing and nothing waits for the device, so
that CUDA graphs and `fullgraph` take it; elsewhere plain torch (experts.py). A layer of Mixtral is

    inner = packed_experts(x, ..., expert_ids, None, ..., gate_up=True)    x [T, hidden] -> [T, top_k, ffn]
    y = packed_experts(inner, ..., expert_ids, routing_weights, ...)        [T, top_k, ffn] -> [T, hidden]

It differentiates with respect to x and to the routing weights, so that LoRA trains around packed experts; the
gradient reads the routing on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.errors import FormatError
from ropewalk.gptq import experts as plain
from ropewalk.gptq.layout import word_rows
from ropewalk.gptq.ops import dense_weight
from ropewalk.gptq.reference import silu_times, silu_times_grad


@torch.library.custom_op("ropewalk::packed_experts", mutates_args=())
def packed_experts(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    expert_ids: Tensor,
    routing_weights: Tensor | None,
    bits: int,
    group_size: int,
    gate_up: bool = False,
) -> Tensor:
    """Return the product of each token with each of its experts, or the sum of these by the routing weights.

    Args:
        x: [T, K], or [T, top_k, K] where a token has a row for each of its experts; float16, bfloat16 or float32.
        words: int32 [E, layout.word_rows(K, bits), N], each expert in the execution layout.
        scales: [E, G, N], any floating dtype.
        zeros: uint8 [E, G, N]; None where all are 2 ** (bits - 1).
        order: int32 [E, K], for each expert the checkpoint's row of each sorted row; None where none was moved.
        bias: [E, N] or None; no gradient is computed for it.
        expert_ids: integers [T, top_k]; those outside 0 to E - 1 give zeros.
        routing_weights: [T, top_k], any floating dtype, or None.
        bits: 2, 3, 4 or 8.
        group_size: rows to a group (`layout.supports`), -1 for one group.
        gate_up: the stack holds two weights for each expert, gate and up, whose rows are in one order: words, scales,
            zeros and bias are [E, 2, ...], and the result is silu(gate) * up, without routing weights.

    Returns:
        [T, top_k, N], or [T, N] with routing weights, in x's dtype. Two runs give the same bits.

    Raises:
        FormatError: shapes or dtypes that do not belong together.
    """
    check(x, words, scales, zeros, order, bias, expert_ids, routing_weights, bits, group_size, gate_up)
    if x.is_cuda:
        from ropewalk.gptq import triton_grouped

        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of x
            return triton_grouped.packed_experts(
                *(x, words, scales, zeros, order, bias, expert_ids, routing_weights),
                bits=bits,
                group_size=group_size,
                gate_up=gate_up,
            )

    def product(words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
        weight_of = _weight_of(x, words, scales, zeros, order, bits, group_size, x.shape[-1])
        return plain.packed_experts(x, weight_of, bias, expert_ids, words.shape[2], words.shape[0])

    if gate_up:
        return silu_times(*(product(*half) for half in plain.both_halves(words, scales, zeros, bias)))
    y = product(words, scales, zeros, bias)
    return y if routing_weights is None else plain.weighted_sum(y, expert_ids, routing_weights, words.shape[0])


@packed_experts.register_fake
def _(  # type: ignore[no-untyped-def]
    x, words, scales, zeros, order, bias, expert_ids, routing_weights, bits, group_size, gate_up=False
):
    leading = expert_ids.shape if routing_weights is None else expert_ids.shape[:1]
    return x.new_empty((*leading, words.shape[-1]))


@torch.library.custom_op("ropewalk::packed_experts_grad", mutates_args=())
def packed_experts_grad(
    grad: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    expert_ids: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return grad [T, top_k, N] times the transposed weight of each token's experts, [T, top_k, K]."""
    weight_of = _weight_of(grad, words, scales, zeros, order, bits, group_size, in_features)
    return plain.packed_experts_grad(grad, weight_of, expert_ids, in_features, words.shape[0])


@packed_experts_grad.register_fake
def _(grad, words, scales, zeros, order, expert_ids, bits, group_size, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty((*expert_ids.shape, in_features))


def check(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    expert_ids: Tensor,
    routing_weights: Tensor | None,
    bits: int,
    group_size: int,
    gate_up: bool = False,
) -> None:
    """Raise FormatError where arguments of `packed_experts` do not belong together; reads no tensor's values."""
    of_words = 4 if gate_up else 3
    if words.ndim != of_words or expert_ids.ndim != 2 or x.ndim not in (2, 3):
        shapes = f"{list(words.shape)}, {list(expert_ids.shape)} and {list(x.shape)}"
        raise FormatError("words, expert_ids and x", f"{of_words}, 2 and 2 or 3 dimensions", shapes)
    if gate_up and routing_weights is not None:
        raise FormatError("routing_weights", "none with gate and up", list(routing_weights.shape))
    each = (words.shape[0], 2) if gate_up else words.shape[:1]
    experts, columns = words.shape[0], words.shape[-1]
    tokens, in_features = x.shape[0], x.shape[-1]
    top_k = expert_ids.shape[1]
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    expected = {
        "x": (x, (tokens, in_features) if x.ndim == 2 else (tokens, top_k, in_features)),
        "words": (words, (*each, word_rows(in_features, bits), columns)),
        "scales": (scales, (*each, groups, columns)),
        "zeros": (zeros, (*each, groups, columns)),
        "order": (order, (experts, in_features)),
        "bias": (bias, (*each, columns)),
        "expert_ids": (expert_ids, (tokens, top_k)),
        "routing_weights": (routing_weights, (tokens, top_k)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise FormatError(name, list(shape), list(tensor.shape))
        if tensor.device != x.device:
            raise FormatError(name, x.device, tensor.device)
        if name not in ("x", "expert_ids", "routing_weights") and not tensor[:1].is_contiguous():
            raise FormatError(name, "contiguous experts", f"strides {tensor.stride()}")
    for name, tensor, dtype in (
        ("words", words, torch.int32),
        ("zeros", zeros, torch.uint8),
        ("order", order, torch.int32),
    ):
        if tensor is not None and tensor.dtype != dtype:
            raise FormatError(name, dtype, tensor.dtype)
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise FormatError("expert_ids", "int32 or int64", expert_ids.dtype)


def _weight_of(
    like: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> plain.WeightOf:
    """Return a function that returns the weight of an expert, [K, N] in the dtype of `like`."""

    def weight(expert: int) -> Tensor:
        return dense_weight(
            like,
            words[expert],
            scales[expert],
            None if zeros is None else zeros[expert],
            None if order is None else order[expert],
            bits,
            group_size,
            in_features,
        )

    return weight


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, words, scales, zeros, order, bias, expert_ids, routing_weights, ctx.bits, ctx.group_size, ctx.gate_up = inputs
    ctx.in_features, ctx.shared = x.shape[-1], x.ndim == 2
    needed = x if ctx.gate_up or routing_weights is not None else None
    ctx.save_for_backward(words, scales, zeros, order, expert_ids, bias, routing_weights, needed)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    words, scales, zeros, order, expert_ids, bias, routing_weights, x = ctx.saved_tensors
    experts = words.shape[0]
    if ctx.gate_up:
        return (_gate_up_grad(ctx, grad, *ctx.saved_tensors), *(None,) * 10)
    each = grad if routing_weights is None else grad[:, None].expand(*expert_ids.shape, grad.shape[-1])
    grad_x = packed_experts_grad(
        each, words, scales, zeros, order, expert_ids, ctx.bits, ctx.group_size, ctx.in_features
    )
    grad_weights = None
    if routing_weights is not None:
        here = plain.is_here(expert_ids, experts)
        # The result is linear in a weight: what it multiplies is x times the expert, and the bias.
        grad_weights = (grad_x.float() * (x[:, None] if ctx.shared else x).float()).sum(-1)
        if bias is not None:
            grad_weights += (each.float() * bias[expert_ids.clamp(0, experts - 1).long()].float()).sum(-1) * here
        grad_weights = grad_weights.to(routing_weights.dtype)
        grad_x = grad_x * torch.where(here, routing_weights, 0).to(grad_x.dtype)[..., None]
    if ctx.shared:
        grad_x = grad_x.sum(1)
    return grad_x, None, None, None, None, None, None, grad_weights, None, None, None


def _gate_up_grad(ctx, grad, words, scales, zeros, order, expert_ids, bias, _, x):  # type: ignore[no-untyped-def]
    """Return the gradient with respect to x; the two products are computed again rather than kept."""
    halves = list(plain.both_halves(words, scales, zeros, bias))
    packing = ctx.bits, ctx.group_size
    gate, up = (packed_experts(x, w, s, z, order, b, expert_ids, None, *packing) for w, s, z, b in halves)
    grad_x = sum(
        packed_experts_grad(half_grad, w, s, z, order, expert_ids, *packing, ctx.in_features)
        for half_grad, (w, s, z, _) in zip(silu_times_grad(grad, gate, up), halves, strict=True)
    )
    return grad_x.sum(1) if ctx.shared else grad_x


packed_experts.register_autograd(_backward, setup_context=_setup_context)
