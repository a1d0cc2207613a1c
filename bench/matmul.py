"""`ropewalk bench matmul`: packed matmuls, ours and others', timed in one run and each checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from ropewalk.bench.peers.base import Peer
from ropewalk.bench.peers.weight import Weight, random_weight
from ropewalk.bench.products import Ready, product_row, time_calls
from ropewalk.bench.report import Report, Row, add_ratios, largest_error, quiet
from ropewalk.bench.timing import copies

# K x N of the layers of a model, those of attention first; the last is gate and up in one.
PRESETS = {
    "cpu": ["4096x4096", "5120x13824", "13824x5120", "8192x22016"],
    "llama-2-13b": ["5120x5120", "5120x13824", "13824x5120", "5120x27648"],
    "codellama-34b": ["8192x1024", "8192x8192", "8192x22016", "22016x8192", "8192x44032"],
    "mpt-30b": ["7168x7168", "7168x21504", "7168x28672", "28672x7168"],
    "mixtral-8x7b": ["4096x1024", "4096x4096", "4096x14336", "14336x4096", "4096x28672"],
}


@dataclass(frozen=True)
class Setting:
    """A packed weight to time: its K and N and how it is packed."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    desc_act: bool
    sym: bool

    def keys(self) -> Row:
        """Return it as rows have it."""
        kept = ("bits", "group_size", "desc_act", "sym")
        return {**{name: getattr(self, name) for name in kept}, "K": self.in_features, "N": self.out_features}


@torch.inference_mode()
def bench_matmul(
    report: Report,
    settings: Iterable[Setting],
    ms: Sequence[int],
    *,
    dtype: torch.dtype,
    peers: Sequence[Peer],
    seconds: float,
    rotate: int | None = None,
    deadline: float | None = None,
    on_case: Callable[[list[Row], list[Row]], None] | None = None,
) -> None:
    """Time peers on every setting and M, into `report`.

    Args:
        ms: rows of x.
        dtype: of x and of the result, for the peers that have it.
        seconds: how long each peer runs in a case.
        rotate: bytes of weights to rotate over; see `timing.copies`.
        deadline: a `time.monotonic()` after which no further case begins.
        on_case: called with the rows of each case and what was skipped in it.

    Raises:
        DeviceLostError: a peer broke the GPU's context; the report has what came before.
        FormatError: a setting that the format cannot hold.
    """
    for setting in settings:
        if deadline is not None and time.monotonic() > deadline:
            report.skip("all", "out of time", **setting.keys())
        else:
            _setting(report, setting, ms, dtype, peers, seconds, rotate, deadline, on_case)


def _setting(
    report: Report,
    setting: Setting,
    ms: Sequence[int],
    dtype: torch.dtype,
    peers: Sequence[Peer],
    seconds: float,
    rotate: int | None,
    deadline: float | None,
    on_case: Callable[[list[Row], list[Row]], None] | None,
) -> None:
    """Time one setting; all of its copies are gone when this returns."""
    before = len(report.skipped)
    try:
        weight = random_weight(**asdict(setting), device=report.device)
        ready = _prepare(report, weight, setting, dtype, peers, rotate)
        dense = {torch.float32: weight.dense().t().contiguous()}
        for own in {peer.dtype for peer in ready.values()}:
            dense[own] = dense[torch.float32].to(own)
    except torch.OutOfMemoryError as error:
        report.fail("all", error, **setting.keys())
        return
    for m in ms:
        rows: list[Row] = []
        try:
            if deadline is not None and time.monotonic() > deadline:
                report.skip("all", "out of time", M=m, **setting.keys())
            else:
                rows = _case(report, setting, m, dense, ready, seconds)
        except torch.OutOfMemoryError as error:  # by the reference; a peer's own is that peer's failure
            report.fail("all", error, M=m, **setting.keys())
        report.results += rows
        if on_case is not None:
            on_case(rows, report.skipped[before:])
        before = len(report.skipped)


def _prepare(
    report: Report, weight: Weight, setting: Setting, dtype: torch.dtype, peers: Sequence[Peer], rotate: int | None
) -> dict[str, Ready]:
    ready: dict[str, Ready] = {}
    for peer in peers:
        reason = peer.refuses(weight)
        if reason is not None:
            report.skip(peer.name, reason, **setting.keys())
            continue
        own = peer.dtype(dtype)
        nbytes = peer.nbytes(weight, own)
        count = copies(nbytes, report.device, rotate, peer.most_copies)
        try:
            with quiet():
                runs = [peer.prepare(weight.clone(), own) for _ in range(count)]
        except Exception as error:
            report.fail(peer.name, error, **setting.keys())
            continue
        ready[peer.name] = Ready(own, nbytes, peer.mode, runs)
    return ready


def _case(
    report: Report,
    setting: Setting,
    m: int,
    dense: dict[torch.dtype, Tensor],
    ready: dict[str, Ready],
    seconds: float,
) -> list[Row]:
    """Time the peers that are ready on one M; `dense` is the weight [N, K] in float32 and their dtypes."""
    device = report.device
    keys = {"M": m, **setting.keys()}
    # Numbers that every dtype holds exactly, so that all peers get the same problem.
    x = torch.randn(m, setting.in_features, device=device).bfloat16().float()
    expected = linear(x, dense[torch.float32])
    largest = float(expected.abs().max())
    tolerances = {own: 2 * largest_error(linear(x.to(own), w), expected) + 1e-5 * largest for own, w in dense.items()}
    given = {own: x.to(own) for own in dense}
    calls = {name: [partial(run, given[peer.dtype]) for run in peer.runs] for name, peer in ready.items()}
    rows = []
    for one in time_calls(report, calls, expected, seconds, keys):
        peer = ready[one.name]
        nbytes = peer.nbytes + m * (setting.in_features + setting.out_features) * peer.dtype.itemsize
        operations = 2 * m * setting.in_features * setting.out_features
        rows.append(product_row(report, peer, one, keys, nbytes, operations, tolerances[peer.dtype], largest))
    add_ratios(rows)
    return rows
