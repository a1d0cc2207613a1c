"""All experts of a batch of routed tokens in one launch, from a packed stack (experts.py).

A program multiplies a block of assignments (a token with one of its experts, triton_align.py) by some columns of
their expert. A few tokens, as in decoding, seldom share an expert: then every assignment is a block of its own and
nothing is sorted. The gather of each expert's act-order is that of the token, in one load. A second step adds the
parts of a split K, and a token's experts by their weights, in a fixed order: two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.gptq.triton_decode import rows_times_weight
from ropewalk.gptq.triton_gate_up import gated_tile, silu_times
from ropewalk.gptq.triton_matmul import weight_times_rows

# Of a thread. Left to itself ptxas spills a few to stay below a step of occupancy.
MAX_REGISTERS = 255


@triton.jit
def store_rows(out, values, part, a, here, n, is_column, A, N):
    """Store values [BLOCK_N, BLOCK_M] for those of the assignments a that are `here`, and those of the columns n that
    are there.
    """
    pointers = out + (part.to(tl.int64) * A + a)[None, :] * N + n[:, None]
    tl.store(pointers, values.to(out.dtype.element_ty), mask=is_column[:, None] & here[None, :])


@triton.jit
def experts_kernel(
    x,
    low,
    high,
    scales,
    zeros,
    order,
    bias,
    ids,
    slots,
    experts,
    out,
    A,
    E,
    N,
    K,
    sharing,
    stride_x,
    stride_words,
    stride_scales,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DTYPE: tl.constexpr,
    GATE_UP: tl.constexpr,
    GATED: tl.constexpr,
):
    """Out [SPLIT_K, A, N]: in float32 where it has parts or is to be weighted, the result itself otherwise.

    Assignment a reads row a // sharing of x, rows stride_x apart. Strides of experts are in int32 words and in
    scales. The grid is (blocks, columns, SPLIT_K); the blocks are those of slots and experts where ALIGNED, the
    assignments otherwise. Assignments to no expert of the stack get zeros. DOT: with tensor cores.

    GATE_UP: an expert has two weights of N columns, gate and up, one after the other; a tile takes eight columns of
    each by turns. With GATED out is [A, N], silu(gate) * up, otherwise [SPLIT_K, A, 2, N].
    """
    tile = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, column, width = tile, tile, N
    if GATE_UP:
        n = tile // 16 * 8 + tile % 8
        second = (tile // 8) % 2
        column, width = n + second * N, 2 * N
    is_column = n < N
    if GATED:
        column, width = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2), N
        is_column = column < N
    part = tl.program_id(2)
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK_M)
    if ALIGNED:
        expert = tl.load(experts + block).to(tl.int64)
        if expert < 0:
            return
        a = tl.load(slots + block * BLOCK_M + place)
        here = a < A
        rows = x + (a // sharing).to(tl.int64) * stride_x
    else:
        expert = tl.load(ids + block).to(tl.int64)
        a = block + place
        here = place == 0
        rows = x + (block // sharing).to(tl.int64) * stride_x + place * 0
    if (expert < 0) | (expert >= E):
        nothing = tl.zeros([BLOCK_N // 2 if GATED else BLOCK_N, BLOCK_M], tl.float32)
        store_rows(out, nothing, part, a, here, column, is_column, A, width)
        return
    # Of 3 bits the high plane is counted in halves of a word.
    low += expert * stride_words
    high += expert * stride_words * (2 if BITS == 3 else 1)
    scales += expert * stride_scales
    zeros += expert * stride_scales
    order += expert * K
    bias += expert * (2 * N if GATE_UP else N)
    if GATE_UP:
        # A pointer for each column instead of one for all.
        low += second.to(tl.int64)[:, None] * (stride_words // 2)
        high += second.to(tl.int64)[:, None] * (stride_words // 2 * (2 if BITS == 3 else 1))
        scales += second * (stride_scales // 2)
        zeros += second * (stride_scales // 2)
        bias += second * N
    if DOT:
        total = weight_times_rows(
            *(rows, here, low, high, scales, zeros, order, n, N, K, part),
            *(BITS, GROUP, HAS_ZEROS, HAS_ORDER, BLOCK_M, BLOCK_N, WORDS, PLANES, SPLIT_K, DTYPE),
        )
    else:
        few = rows_times_weight(
            *(rows, here, low, high, scales, zeros, order, n, N, K, part),
            *(BITS, GROUP, HAS_ZEROS, HAS_ORDER, BLOCK_M, BLOCK_N, WORDS, PLANES, SPLIT_K),
        )
        total = tl.trans(few)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        total = gated_tile(total, BLOCK_M, BLOCK_N)
    store_rows(out, total, part, a, here, column, is_column, A, width)


@triton.jit
def combine_gate_up_kernel(
    parts, bias, ids, out, A, E, N, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Out [A, N]: silu(gate) * up, each the sum of parts float32 [SPLIT_K, A, 2, N] in order and of bias [E, 2, N].
    Assignments to no expert of the stack get zeros.
    """
    a = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + a).to(tl.int64)
    here = (n < N) & (expert >= 0) & (expert < E)
    pointers = parts + a * 2 * N + n
    gate = tl.load(pointers, mask=here, other=0.0)
    up = tl.load(pointers + N, mask=here, other=0.0)
    for _ in range(1, SPLIT_K):
        pointers += tl.cast(A, tl.int64) * 2 * N
        gate += tl.load(pointers, mask=here, other=0.0)
        up += tl.load(pointers + N, mask=here, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias + expert * 2 * N + n, mask=here, other=0.0).to(tl.float32)
        up += tl.load(bias + expert * 2 * N + N + n, mask=here, other=0.0).to(tl.float32)
    tl.store(out + a * N + n, silu_times(gate, up).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def gather_kernel(x, order, ids, out, E, K, sharing, stride_x, BLOCK: tl.constexpr):
    """out[a, k] = x[a // sharing, order[ids[a], k]] for out [A, K]; rows of no expert of the stack stay as they are."""
    a = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids + a).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(order + expert * K + k, mask=k < K, other=0)
    row = tl.load(x + a // sharing * stride_x + source, mask=k < K, other=0.0)
    tl.store(out + a * K + k, row, mask=k < K)


@triton.jit
def combine_kernel(
    parts,
    bias,
    ids,
    weights,
    out,
    A,
    E,
    N,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r] = sum over j < TOP_K, in order, of weights[a] * (parts[0, a] + parts[1, a] + ... + bias[ids[a]]), where
    a = r * TOP_K + j, for parts float32 [SPLIT_K, A, N]. Assignments to no expert of the stack count as 0.
    """
    r = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        a = r * TOP_K + j
        expert = tl.load(ids + a).to(tl.int64)
        here = (n < N) & (expert >= 0) & (expert < E)
        pointers = parts + a * N + n
        term = tl.load(pointers, mask=here, other=0.0)
        for _ in range(1, SPLIT_K):
            pointers += tl.cast(A, tl.int64) * N
            term += tl.load(pointers, mask=here, other=0.0)
        if HAS_BIAS:
            term += tl.load(bias + expert * N + n, mask=here, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            # A weight that does not count may be anything, even no number.
            term = tl.where(here, term * tl.load(weights + a).to(tl.float32), 0.0)
        total += term
    tl.store(out + r * N + n, total.to(out.dtype.element_ty), mask=n < N)
