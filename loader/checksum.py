"""A checksum at the speed of memory, for files that are mapped and not read.

Bytes are 64-bit words in rows of 2039, a prime. The rows of a chunk are added up, each of the 2039 sums is multiplied
by an odd number of its own, and these are added; the chunks follow each other as the digits of a number. All of it
modulo 2^64. That finds every change within one word, whatever is moved by less than a chunk (8 MB) and not by a
multiple of 16,312 bytes (no whole number of pages is one within a chunk), chunks that change places, and what is cut
off or filled up; other damage but for one case in 2^64. It is no proof against someone who wants the sums to agree.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLUMNS = 2039  # a page is 512 words: only 2039 pages further on does the same column come again
ROWS = 512  # of a chunk, fewer than that


def checksum(tensor: Tensor) -> str:
    """Return the checksum of a tensor's bytes, 16 hexadecimal digits.

    Args:
        tensor: contiguous, on the CPU.
    """
    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    chunk = COLUMNS * ROWS * 8
    total = data.size
    for begin in range(0, data.size, chunk):
        total = (total * 0x9E3779B97F4A7C15 + _sum(data[begin : begin + chunk])) & 0xFFFFFFFFFFFFFFFF
    return f"{total:016x}"


def _sum(data: Any) -> int:
    whole = data.size // (COLUMNS * 8) * (COLUMNS * 8)
    sums = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, COLUMNS), axis=0)
    if whole < data.size:
        rest = np.zeros(COLUMNS * 8, np.uint8)
        rest[: data.size - whole] = data[whole:]
        sums = sums + rest.view(np.uint64)
    return int(np.add.reduce(sums * _weights()))


@functools.lru_cache(maxsize=1)
def _weights() -> Any:
    """Return an odd number for each column, by splitmix64."""
    z = np.arange(1, COLUMNS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
