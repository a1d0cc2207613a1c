"""RMS normalization in one Triton launch: x + y, its norm, and the order that packed layers want, a program to a row.

The formula and its roundings are those of reference.py. A row of up to ONE_TILE channels is held in registers, and
everything is asked for before the sum over the row is known: of a single token, for which the layer before and the
layer after wait, little but one trip to memory remains. A longer row is read twice, the second time from a cache.

With an order the sum of the squares is that without: the same bits in other places. What it picks is picked from x and
y, which nobody writes, so that no thread waits for another's sum to reach memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_TILE = 8192
LONG_TILE = 4096
# Channels to a thread: 32 bytes of float16.
EACH = 16
# Of a thread: all there are for 16 warps. Left to itself ptxas spills a few to stay below a step of occupancy.
MAX_REGISTERS = 128


@triton.jit
def _sums(x, y, at, here):
    """Return x + y of some channels, rounded to their dtype, as float32; x alone where y is None."""
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if y is not None:
        value += tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _store_normed(normed, j, here, value, scale, weight):
    rounded = (value * scale).to(normed.dtype.element_ty).to(tl.float32)
    tl.store(normed + j, (rounded * weight.to(tl.float32)).to(normed.dtype.element_ty), mask=here)


@triton.jit
def norm_kernel(
    x,
    y,
    weight,
    order,
    total,
    normed,
    stride_x,
    stride_y,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row; y and total, or order, may be None. The rows of total and normed follow one another."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    normed += row * K
    if y is not None:
        y += row * stride_y
        total += row * K
    if BLOCK >= K:
        j = tl.arange(0, BLOCK)
        here = j < K
        value = _sums(x, y, j, here)
        picked, at = value, j
        if order is not None:
            at = tl.load(order + j, mask=here, other=0)
            picked = _sums(x, y, at, here)
        factor = tl.load(weight + at, mask=here, other=0.0)
        if y is not None:
            tl.store(total + j, value.to(total.dtype.element_ty), mask=here)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / K + eps)
        _store_normed(normed, j, here, picked, scale, factor)
    else:
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, K, BLOCK):
            j = first + tl.arange(0, BLOCK)
            here = j < K
            value = _sums(x, y, j, here)
            squares += value * value
            if y is not None:
                tl.store(total + j, value.to(total.dtype.element_ty), mask=here)
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        for first in range(0, K, BLOCK):
            j = first + tl.arange(0, BLOCK)
            here = j < K
            at = j
            if order is not None:
                at = tl.load(order + j, mask=here, other=0)
            factor = tl.load(weight + at, mask=here, other=0.0)
            _store_normed(normed, j, here, _sums(x, y, at, here), scale, factor)


def plan(channels: int) -> tuple[int, int]:
    """Return (BLOCK, warps) for rows of so many channels."""
    block = triton.next_power_of_2(channels) if channels <= ONE_TILE else LONG_TILE
    return block, max(1, min(16, block // (32 * EACH)))


def launch(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    order: Tensor | None,
    total: Tensor | None,
    normed: Tensor,
) -> None:
    """Launch the kernel on tensors that `ropewalk.norm.ops.check` has passed; they are described there.

    Args:
        total: x + y, written; None where y is.
        normed: written; total and normed are contiguous and share no memory with x and y.
    """
    channels = x.shape[-1]
    rows = _rows(x)
    others = None if y is None else _rows(y)
    if rows.shape[0] == 0:
        return
    block, warps = plan(channels)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        norm_kernel[(rows.shape[0],)](
            rows,
            others,
            weight,
            order,
            total,
            normed,
            rows.stride(0),
            0 if others is None else others.stride(0),
            eps,
            K=channels,
            BLOCK=block,
            num_warps=warps,
            **({} if torch.version.hip else {"maxnreg": MAX_REGISTERS}),
        )


def _rows(x: Tensor) -> Tensor:
    """Return x as [rows, K] with the channels of a row side by side; a copy only where no view is that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
