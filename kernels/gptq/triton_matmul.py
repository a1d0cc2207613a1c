"""Packed matmul on the tensor cores, for decoding, small batches and short prompts.

The weight is the left operand: it reaches the tensor cores from registers, and the few tokens stand on the
side that may be narrow (wgmma on Hopper can be had for few tokens in no other way). A plane lies in one
group, so that the sums of a group are scaled once, in float32, instead of every weight being scaled and
rounded in half precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.gptq.triton_unpack import group_row, load_block, load_zero, plane_weights, source_rows


@triton.jit
def weight_times_rows(
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
    DTYPE: tl.constexpr,
):
    """Return part `part` of the product for the columns n: float32 [BLOCK_N, BLOCK_M].

    `rows` point to the beginning of each token's activations, [BLOCK_M]; those that are not `here` count as 0.
    """
    PLANE: tl.constexpr = 2 * WORDS
    blocks = tl.cdiv(K, PLANES * PLANE)
    each = tl.cdiv(blocks, SPLIT_K)
    unit = 1024.0 if tl.float16 == DTYPE else 1.0  # of what plane_weights returns
    scale = tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32) * unit
    zero = load_zero(zeros, 0, n, N, BITS, 0, HAS_ZEROS)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(part * each, tl.minimum((part + 1) * each, blocks)):
        words, more = load_block(low, high, block, n, N, BITS, WORDS)
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for p in tl.static_range(PLANES):
            first = (block * PLANES + p) * PLANE
            # Where groups fill whole planes of a block, it is known here which plane begins one and which ends one.
            if GROUP != 0 and (p == 0 or (p * PLANE) % GROUP == 0 or (PLANES * PLANE) % GROUP != 0):
                group = tl.minimum(first, K - 1)  # a plane of padding has no group
                scale = tl.load(group_row(scales, group, n, N, GROUP), mask=n < N, other=0.0).to(tl.float32) * unit
                zero = load_zero(zeros, group, n, N, BITS, GROUP, HAS_ZEROS)
            weight = plane_weights(words, more, zero, p, BITS, DTYPE)
            k = tl.arange(0, PLANE) + first
            offsets = source_rows(order, k, K, HAS_ORDER)
            known = (k < K)[:, None] & here[None, :]
            a = tl.load(rows[None, :] + offsets[:, None], mask=known, other=0.0).to(DTYPE)
            if GROUP == 0:
                total = tl.dot(weight, a, total, input_precision="ieee")
            else:
                sums = tl.dot(weight, a, sums, input_precision="ieee")
                if p == PLANES - 1 or ((p + 1) * PLANE) % GROUP == 0 or (PLANES * PLANE) % GROUP != 0:
                    total += sums * scale[:, None]
                    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if GROUP == 0:
        total *= scale[:, None]
    return total


@triton.jit
def matmul_kernel(
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
    DTYPE: tl.constexpr,
):
    """Out [SPLIT_K, M, N]: in float32 without bias where SPLIT_K > 1, the result itself otherwise.

    GROUP is the group size, 0 for one group; DTYPE is that of the multiplication. x is [M, K] with rows
    stride_x apart. The grid is (tokens, columns, SPLIT_K): programs of the same columns are neighbours and
    find the weight in the cache.
    """
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    total = weight_times_rows(
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
        DTYPE,
    )
    if HAS_BIAS and SPLIT_K == 1:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tokens = (part * M + m).to(tl.int64) * N
    here = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out + tokens[None, :] + n[:, None], total.to(out.dtype.element_ty), mask=here)
