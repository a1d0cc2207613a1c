"""The operators `ropewalk::gptq_linear` and `ropewalk::gptq_linear_grad`.

Both take the checkpoint layout with v2 zero points (see format.py), know their output's shape without
computing it (fake implementations), and differentiate with respect to x, so that LoRA trains on a
packed base. Every device runs the plain torch implementation of reference.py.
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
