"""`ropewalk bench moe`: the experts of a mixture, ours and others', timed in one run and each checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.memory import available_memory, too_little
from ropewalk.bench.peers.experts import ExpertsPeer, Mixture, Sizes, random_mixture, reference
from ropewalk.bench.products import Ready, product_row, time_calls
from ropewalk.bench.report import Report, Row, add_ratios, largest_error, quiet
from ropewalk.bench.shapes import Packing
from ropewalk.bench.timing import copies

PRESETS = {"mixtral-8x7b": "8x4096x14336:2"}
# Two products follow each other, and each may round its activations to 8 bits (see `report.verdict`).
MOST = 0.04


@dataclass
class _Problem:
    """Tokens and where they go; cases with fewer tokens take the first of them.

    Attributes:
        x: float32 [T, hidden], of numbers that every dtype holds.
        expert_ids: int64 [T, top_k], `top_k` different ones, all sets alike likely.
        weights: float32 [T, top_k], of numbers that every dtype holds.
        expected: float32 [T, hidden].
        found: what torch gives in each dtype that peers compute in.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    expected: Tensor
    found: dict[torch.dtype, Tensor]


@torch.inference_mode()
def bench_moe(
    report: Report,
    shapes: Iterable[Sizes],
    packings: Iterable[Packing],
    ms: Sequence[int],
    *,
    dtype: torch.dtype,
    peers: Sequence[ExpertsPeer],
    seconds: float,
    rotate: int | None = None,
    deadline: float | None = None,
    on_case: Callable[[list[Row], list[Row]], None] | None = None,
) -> None:
    """Time peers on every mixture, packing and number of tokens, into `report`; see `matmul.bench_matmul`.

    The limit of a peer is to read the experts that have tokens, as it keeps them, or to multiply with them.

    Raises:
        DeviceLostError: a peer broke the GPU's context; the report has what came before.
        FormatError: a setting that the format cannot hold.
    """
    for packing in packings:
        for sizes in shapes:
            before = len(report.skipped)
            keys = _keys(sizes, packing)
            reason = "out of time" if deadline is not None and time.monotonic() > deadline else None
            reason = reason or too_little(_least_memory(sizes, packing), available_memory(report.device))
            if reason is not None:
                report.skip("all", reason, **keys)
            else:
                try:
                    _mixture(report, sizes, packing, ms, dtype, peers, seconds, rotate, deadline, on_case)
                    continue
                except torch.OutOfMemoryError as error:
                    report.fail("all", error, **keys)
            if on_case is not None:
                on_case([], report.skipped[before:])


def _keys(sizes: Sizes, packing: Packing) -> Row:
    return {**packing._asdict(), "experts": sizes.experts, "top_k": sizes.top_k, "K": sizes.hidden, "N": sizes.ffn}


def _least_memory(sizes: Sizes, packing: Packing) -> float:
    """Return the bytes of the packed layers and of those of ours, and of a layer unpacked."""
    packed = 3 * sizes.experts * packing.nbytes(sizes.hidden, sizes.ffn)
    return 2 * packed + 12 * sizes.hidden * sizes.ffn


def _mixture(
    report: Report,
    sizes: Sizes,
    packing: Packing,
    ms: Sequence[int],
    dtype: torch.dtype,
    peers: Sequence[ExpertsPeer],
    seconds: float,
    rotate: int | None,
    deadline: float | None,
    on_case: Callable[[list[Row], list[Row]], None] | None,
) -> None:
    """Time one mixture; all of its copies are gone when this returns."""
    before = len(report.skipped)
    mixture = random_mixture(sizes, packing, report.device)
    ready = _prepare(report, mixture, packing, dtype, peers, rotate)
    problem = _problem(mixture, max(ms), {one.dtype for one in ready.values()}, report.device)
    for m in ms:
        rows: list[Row] = []
        keys = {"M": m, **_keys(sizes, packing)}
        if deadline is not None and time.monotonic() > deadline:
            report.skip("all", "out of time", **keys)
        else:
            here = {}
            for peer in peers:
                if peer.name not in ready:
                    continue
                reason = peer.too_many(sizes, m, ready[peer.name].dtype)
                if reason is None:
                    here[peer.name] = ready[peer.name]
                else:
                    report.skip(peer.name, reason, **keys)
            rows = _case(report, sizes, m, problem, here, seconds, keys)
        report.results += rows
        if on_case is not None:
            on_case(rows, report.skipped[before:])
        before = len(report.skipped)


def _prepare(
    report: Report,
    mixture: Mixture,
    packing: Packing,
    dtype: torch.dtype,
    peers: Sequence[ExpertsPeer],
    rotate: int | None,
) -> dict[str, Ready]:
    """Prepare each peer over enough copies that no cache serves the experts of a single token."""
    ready: dict[str, Ready] = {}
    sizes, keys = mixture.sizes, _keys(mixture.sizes, packing)
    kept = [mixture]
    for peer in peers:
        own = peer.dtype(dtype)
        nbytes = peer.nbytes(mixture, own)
        count = min(copies(sizes.top_k * nbytes, report.device, rotate, least=1), peer.most_copies)
        new = count - sum(own in one.unpacked for one in kept) if peer.dense else count
        needed = max(0, new) * sizes.experts * nbytes
        reason = peer.refuses(mixture) or too_little(needed, available_memory(report.device))
        if reason is not None:
            report.skip(peer.name, reason, **keys)
            continue
        try:
            while len(kept) < count:
                kept.append(mixture.clone())
            with quiet():
                runs: list[Any] = [peer.prepare(one, own) for one in kept[:count]]
        except Exception as error:
            report.fail(peer.name, error, **keys)
            continue
        if report.device.type == "cuda":
            # A graph of several calls hides what launching it costs.
            runs = [runs[i % count] for i in range(max(8, count))]
        ready[peer.name] = Ready(own, nbytes, peer.mode, runs)
    return ready


def _problem(mixture: Mixture, tokens: int, dtypes: Iterable[torch.dtype], device: torch.device) -> _Problem:
    """Return random tokens, routed at random, and what is right for them; the seed is torch's."""
    experts, hidden, _, top_k = mixture.sizes
    x = torch.randn(tokens, hidden, device=device).bfloat16().float()
    expert_ids = torch.rand(tokens, experts, device=device).argsort(1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, device=device).add(0.5)
    weights = (weights / weights.sum(1, keepdim=True)).bfloat16().float()
    expected = reference(mixture, x, expert_ids, weights, torch.float32)
    found = {own: reference(mixture, x, expert_ids, weights, own) for own in dtypes}
    return _Problem(x, expert_ids, weights, expected, found)


def _case(
    report: Report,
    sizes: Sizes,
    m: int,
    problem: _Problem,
    ready: dict[str, Ready],
    seconds: float,
    keys: Row,
) -> list[Row]:
    """Time the peers that are ready on the first `m` tokens."""
    expected, expert_ids = problem.expected[:m], problem.expert_ids[:m]
    largest = float(expected.abs().max())
    tolerances = {own: 2 * largest_error(found[:m], expected) + 1e-5 * largest for own, found in problem.found.items()}
    calls = {}
    for name, peer in ready.items():
        given = (problem.x[:m].to(peer.dtype), expert_ids, problem.weights[:m].to(peer.dtype))
        calls[name] = [partial(run, *given) for run in peer.runs]
    hit = len(expert_ids.unique())
    rows = []
    for one in time_calls(report, calls, expected, seconds, keys):
        peer = ready[one.name]
        nbytes = hit * peer.nbytes + 2 * m * sizes.hidden * peer.dtype.itemsize
        operations = 6 * m * sizes.top_k * sizes.hidden * sizes.ffn
        row = product_row(report, peer, one, keys, nbytes, operations, tolerances[peer.dtype], largest, MOST)
        rows.append({**row, "experts_hit": hit})
    add_ratios(rows)
    return rows
