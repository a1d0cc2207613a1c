"""Packed matmul for one to eight tokens without tensor cores: a matrix-vector product for each.

For devices whose tensor cores Triton does not reach (sm_75). Every word is read once, 16 bytes by a thread,
whatever the number of tokens. Where the columns alone do not fill the device, K is split: each part writes
its sums, and `triton_reduce` adds the parts in order, so that two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.gptq.triton_unpack import group_row, load_block, load_zero, plane_codes, source_rows


@triton.jit
def rows_times_weight(
    rows,
    here,
    low,
    high,
    scales,
    zeros,
    order,
    n,
    N,
    K,
    part,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Return part `part` of the product for the columns n: float32 [BLOCK_M, BLOCK_N].

    `rows` point to the beginning of each token's activations, [BLOCK_M]; those that are not `here` count as 0.
    """
    PLANE: tl.constexpr = 2 * WORDS
    blocks = tl.cdiv(K, PLANES * PLANE)
    each = tl.cdiv(blocks, SPLIT_K)
    scale = tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
    zero = load_zero(zeros, 0, n, N, BITS, 0, HAS_ZEROS)
    # One sum for each place in a plane; the places are added once, at the end.
    total = tl.zeros([BLOCK_M, BLOCK_N, PLANE], tl.float32)
    for block in range(part * each, tl.minimum((part + 1) * each, blocks)):
        words, more = load_block(low, high, block, n, N, BITS, WORDS)
        for p in tl.static_range(PLANES):
            first = (block * PLANES + p) * PLANE
            # Where groups fill whole planes of a block, only the first plane of a group loads.
            if GROUP != 0 and (p == 0 or (p * PLANE) % GROUP == 0 or (PLANES * PLANE) % GROUP != 0):
                group = tl.minimum(first, K - 1)  # a plane of padding has no group
                scale = tl.load(group_row(scales, group, n, N, GROUP), mask=n < N, other=0.0).to(tl.float32)
                zero = load_zero(zeros, group, n, N, BITS, GROUP, HAS_ZEROS)
            weight = plane_codes(words, more, p, BITS) - zero.to(tl.float32)[:, None]
            if GROUP != 0:
                weight = weight * scale[:, None]
            k = tl.arange(0, PLANE) + first
            offsets = source_rows(order, k, K, HAS_ORDER)
            known = here[:, None] & (k < K)[None, :]
            a = tl.load(rows[:, None] + offsets[None, :], mask=known, other=0.0).to(tl.float32)
            total += a[:, None, :] * weight[None, :, :]
    result = tl.sum(total, axis=2)
    if GROUP == 0:
        result = result * scale[None, :]
    return result


@triton.jit
def decode_kernel(
    x,
    low,
    high,
    scales,
    zeros,
    order,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Out [SPLIT_K, M, N]: in float32 without bias where SPLIT_K > 1, the result itself otherwise.

    GROUP is the group size, 0 for one group. x is [M, K] with rows stride_x apart.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    result = rows_times_weight(
        x + m.to(tl.int64) * stride_x,
        m < M,
        low,
        high,
        scales,
        zeros,
        order,
        n,
        N,
        K,
        part,
        BITS,
        GROUP,
        HAS_ZEROS,
        HAS_ORDER,
        BLOCK_M,
        BLOCK_N,
        WORDS,
        PLANES,
        SPLIT_K,
    )
    if HAS_BIAS and SPLIT_K == 1:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    offsets = (part * M + m).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
