"""silu(x @ gate) * (x @ up) in one launch, for the two projections of a gated MLP that share an order of rows.

Their columns take turns in one weight, eight by eight (`layout.interleave`). A tile of the product then holds both
halves of each of its results, on tensor cores in the same thread, and what lies between them is never written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.gptq.triton_matmul import weight_times_rows


@triton.jit
def silu_times(gate, up):
    """Return gate * sigmoid(gate) * up, for float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gated_tile(total, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return silu(gate) * up [BLOCK_N / 2, BLOCK_M] for sums [BLOCK_N, BLOCK_M], eight columns of each by turns."""
    gate, up = tl.split(tl.permute(tl.reshape(total, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1)))
    return tl.reshape(silu_times(gate, up), (BLOCK_N // 2, BLOCK_M))


@triton.jit
def gate_up_kernel(
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
    DTYPE: tl.constexpr,
):
    """Out [M, N / 2]; the rest as for `matmul_kernel`. N and BLOCK_N are multiples of 16."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = weight_times_rows(
        *(x + m.to(tl.int64) * stride_x, m < M, low, high, scales, zeros, order, n, N, K, 0),
        *(BITS, GROUP, HAS_ZEROS, HAS_ORDER, BLOCK_M, BLOCK_N, WORDS, PLANES, 1, DTYPE),
    )
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    result = gated_tile(total, BLOCK_M, BLOCK_N).to(out.dtype.element_ty)
    column = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    here = (column < N // 2)[:, None] & (m < M)[None, :]
    tl.store(out + m.to(tl.int64)[None, :] * (N // 2) + column[:, None], result, mask=here)


@triton.jit
def reduce_gate_up_kernel(
    parts, bias, out, size, N, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Add parts [SPLIT_K, M, N] of the product in order, then as above: out [M, N / 2], size M * N / 2, any even N."""
    half = N // 2
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = offsets < size
    column = offsets % half
    first = column // 8 * 8  # of the run
    at = first + column
    width = tl.minimum(half - first, 8)
    pointers = parts + offsets // half * N + at
    gate = tl.load(pointers, mask=here, other=0.0).to(tl.float32)
    up = tl.load(pointers + width, mask=here, other=0.0).to(tl.float32)
    for _ in range(1, SPLIT_K):
        pointers += size * 2
        gate += tl.load(pointers, mask=here, other=0.0).to(tl.float32)
        up += tl.load(pointers + width, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias + at, mask=here, other=0.0).to(tl.float32)
        up += tl.load(bias + at + width, mask=here, other=0.0).to(tl.float32)
    tl.store(out + offsets, silu_times(gate, up).to(out.dtype.element_ty), mask=here)
