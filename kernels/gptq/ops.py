"""The operators of packed linear layers.

`ropewalk::gptq_linear` takes the checkpoint layout with v2 zero points (format.py) and runs in plain torch
(reference.py) on every device. `ropewalk::packed_linear` takes the execution layout (layout.py): on a GPU it
runs the Triton kernels, elsewhere plain torch. Both know their output's shape without computing it (fake
implementations), and differentiate with respect to x, so that LoRA trains on a packed base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.gptq import reference
from ropewalk.gptq.format import infer_features


@torch.library.custom_op("ropewalk::gptq_linear", mutates_args=())
def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return x @ W + bias for a packed weight W.

    Args:
        x: [..., K], float16, bfloat16 or float32.
        qweight: int32 [K * bits / 32, N].
        scales: [G, N], any floating dtype.
        qzeros: int32 [G, N * bits / 32] as v2 stores them; None where all are 2 ** (bits - 1).
        g_idx: int32 [K]; None where row k is in group k // group_size.
        bias: [N] or None; no gradient is computed for it.
        bits: 2, 3, 4 or 8.
        group_size: rows to a group, -1 for one group.

    Returns:
        [..., N] in x's dtype.
    """
    return reference.gptq_linear(x, qweight, scales, qzeros, g_idx, bias, bits=bits, group_size=group_size)


@gptq_linear.register_fake
def _(x, qweight, scales, qzeros, g_idx, bias, bits, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], qweight.shape[1]))


@torch.library.custom_op("ropewalk::gptq_linear_grad", mutates_args=())
def gptq_linear_grad(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return the gradient of `gptq_linear` with respect to x: grad [..., N] @ W transposed, [..., K]."""
    return reference.gptq_linear_grad(grad, qweight, scales, qzeros, g_idx, bits=bits, group_size=group_size)


@gptq_linear_grad.register_fake
def _(grad, qweight, scales, qzeros, g_idx, bits, group_size):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], infer_features(qweight.shape, bits)[0]))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, qweight, scales, qzeros, g_idx, _, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(qweight, scales, qzeros, g_idx)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = gptq_linear_grad(grad, *ctx.saved_tensors, ctx.bits, ctx.group_size)
    return grad_x, None, None, None, None, None, None, None


gptq_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("ropewalk::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return x @ W + bias for a weight W in the execution layout.

    Args:
        x: [..., K], float16, bfloat16 or float32.
        words: int32 [layout.word_rows(K, bits), N].
        scales: [G, N], any floating dtype.
        zeros: uint8 [G, N]; None where all are 2 ** (bits - 1).
        order: int32 [K], the checkpoint's row of each sorted row; None where none was moved.
        bias: [N] or None; no gradient is computed for it.
        bits: 2, 3, 4 or 8.
        group_size: rows to a group (`layout.supports`), -1 for one group.

    Returns:
        [..., N] in x's dtype.
    """
    if x.is_cuda:
        from ropewalk.gptq import triton_linear

        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of x
            return triton_linear.packed_linear(x, words, scales, zeros, order, bias, bits=bits, group_size=group_size)
    weight = dense_weight(x, words, scales, zeros, order, bits, group_size, x.shape[-1])
    return torch.nn.functional.linear(x, weight.t(), None if bias is None else bias.to(x.dtype))


@packed_linear.register_fake
def _(x, words, scales, zeros, order, bias, bits, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], words.shape[1]))


@torch.library.custom_op("ropewalk::packed_linear_grad", mutates_args=())
def packed_linear_grad(
    grad: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return the gradient of `packed_linear` with respect to x: grad [..., N] @ W transposed, [..., K]."""
    return grad @ dense_weight(grad, words, scales, zeros, order, bits, group_size, in_features).t()


@packed_linear_grad.register_fake
def _(grad, words, scales, zeros, order, bits, group_size, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


def dense_weight(
    like: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return the weight [K, N] in the dtype of `like`."""
    if like.is_cuda:
        from ropewalk.gptq.triton_dequantize import dequantize

        settings = {"bits": bits, "group_size": group_size, "in_features": in_features}
        with torch.cuda.device_of(like):
            return dequantize(words, scales, zeros, order, dtype=like.dtype, **settings)
    weight = reference.packed_weight(
        words, scales, zeros, order, bits=bits, group_size=group_size, in_features=in_features
    )
    return weight.to(like.dtype)


@torch.library.custom_op("ropewalk::packed_gate_up", mutates_args=())
def packed_gate_up(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return silu(x @ gate) * (x @ up), [..., N / 2] in x's dtype.

    The arguments are those of `packed_linear` for one weight that holds both: words from `layout.interleave_words`,
    scales, zeros and bias from `layout.interleave`.
    """
    if x.is_cuda:
        from ropewalk.gptq import triton_linear

        with torch.cuda.device_of(x):
            return triton_linear.packed_linear(
                x, words, scales, zeros, order, bias, bits=bits, group_size=group_size, gate_up=True
            )
    return reference.gated(packed_linear(x, words, scales, zeros, order, bias, bits, group_size))


@packed_gate_up.register_fake
def _(x, words, scales, zeros, order, bias, bits, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], words.shape[1] // 2))


def _packed_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, words, scales, zeros, order, _, ctx.bits, ctx.group_size = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(words, scales, zeros, order)


def _packed_backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = packed_linear_grad(grad, *ctx.saved_tensors, ctx.bits, ctx.group_size, ctx.in_features)
    return grad_x, None, None, None, None, None, None, None


packed_linear.register_autograd(_packed_backward, setup_context=_packed_setup_context)


def _gate_up_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(*tensors)


def _gate_up_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, words, scales, zeros, order, bias = ctx.saved_tensors
    # The product is computed again rather than kept: it is as large as the rest of the layer together.
    y = packed_linear(x, words, scales, zeros, order, bias, ctx.bits, ctx.group_size)
    grad_y = reference.gated_grad(grad, y)
    grad_x = packed_linear_grad(grad_y, words, scales, zeros, order, ctx.bits, ctx.group_size, x.shape[-1])
    return grad_x, None, None, None, None, None, None, None


packed_gate_up.register_autograd(_gate_up_backward, setup_context=_gate_up_setup_context)
