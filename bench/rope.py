"""`ropewalk bench rope`: rotary embeddings of q and k, ours and others', timed in one run and each checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ropewalk.bench.peers.rotary import Inputs, RotaryPeer
from ropewalk.bench.report import Report, Row, add_ratios, largest_error, quiet, verdict
from ropewalk.bench.timing import Rotation, copies, measure
from ropewalk.rope.frequencies import inverse_frequencies
from ropewalk.rope.reference import cos_sin, rope

# heads x heads of k x channels of a head; MPT has no rotary embedding.
PRESETS = {"llama-2-13b": ["40x40x128"], "codellama-34b": ["64x8x128"], "mixtral-8x7b": ["32x8x128"]}


@dataclass(frozen=True)
class Heads:
    """A model's heads."""

    heads: int
    kv_heads: int
    head_dim: int

    def nbytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Return the fewest bytes to move: q and k read once and written once."""
        return 2 * tokens * (self.heads + self.kv_heads) * self.head_dim * dtype.itemsize


def make_inputs(heads: Heads, tokens: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return random q and k at positions that end at 16383, with airophin's partial-NTK frequencies."""
    q, k = (
        torch.randn(1, tokens, n, heads.head_dim, device=device).to(dtype).transpose(1, 2)
        for n in (heads.heads, heads.kv_heads)
    )
    inv_freq, _ = inverse_frequencies(
        "partial-ntk", dim=heads.head_dim, factor=4, original_max_position_embeddings=4096, device=device
    )
    position_ids = torch.arange(tokens, device=device)[None] + max(0, 16384 - tokens)
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in cos_sin(inv_freq, position_ids))
    return Inputs(q, k, inv_freq, position_ids, cos, sin)


@torch.inference_mode()
def bench_rope(
    report: Report,
    shapes: Iterable[Heads],
    ms: Sequence[int],
    *,
    dtype: torch.dtype,
    peers: Sequence[RotaryPeer],
    seconds: float,
    rotate: int | None = None,
    deadline: float | None = None,
    on_case: Callable[[list[Row], list[Row]], None] | None = None,
) -> None:
    """Time peers on every shape and number of tokens, into `report`; see `matmul.bench_matmul`.

    The share of the limit is that of the measured copy bandwidth. A result is checked on a fresh copy of the
    inputs, since several peers write over them.
    """
    for heads in shapes:
        for tokens in ms:
            before = len(report.skipped)
            keys = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.head_dim}
            if deadline is not None and time.monotonic() > deadline:
                report.skip("all", "out of time", M=tokens, **keys)
                continue
            rows = _case(report, heads, tokens, keys, dtype, peers, seconds, rotate)
            report.results += rows
            if on_case is not None:
                on_case(rows, report.skipped[before:])


def _case(
    report: Report,
    heads: Heads,
    tokens: int,
    keys: Row,
    dtype: torch.dtype,
    peers: Sequence[RotaryPeer],
    seconds: float,
    rotate: int | None,
) -> list[Row]:
    device = report.device
    inputs = make_inputs(heads, tokens, dtype, device)
    given = (inputs.q.float(), inputs.k.float(), inputs.inv_freq, inputs.position_ids)
    expected = torch.cat([t.flatten() for t in rope(*given)])
    rounded = largest_error(expected.to(dtype), expected)
    largest = float(expected.abs().max())
    tolerance = 2 * rounded + 1e-5 * largest
    nbytes = heads.nbytes(tokens, dtype)
    count = copies(nbytes // 2, device, rotate)
    rotations, errors = {}, {}
    for peer in peers:
        try:
            with quiet():
                found = torch.cat([t.flatten() for t in peer.prepare(inputs.clone())()])
                errors[peer.name] = largest_error(found, expected)
                calls = [peer.prepare(inputs.clone()) for _ in range(count)]
                rotations[peer.name] = Rotation(calls, device)
        except Exception as error:
            report.fail(peer.name, error, M=tokens, **keys)
    timings, failed = measure({name: rotation.sample for name, rotation in rotations.items()}, seconds)
    for name, why in failed.items():
        report.fail(name, why, M=tokens, **keys)
    rows: list[Row] = []
    for name, timing in timings.items():
        speed = nbytes / timing.seconds / 1e9
        rows.append(
            {
                "kernel": name,
                "device": str(device),
                "bits": None,
                "group_size": None,
                "desc_act": None,
                "sym": None,
                "dtype": str(dtype).removeprefix("torch."),
                "M": tokens,
                "N": (heads.heads + heads.kv_heads) * heads.head_dim,
                "K": heads.head_dim,
                **keys,
                "seconds": timing.seconds,
                "gb_per_s": speed,
                "share_of_limit": speed / report.limits.copy_gb_per_s,
                "max_error": errors[name],
                "ratio_to": {},
                "verdict": verdict(errors[name], tolerance, largest),
                "tolerance": tolerance,
                "p20": timing.p20,
                "p80": timing.p80,
                "samples": timing.samples,
                "copies": count,
                "bound": "copy",
                "note": rotations[name].note,
            }
        )
    add_ratios(rows)
    return rows
