"""What the benchmarks of matmuls and of experts share: calls that are timed and checked, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.report import Report, Row, largest_error, quiet, verdict
from ropewalk.bench.timing import Rotation, Timing, measure


@dataclass
class Ready:
    """A peer with its copies of the weights.

    Attributes:
        dtype: that it computes in.
        nbytes: the fewest bytes of weights that a call must read.
        runs: functions, each with buffers of its own.
    """

    dtype: torch.dtype
    nbytes: float
    mode: str | None
    runs: list[Callable[..., Tensor]]


@dataclass(frozen=True)
class Timed:
    """A peer's time in a case, its largest error, and what there is to say of how it was timed."""

    name: str
    timing: Timing
    error: float
    note: str


def time_calls(
    report: Report,
    calls: Mapping[str, Sequence[Callable[[], Tensor]]],
    expected: Tensor,
    seconds: float,
    keys: Mapping[str, Any],
) -> Iterator[Timed]:
    """Check and time peers in turns; those that fail go into the report.

    Args:
        calls: name -> calls without arguments that do the same work on different buffers.
        expected: what each of them is to return.
        seconds: how long each peer runs.
        keys: of the case.
    """
    rotations, errors = {}, {}
    for name, own in calls.items():
        try:
            with quiet():
                rotations[name] = Rotation(own, report.device)
            errors[name] = largest_error(rotations[name].result(), expected)
        except Exception as error:
            rotations.pop(name, None)
            report.fail(name, error, **keys)
    timings, failed = measure({name: rotation.sample for name, rotation in rotations.items()}, seconds)
    for name, why in failed.items():
        report.fail(name, why, **keys)
    for name, timing in timings.items():
        yield Timed(name, timing, errors[name], rotations[name].note)


def product_row(
    report: Report,
    peer: Ready,
    one: Timed,
    keys: Mapping[str, Any],
    nbytes: float,
    operations: float,
    tolerance: float,
    largest: float,
    most: float = 0.02,
) -> Row:
    """Return a row, its ratios still to be filled in.

    Args:
        nbytes, operations: of the whole case, which set the limit.
        tolerance, largest, most: as `verdict` takes them.
    """
    least, bound = report.limits.least_seconds(nbytes, operations)
    timing = one.timing
    return {
        "kernel": one.name,
        "device": str(report.device),
        **keys,
        "dtype": str(peer.dtype).removeprefix("torch."),
        "seconds": timing.seconds,
        "gb_per_s": nbytes / timing.seconds / 1e9,
        "share_of_limit": least / timing.seconds,
        "max_error": one.error,
        "ratio_to": {},
        "verdict": verdict(one.error, tolerance, largest, most),
        "tolerance": tolerance,
        "p20": timing.p20,
        "p80": timing.p80,
        "samples": timing.samples,
        "copies": len(set(map(id, peer.runs))),
        "bound": bound,
        "mode": peer.mode,
        "note": "; ".join(filter(None, (getattr(peer.runs[0], "note", ""), one.note))),
    }
