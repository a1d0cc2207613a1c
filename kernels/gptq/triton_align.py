"""Routed tokens sorted by expert on the device: what lets one launch serve all experts of a batch.

An assignment is a token with one of its experts, numbered token * top_k + place. The assignments of an expert
fill whole blocks, the last one ragged; experts without tokens have no block. How many blocks that makes only the
device knows, so that there is room for the most there can be, and whoever reads a block past the end stops at
once. Nothing waits for the device, and no size depends on what it holds: CUDA graphs can record it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024


@triton.jit
def load_groups(ids, start, A, E, CHUNK: tl.constexpr):
    """Return the expert of the assignments from `start` on, int32 [CHUNK]: E where it is none of 0 to E - 1, and
    -1 from A on.
    """
    a = start + tl.arange(0, CHUNK)
    found = tl.load(ids + a, mask=a < A, other=-1)
    group = tl.where((found >= 0) & (found < E), found, E).to(tl.int32)
    return tl.where(a < A, group, -1)


@triton.jit
def align_kernel(
    ids,
    slots,
    experts,
    A,
    E,
    max_blocks,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Fill slots int32 [max_blocks, BLOCK_M] and experts int32 [max_blocks] from ids, integers [A].

    Program e of E + 1 counts for all and writes the blocks of expert e, its assignments in their order; program E
    those of assignments to no expert, and -1 as the expert of blocks past the end. BINS is at least E + 1.
    """
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, A, CHUNK):
        group = load_groups(ids, start, A, E, CHUNK)
        counts += tl.histogram(tl.where(group >= 0, group, 0), BINS, mask=group >= 0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(bins < own, blocks, 0))
    end = first + tl.sum(tl.where(bins == own, blocks, 0))
    slot = first * BLOCK_M
    for start in range(0, A, CHUNK):
        mine = (load_groups(ids, start, A, E, CHUNK) == own).to(tl.int32)
        places = slot + tl.cumsum(mine, 0) - mine
        tl.store(slots + places, start + tl.arange(0, CHUNK), mask=mine != 0)
        slot += tl.sum(mine)
    rest = slot + tl.arange(0, BLOCK_M)
    tl.store(slots + rest, tl.full([BLOCK_M], 0, tl.int32) + A, mask=rest < end * BLOCK_M)
    for start in range(first, end, CHUNK):
        block = start + tl.arange(0, CHUNK)
        tl.store(experts + block, tl.full([CHUNK], 0, tl.int32) + own, mask=block < end)
    if own == E:
        for start in range(end, max_blocks, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(experts + block, tl.full([CHUNK], -1, tl.int32), mask=block < max_blocks)


def most_blocks(assignments: int, experts: int, block_m: int) -> int:
    """Return how many blocks so many assignments make at most: each of the E + 1 groups may end in a ragged one."""
    ragged = min(assignments, experts + 1)
    return (assignments + ragged * (block_m - 1)) // block_m


def align(expert_ids: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Sort assignments by expert into blocks of block_m.

    Args:
        expert_ids: integers [A], contiguous; those outside 0 to experts - 1 count as one more expert, `experts`.

    Returns:
        slots: int32 [most_blocks, block_m], the assignments of each block in their order; A where there is none,
            and undefined past the last block.
        experts: int32 [most_blocks], the expert of each block in ascending order; -1 past the last block.
    """
    assignments = expert_ids.numel()
    blocks = most_blocks(assignments, experts, block_m)
    slots = torch.empty(blocks, block_m, dtype=torch.int32, device=expert_ids.device)
    of_block = torch.empty(blocks, dtype=torch.int32, device=expert_ids.device)
    align_kernel[(experts + 1,)](
        expert_ids,
        slots,
        of_block,
        assignments,
        experts,
        blocks,
        BINS=triton.next_power_of_2(experts + 1),
        BLOCK_M=block_m,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return slots, of_block
