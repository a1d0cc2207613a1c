"""Round-to-nearest packing: the plain baseline that GPTQ must beat, and the maker of test layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.gptq.format import group_count, pack, sequential_g_idx, zeros_v2_to_v1


def quantize_rtn(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = -1,
    sym: bool = True,
    order: Tensor | None = None,
    checkpoint_format: str = "gptq",
) -> dict[str, Tensor]:
    """Pack a weight by rounding each number to the nearest code of its group and column.

    Args:
        weight: [N, K] as nn.Linear holds it, any floating dtype.
        sym: zero points all 2 ** (bits - 1) and scales from the largest magnitude; otherwise scales and
            zero points from the smallest and largest number (0 always included).
        order: the act-order, a permutation of K: row order[i] belongs to group i // group_size.

    Returns:
        the tensors of `format.expected_tensors`, without a bias.
    """
    w = weight.detach().float().t()  # [K, N]
    in_features, out_features = w.shape
    g_idx = sequential_g_idx(in_features, group_size).to(w.device)
    if order is not None:
        by_position = g_idx
        g_idx = torch.empty_like(by_position)
        g_idx[order] = by_position
    groups, top = group_count(in_features, group_size), (1 << bits) - 1
    low = torch.zeros(groups, out_features, device=w.device)
    high = torch.zeros(groups, out_features, device=w.device)
    rows = g_idx.long()[:, None].expand(-1, out_features)
    low.scatter_reduce_(0, rows, w, "amin")
    high.scatter_reduce_(0, rows, w, "amax")
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    # Scales are what the file can hold; the codes are chosen for those. A group of zeros gets scale 1.
    scales = ((high - low) / top).to(torch.float16)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if sym:
        zeros = torch.full((groups, out_features), 1 << (bits - 1), device=w.device)
    else:
        zeros = torch.round(-low / scales.float()).clamp(0, top).to(torch.int64)
    codes = (torch.round(w / scales.float()[g_idx.long()]) + zeros[g_idx.long()]).clamp(0, top)
    qzeros = pack(zeros, bits, dim=1)
    return {
        "qweight": pack(codes.to(torch.int64), bits),
        "qzeros": zeros_v2_to_v1(qzeros, bits) if checkpoint_format == "gptq" else qzeros,
        "scales": scales,
        "g_idx": g_idx,
    }
