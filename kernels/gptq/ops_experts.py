"""The operator `ropewalk::packed_experts`: a batch of routed tokens times a packed stack of experts.

On a GPU it runs the kernels of triton_grouped.py: no size depends on the routing and nothing waits for the device, so
that CUDA graphs and `fullgraph` take it; elsewhere plain torch (experts.py). A layer of Mixtral is

    gate = packed_experts(x, ..., expert_ids, None, ...)                        x [T, hidden] -> [T, top_k, ffn]
    y = packed_experts(silu(gate) * up, ..., expert_ids, routing_weights, ...)  [T, top_k, ffn] -> [T, hidden]

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

    Returns:
        [T, top_k, N], or [T, N] with routing weights, in x's dtype. Two runs give the same bits.

    Raises:
        FormatError: shapes or dtypes that do not belong together.
    """
    check(x, words, scales, zeros, order, bias, expert_ids, routing_weights, bits, group_size)
    if x.is_cuda:
        from ropewalk.gptq import triton_grouped

        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of x
            return triton_grouped.packed_experts(
                x, words, scales, zeros, order, bias, expert_ids, routing_weights, bits=bits, group_size=group_size
            )
    weight_of = _weight_of(x, words, scales, zeros, order, bits, group_size, x.shape[-1])
    y = plain.packed_experts(x, weight_of, bias, expert_ids, words.shape[2], words.shape[0])
    return y if routing_weights is None else plain.weighted_sum(y, expert_ids, routing_weights, words.shape[0])


@packed_experts.register_fake
def _(x, words, scales, zeros, order, bias, expert_ids, routing_weights, bits, group_size):  # type: ignore[no-untyped-def]
    leading = expert_ids.shape if routing_weights is None else expert_ids.shape[:1]
    return x.new_empty((*leading, words.shape[2]))


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
) -> None:
    """Raise FormatError where arguments of `packed_experts` do not belong together; reads no tensor's values."""
    if words.ndim != 3 or expert_ids.ndim != 2 or x.ndim not in (2, 3):
        shapes = f"{list(words.shape)}, {list(expert_ids.shape)} and {list(x.shape)}"
        raise FormatError("words, expert_ids and x", "3, 2 and 2 or 3 dimensions", shapes)
    experts, _, columns = words.shape
    tokens, in_features = x.shape[0], x.shape[-1]
    top_k = expert_ids.shape[1]
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    expected = {
        "x": (x, (tokens, in_features) if x.ndim == 2 else (tokens, top_k, in_features)),
        "words": (words, (experts, word_rows(in_features, bits), columns)),
        "scales": (scales, (experts, groups, columns)),
        "zeros": (zeros, (experts, groups, columns)),
        "order": (order, (experts, in_features)),
        "bias": (bias, (experts, columns)),
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
        if name not in ("x", "expert_ids", "routing_weights") and not tensor.is_contiguous():
            raise FormatError(name, "contiguous", f"strides {tensor.stride()}")
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
    x, words, scales, zeros, order, bias, expert_ids, routing_weights, ctx.bits, ctx.group_size = inputs
    ctx.in_features, ctx.shared = x.shape[-1], x.ndim == 2
    ctx.save_for_backward(
        words, scales, zeros, order, expert_ids, bias, routing_weights, None if routing_weights is None else x
    )


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    words, scales, zeros, order, expert_ids, bias, routing_weights, x = ctx.saved_tensors
    experts = words.shape[0]
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
    return grad_x, None, None, None, None, None, None, grad_weights, None, None


packed_experts.register_autograd(_backward, setup_context=_setup_context)
