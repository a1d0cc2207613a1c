"""Packed matmul in plain torch: what every kernel is tested against, and what runs where there is none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ropewalk.gptq.format import dequantize, sequential_g_idx
from ropewalk.gptq.layout import gate_and_up, interleave, unpack_execution


def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return x @ W + bias, [..., N] in x's dtype, for the packed weight W [K, N] of `format.dequantize`.

    The weight is rounded to x's dtype once; the matmul accumulates as torch's does.
    """
    weight = dequantize(qweight, scales, qzeros, g_idx, bits=bits, group_size=group_size).to(x.dtype)
    # One call, so that the bias is added before the result is rounded to x's dtype.
    return linear(x, weight.t(), None if bias is None else bias.to(x.dtype))


def gptq_linear_grad(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return the gradient of `gptq_linear` with respect to x: grad @ W transposed, [..., K]."""
    weight = dequantize(qweight, scales, qzeros, g_idx, bits=bits, group_size=group_size).to(grad.dtype)
    return grad @ weight.t()


def packed_weight(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return the weight as float32 [K, N], rows in the checkpoint's order, from the execution layout.

    Args:
        words: int32 [word_rows(K, bits), N] as `layout.to_execution` returns it.
        scales: [G, N], any floating dtype.
        zeros: uint8 [G, N], or None where all are 2 ** (bits - 1).
        order: int32 [K] as `layout.row_order` returns it, or None.
    """
    codes = unpack_execution(words, bits)[:in_features].float()
    groups = sequential_g_idx(in_features, group_size).long().to(words.device)
    zero = float(1 << (bits - 1)) if zeros is None else zeros.float()[groups]
    weight = (codes - zero) * scales.float()[groups]
    if order is None:
        return weight
    moved = torch.empty_like(weight)
    moved[order.long()] = weight
    return moved


def gated(y: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., N / 2] in y's dtype, for y [..., N] (`layout.interleave`); computed in float32."""
    return silu_times(*gate_and_up(y))


def gated_grad(grad: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of `gated` with respect to y, [..., N] in y's dtype, for grad [..., N / 2]."""
    return interleave(*silu_times_grad(grad, *gate_and_up(y)))


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up in their dtype, computed in float32."""
    return (silu(gate.float()) * up.float()).to(gate.dtype)


def silu_times_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `silu_times` with respect to gate and up, in their dtype."""
    wide = gate.float()
    sigmoid = wide.sigmoid()
    through_gate = grad * up.float() * sigmoid * (1 + wide * (1 - sigmoid))
    return through_gate.to(gate.dtype), (grad * wide * sigmoid).to(up.dtype)
