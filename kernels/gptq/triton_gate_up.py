"""silu(x @ gate) * (x @ up) in one launch, for the two projections of a gated MLP that share an order of rows.

The weights stand side by side in one (`layout.side_by_side`), gate's columns first. A program computes the same
columns of both, so that what lies between them is never written.
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
    """Out [M, N / 2]; the rest as for `matmul_kernel`. The grid is (tokens, columns of gate)."""
    half = N // 2
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = x + m.to(tl.int64) * stride_x
    here = m < M
    # Columns of gate from `half` on are up's; what they compute is not stored.
    gate = weight_times_rows(
        *(rows, here, low, high, scales, zeros, order, n, N, K, 0),
        *(BITS, GROUP, HAS_ZEROS, HAS_ORDER, BLOCK_M, BLOCK_N, WORDS, PLANES, 1, DTYPE),
    )
    up = weight_times_rows(
        *(rows, here, low, high, scales, zeros, order, n + half, N, K, 0),
        *(BITS, GROUP, HAS_ZEROS, HAS_ORDER, BLOCK_M, BLOCK_N, WORDS, PLANES, 1, DTYPE),
    )
    if HAS_BIAS:
        gate += tl.load(bias + n, mask=n < half, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + half + n, mask=n < half, other=0.0).to(tl.float32)[:, None]
    result = silu_times(gate, up).to(out.dtype.element_ty)
    tl.store(out + m.to(tl.int64)[None, :] * half + n[:, None], result, mask=(n < half)[:, None] & here[None, :])


@triton.jit
def reduce_gate_up_kernel(
    parts, bias, out, size, N, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Add parts float32 [SPLIT_K, M, N] of the product in order, then as above: out [M, N / 2], size M * N / 2."""
    half = N // 2
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = offsets < size
    column = offsets % half
    pointers = parts + offsets // half * N + column
    gate = tl.load(pointers, mask=here, other=0.0)
    up = tl.load(pointers + half, mask=here, other=0.0)
    for _ in range(1, SPLIT_K):
        pointers += size * 2
        gate += tl.load(pointers, mask=here, other=0.0)
        up += tl.load(pointers + half, mask=here, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
        up += tl.load(bias + half + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + offsets, silu_times(gate, up).to(out.dtype.element_ty), mask=here)
