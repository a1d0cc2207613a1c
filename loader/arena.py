"""Memory for the tensors of a model, in pages of 2 MB.

To be given memory in pages of 4 kB takes longer than to fill it, and most layers are too small for large pages of
their own. So they share pieces; a piece goes when the last of its tensors does.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
PIECE = 128 << 20
_LINE = 64  # tensors begin at multiples of it


class Arena:
    """Hands out memory, piece after piece."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor whose values are not set, contiguous, on the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > len(self._piece):
            self._piece, self._used = large_pages(max(nbytes, PIECE)), 0
        memory = self._piece[self._used : self._used + nbytes]
        self._used += -(-nbytes // _LINE) * _LINE
        return memory.view(dtype).view(tuple(shape))


def large_pages(size: int) -> Tensor:
    """Return memory of `size` bytes, uint8, in large pages where the system has any; what is not touched costs none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    # Python's default is memory to be shared with children, which gets no large pages.
    memory = mmap.mmap(-1, -(-size // LARGE_PAGE) * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
