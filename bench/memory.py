"""How much memory there is, and how much a program takes of it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

from ropewalk.bench.load_worker import memory, reset_peak

SPARE = 2_000_000_000  # bytes of memory to leave alone


def available_memory(device: torch.device) -> float | None:
    """Return how many bytes a device has left, or None where nothing says so."""
    if device.type == "cuda":
        # What torch keeps for later is free, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return None


def too_little(needed: float, free: float | None) -> str | None:
    """Return that so many bytes of memory do not fit into what is free, or None."""
    if free is None or needed + SPARE <= free:
        return None
    return f"needs about {needed / 1e9:.1f} GB of memory, of which {max(free - SPARE, 0) / 1e9:.1f} are left"


class Meter:
    """Bytes that this process holds on a device: allocated by torch on a GPU, resident ones on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device

    def held(self) -> int:
        """Return what it holds now, and begin to look for a peak anew."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        _trim_heap()
        return reset_peak()["resident"]

    def peak(self) -> int:
        """Return the most that it held since the last `held`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return memory()["peak"]


def _trim_heap() -> None:
    """Have the C library return what was freed: what is loaded next would fill it, and seem to need less."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
