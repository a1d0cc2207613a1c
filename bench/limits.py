"""What the machine can do at best, measured in the run that is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from ropewalk.bench.timing import Rotation, measure

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Limits:
    """Measured limits of a device.

    Attributes:
        read_gb_per_s: the fastest that any of torch's reductions (or a copy, both ways counted) reads a
            buffer much larger than the caches, in 1e9 bytes a second.
        copy_gb_per_s: bytes read and written by torch's copy.
        flops: the best of torch's matmul of large squares in any dtype, in operations a second.
        flops_by_dtype: that for each dtype.
    """

    read_gb_per_s: float
    copy_gb_per_s: float
    flops: float
    flops_by_dtype: dict[str, float]

    def least_seconds(self, nbytes: float, operations: float) -> tuple[float, str]:
        """Return the least time for the work, and what sets it: "read" or "flops"."""
        moving, computing = nbytes / (self.read_gb_per_s * 1e9), operations / self.flops
        return (moving, "read") if moving >= computing else (computing, "flops")

    def as_json(self) -> dict[str, Any]:
        """Return them as the report has them."""
        return {
            "read_gb_per_s": self.read_gb_per_s,
            "copy_gb_per_s": self.copy_gb_per_s,
            "flops": self.flops,
            "flops_by_dtype": self.flops_by_dtype,
        }


@torch.inference_mode()
def measure_limits(device: torch.device, seconds: float = 0.3, *, nbytes: int | None = None) -> Limits:
    """Measure the limits of a device, with the threads that torch uses.

    Args:
        seconds: how long each of seven measurements takes.
        nbytes: size of the buffer that is read; 2 GB on a GPU and 512 MB on a CPU by default (with less than
            a tenth of a second, which is for rehearsals, 64 MB).
    """
    on_gpu, brief = device.type == "cuda", seconds < 0.1
    speeds = _speeds(device, seconds, nbytes or (2 << 30 if on_gpu else (64 if brief else 512) << 20))
    flops = _flops(device, seconds, 8192 if on_gpu else 512 if brief else 2048)
    return Limits(max(speeds.values()), speeds["copy"], max(flops.values()), flops)


def _speeds(device: torch.device, seconds: float, nbytes: int) -> dict[str, float]:
    """Return GB/s for each way to go through a buffer."""
    pattern = torch.rand(1 << 18, device=device)
    rows = torch.empty(nbytes // 4 // len(pattern), len(pattern), device=device)
    rows[:] = pattern  # not zeros, which some machines move faster
    floats = rows.view(-1)
    longs, half = floats.view(torch.int64), len(floats) // 2
    ways = {
        "sum of float32": lambda: floats.sum(),
        "sum of int64": lambda: longs.sum(),
        "norm": lambda: torch.linalg.vector_norm(floats),
        "copy": lambda: floats[:half].copy_(floats[half:]),  # half is read and half written: the same bytes
    }
    times, failed = measure({name: Rotation([call], device).sample for name, call in ways.items()}, seconds)
    for error in failed.values():
        raise error
    return {name: floats.nbytes / timing.seconds / 1e9 for name, timing in times.items()}


def _flops(device: torch.device, seconds: float, size: int) -> dict[str, float]:
    """Return operations a second of a matmul of large squares, for each dtype."""
    samplers: dict[str, Callable[[], float]] = {}
    for name, dtype in DTYPES.items():
        square = torch.randn(size, size, device=device).to(dtype)
        samplers[name] = Rotation([partial(linear, square, square)], device).sample
    times, failed = measure(samplers, seconds)
    for error in failed.values():
        raise error
    return {name: 2 * size**3 / timing.seconds for name, timing in times.items()}
