"""A packed weight written out whole, for the matmul library: large prefills, and gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.gptq.layout import PLANE, WORDS, bit_planes, rows_per_block
from ropewalk.gptq.triton_unpack import group_row, load_block, load_zero, plane_codes, source_rows


@triton.jit
def dequantize_kernel(
    low,
    high,
    scales,
    zeros,
    order,
    out,
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Out [K, N], rows in the checkpoint's order; GROUP is the group size, 0 for one group."""
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    words, more = load_block(low, high, block, n, N, BITS, WORDS)
    for p in tl.static_range(PLANES):
        first = (block * PLANES + p) * (2 * WORDS)
        k = tl.arange(0, 2 * WORDS) + first
        group = tl.minimum(first, K - 1)  # a plane of padding has no group
        scale = tl.load(group_row(scales, group, n, N, GROUP), mask=n < N, other=0.0).to(tl.float32)
        zero = load_zero(zeros, group, n, N, BITS, GROUP, HAS_ZEROS)
        weight = (plane_codes(words, more, p, BITS) - zero.to(tl.float32)[:, None]) * scale[:, None]
        rows = source_rows(order, k, K, HAS_ORDER).to(tl.int64)
        here = (n < N)[:, None] & (k < K)[None, :]
        tl.store(out + rows[None, :] * N + n[:, None], weight.to(out.dtype.element_ty), mask=here)


def dequantize(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [K, N] in `dtype`, rows in the checkpoint's order.

    Args:
        words: int32, the execution layout (`layout.to_execution`).
        scales: [G, N], any floating dtype.
        zeros: uint8 [G, N], or None where all are 2 ** (bits - 1).
        order: int32 [K] as `layout.row_order` returns it, or None.

    Each number is computed in float32 and rounded to `dtype` once.
    """
    low, high = bit_planes(words, bits)
    columns = words.shape[1]
    out = torch.empty(in_features, columns, dtype=dtype, device=words.device)
    block_n = 128
    grid = (triton.cdiv(in_features, rows_per_block(bits)), triton.cdiv(columns, block_n))
    dequantize_kernel[grid](
        low,
        low if high is None else high,
        scales,
        scales if zeros is None else zeros,
        scales if order is None else order,
        out,
        columns,
        in_features,
        BITS=bits,
        GROUP=0 if group_size == -1 or group_size >= in_features else group_size,
        HAS_ZEROS=zeros is not None,
        HAS_ORDER=order is not None,
        BLOCK_N=block_n,
        WORDS=WORDS,
        PLANES=rows_per_block(bits) // PLANE,
        num_warps=8,  # with four, 3 bits spill
    )
    return out
