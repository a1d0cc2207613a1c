"""The second step of a matmul whose K was split: the parts added in order, then the bias."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(parts, bias, out, size, N, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[j] = parts[0, j] + parts[1, j] + ... + bias[j % N], for parts float32 [SPLIT_K, size]."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = offsets < size
    pointers = parts + offsets
    total = tl.load(pointers, mask=here, other=0.0)
    for _ in range(1, SPLIT_K):
        pointers += size
        total += tl.load(pointers, mask=here, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + offsets % N, mask=here, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=here)
