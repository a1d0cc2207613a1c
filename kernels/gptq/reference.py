"""Packed matmul in plain torch: what every kernel is tested against, and what runs where there is none."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from ropewalk.gptq.format import dequantize


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
