"""How long a call takes, with its weights out of the cache and its neighbours in the same run.

A kernel is given as several calls that do the same work on different buffers, so that no cache serves the
weights. On a GPU all of them are captured into one CUDA graph, which takes the launches' cost away; on a CPU
they are called in turn. Kernels that are compared take turns too, so that a machine that slows down slows
all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TURN = 0.05  # seconds that a kernel runs before the next one does
FEWEST = 5  # samples, whatever the time


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, and their 20th and 80th percentile."""

    seconds: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summarize samples, of which there is at least one."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


class Rotation:
    """Calls that do the same work on different buffers, timed in turn.

    Args:
        calls: functions without arguments that return a tensor or a tuple of tensors.
        device: where they run.

    Attributes:
        graph: the CUDA graph that replays them; None on a CPU, and where capturing failed.
        note: why capturing failed, or "".
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device):
        self.calls = list(calls)
        self.device = device
        self.graph: Any = None
        self.note = ""
        self._next = 0
        # What compiles, tunes or allocates does so here; GPTQModel compiles each layer at its second call.
        for call in self.calls * 2:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._capture()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.output = self.calls[0]()
                for call in self.calls[1:]:
                    call()  # its output's memory serves the next one
        except RuntimeError as error:
            # A kernel that synchronizes or allocates by itself is still worth timing, with its launches.
            self.note = "no CUDA graph: " + " ".join(str(error).split())[:120]
            torch.cuda.synchronize(self.device)
            return
        self.graph = graph

    def sample(self) -> float:
        """Run, and return the seconds that one call took."""
        if self.device.type == "cpu":
            call = self.calls[self._next]
            self._next = (self._next + 1) % len(self.calls)
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / len(self.calls)

    def result(self) -> Tensor:
        """Return what the first call computes, by the way that is timed."""
        if self.graph is None:
            return self.calls[0]()
        self.output.fill_(math.nan)
        self.graph.replay()
        torch.cuda.synchronize(self.device)
        return self.output


def copies(nbytes: float, device: torch.device, rotate: int | None = None, most: int = 192, least: int = 8) -> int:
    """Return over how many buffers of `nbytes` to rotate.

    On a CPU they fill 160 MB; on a GPU four times its L2 cache.

    Args:
        rotate: bytes to fill, instead of those.
        most: the limit for very small buffers.
        least: of them on a GPU, where a graph of several calls hides what launching it costs.
    """
    if device.type == "cuda":
        rotate = rotate or 4 * torch.cuda.get_device_properties(device).L2_cache_size
        return min(max(least, math.ceil(rotate / nbytes)), most)
    return min(math.ceil((rotate or 160_000_000) / nbytes), most)


def measure(
    samplers: Mapping[str, Callable[[], float]], seconds: float
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time several kernels in turns.

    Args:
        samplers: name -> a function that runs the kernel and returns the seconds a call took.
        seconds: how long each of them is sampled. One that is slow enough for this to be passed by its first
            samples stops after three.

    Returns:
        name -> its timing, and name -> its error for those that failed.
    """
    turn = min(TURN, seconds / 3)
    found: dict[str, list[float]] = {name: [] for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    failed: dict[str, Exception] = {}
    waiting = list(samplers)
    while waiting:
        for name in list(waiting):
            begin = time.perf_counter()
            try:
                first = samplers[name]()
                # The others have just used the caches and the threads; a short first sample would show that.
                if time.perf_counter() - begin > turn:
                    found[name].append(first)
                while time.perf_counter() - begin < turn:
                    found[name].append(samplers[name]())
            except Exception as error:
                failed[name] = error
                waiting.remove(name)
                continue
            spent[name] += time.perf_counter() - begin
            enough = FEWEST if spent[name] < 5 * seconds else 3
            if spent[name] >= seconds and len(found[name]) >= enough:
                waiting.remove(name)
    return {name: Timing.of(found[name]) for name in samplers if name not in failed}, failed
