"""RMS normalization in plain torch: what every kernel is tested against, and what computes gradients.

The formula and its roundings are those of transformers' LlamaRMSNorm: float32 inside, rounded to x's dtype, then
times the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, order: Tensor | None = None) -> Tensor:
    """Return weight * x / sqrt(mean(x ** 2) + eps), the mean over the last dimension.

    Args:
        x: [..., K], float16, bfloat16 or float32.
        weight: [K], x's dtype.
        eps: added to the mean.
        order: int32 [K], which channel each channel of the result is, or None.

    Returns:
        [..., K] in x's dtype.
    """
    wide = x.float()
    normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if order is None else normed.index_select(-1, order)


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return x + y, rounded to their dtype, and its `rms_norm`; only the latter is in another order."""
    total = x + y
    return total, rms_norm(total, weight, eps, order)
