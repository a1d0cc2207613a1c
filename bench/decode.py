"""`ropewalk bench decode`: whole models decoding greedily, ours and others', in one run and each checked."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.model import PackedModel, Packing, packed_model
from ropewalk.bench.peers.decode.base import DecodePeer, Decoder, TransformersDecoder
from ropewalk.bench.peers.decode.models import Dense, plain_model
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.report import Report, Row, add_ratios, largest_error, quiet, verdict
from ropewalk.bench.timing import Timing, measure
from ropewalk.loader.quant_linear import QuantLinear

CHECKED = 8  # tokens after the prompt whose logits are compared, besides those of its last one
SPARE = 2_000_000_000  # bytes of memory to leave alone

# Largest error of logits over the largest logit. What rounds activations to 8 bits in each of 22 layers of random
# weights is off by 0.05 (llama.cpp), and bfloat16 by 0.03; a model that computes something else by 0.4 and more.
MOST = 0.1
# What a dtype may cost where the run has no dense model in it to show that.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}


@dataclass(frozen=True)
class Lengths:
    """How much is decoded: a prompt, and the tokens after it."""

    prompt: int
    tokens: int

    @property
    def context(self) -> float:
        """Tokens that are there already when one is decoded, on average."""
        return self.prompt + (self.tokens - 1) / 2


@dataclass
class _Running:
    """A loaded decoder and what was measured of it."""

    decoder: Decoder
    dtype: torch.dtype
    mode: str | None
    nbytes: float
    prompt: Tensor
    tokens: int
    error: float = 0.0
    agreeing: int = 0
    steps: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)

    def decode(self) -> float:
        """Read the prompt and decode greedily; return the seconds of a token, by the median."""
        begin = time.perf_counter()
        token = int(self.decoder.prefill(self.prompt).argmax())  # reading the number waits for a GPU
        self.prefills.append(time.perf_counter() - begin)
        steps = []
        for _ in range(self.tokens):
            begin = time.perf_counter()
            token = int(self.decoder.step(token).argmax())
            steps.append(time.perf_counter() - begin)
        self.steps += steps
        return Timing.of(steps).seconds


@torch.inference_mode()
def bench_decode(
    report: Report,
    names: Sequence[str],
    packings: Iterable[Packing],
    lengths: Lengths,
    *,
    root: Path,
    dtype: torch.dtype,
    peers: Sequence[DecodePeer],
    seconds: float,
    deadline: float | None = None,
    on_case: Callable[[list[Row], list[Row]], None] | None = None,
) -> None:
    """Time peers on every model, into `report`.

    All of them are loaded at once and take turns, each of which is a prompt and all tokens after it.

    Args:
        names: shapes, as `model.parse_shape` takes them.
        root: where models are kept.
        dtype: of activations, for the peers that have it.
        seconds: how long each peer decodes, at least; three turns whatever it is.
        deadline: a `time.monotonic()` after which no further model begins.
        on_case: called with the rows of each model and what was skipped in it.

    Raises:
        DeviceLostError: a peer broke the GPU's context; the report has what came before.
        UsageError: a shape that cannot be packed so.
    """
    for packing in packings:
        for name in names:
            before, rows = len(report.skipped), []
            keys = {"model": name, **packing._asdict()}
            if deadline is not None and time.monotonic() > deadline:
                report.skip("all", "out of time", **keys)
            else:
                model = packed_model(name, packing, root, report.device)
                rows = _model(report, model, lengths, dtype, peers, seconds)
            report.results += rows
            if on_case is not None:
                on_case(rows, report.skipped[before:])
            gc.collect()  # models refer to themselves


def _model(
    report: Report,
    model: PackedModel,
    lengths: Lengths,
    dtype: torch.dtype,
    peers: Sequence[DecodePeer],
    seconds: float,
) -> list[Row]:
    """Time one model; all that was loaded is gone when this returns."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.shape.vocab, (lengths.prompt + CHECKED,), generator=generator)
    reference = plain_model(model, torch.float32, report.device, unpack=False)
    expected = reference(input_ids=ids[None].to(report.device), use_cache=False).logits[0, lengths.prompt - 1 :].cpu()
    del reference
    keys = {"model": model.name, **model.packing._asdict()}
    running: dict[str, _Running] = {}
    dense: dict[torch.dtype, float] = {}
    try:
        for peer in peers:
            one = _load(report, peer, model, ids, expected, lengths, dtype, keys)
            if one is not None:
                running[peer.name] = one
                if isinstance(peer, Dense):
                    dense[one.dtype] = one.error
        _, failed = measure({name: one.decode for name, one in running.items()}, seconds)
        for name, why in failed.items():
            report.fail(name, why, **keys)
        tolerances = {one.dtype: TOLERANCE[one.dtype] for one in running.values()}
        tolerances |= {own: 2 * error + TOLERANCE[torch.float32] for own, error in dense.items()}
        rows = [
            _row(report, model, name, one, lengths, tolerances[one.dtype])
            for name, one in running.items()
            if name not in failed
        ]
        add_ratios(rows, "seconds_per_token")
        return rows
    finally:
        for one in running.values():
            one.decoder.close()


def _load(
    report: Report,
    peer: DecodePeer,
    model: PackedModel,
    ids: Tensor,
    expected: Tensor,
    lengths: Lengths,
    dtype: torch.dtype,
    keys: Row,
) -> _Running | None:
    """Load a peer and compare its logits; return None, with the reason in the report, where that does not go."""
    own = peer.dtype(dtype)
    needed, free = peer.memory(model, own), available_memory(report.device)
    reason = peer.cannot_hold(model.packing)
    if reason is None and free is not None and needed + SPARE > free:
        reason = f"needs about {needed / 1e9:.1f} GB of memory, of which {max(free - SPARE, 0) / 1e9:.1f} are left"
    if reason is not None:
        report.skip(peer.name, reason, **keys)
        return None
    capacity = lengths.prompt + max(lengths.tokens, CHECKED)
    try:
        with quiet():
            decoder = peer.load(model, own, report.device, capacity)
            prompt = ids[: lengths.prompt]
            # Copies: the next call may overwrite what this one returned.
            found = [decoder.prefill(prompt).float().cpu().clone()]
            found += [decoder.step(int(token)).float().cpu().clone() for token in ids[lengths.prompt :]]
    except Exception as error:
        report.fail(peer.name, error, **keys)
        return None
    logits = torch.stack(found)
    one = _Running(decoder, own, peer.mode, peer.nbytes(model, own, lengths.context), prompt, lengths.tokens)
    one.error = largest_error(logits, expected) / float(expected.abs().max())
    one.agreeing = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    return one


def _row(report: Report, model: PackedModel, name: str, one: _Running, lengths: Lengths, tolerance: float) -> Row:
    timing, prefill = Timing.of(one.steps), Timing.of(one.prefills)
    least = one.nbytes / (report.limits.read_gb_per_s * 1e9)
    row: Row = {
        "kernel": name,
        "device": str(report.device),
        "model": model.name,
        **model.packing._asdict(),
        "dtype": str(one.dtype).removeprefix("torch."),
        "prompt_tokens": lengths.prompt,
        "tokens": lengths.tokens,
        "seconds_per_token": timing.seconds,
        "tokens_per_s": 1 / timing.seconds,
        "prefill_tokens_per_s": lengths.prompt / prefill.seconds,
        "gb_per_s": one.nbytes / timing.seconds / 1e9,
        "share_of_limit": least / timing.seconds,
        "limit_tokens_per_s": 1 / least,
        "token_bytes": one.nbytes,
        "max_error": one.error,
        "ratio_to": {},
        "verdict": verdict(one.error, tolerance, 1.0, MOST),
        "tolerance": tolerance,
        "same_choice": one.agreeing / (CHECKED + 1),
        "p20": timing.p20,
        "p80": timing.p80,
        "samples": timing.samples,
        "mode": one.mode,
        "note": one.decoder.note,
    }
    if name.startswith(OURS) and isinstance(one.decoder, TransformersDecoder):
        row["time_in"] = time_in(one.decoder, one.prompt, min(lengths.tokens, 16))
    return row


def time_in(decoder: TransformersDecoder, prompt: Tensor, tokens: int) -> dict[str, float]:
    """Return which share of a token's time is spent in packed layers, in the output embedding, and elsewhere.

    What it takes to look at the clock counts as elsewhere; that is about 2 µs for each layer.
    """
    spent = {"packed": 0.0, "lm_head": 0.0}
    device = decoder.model.device
    head = decoder.model.get_output_embeddings()
    begun = [0.0]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(module: Any, inputs: Any) -> None:
        begun[0] = now()

    def after(module: Any, inputs: Any, output: Any) -> None:
        spent["lm_head" if module is head else "packed"] += now() - begun[0]

    with _hooks(decoder.model, lambda module: module is head or isinstance(module, QuantLinear), before, after):
        token = int(decoder.prefill(prompt).argmax())
        spent.update(packed=0.0, lm_head=0.0)
        begin = now()
        for _ in range(tokens):
            token = int(decoder.step(token).argmax())
        total = now() - begin
    shares = {name: seconds / total for name, seconds in spent.items()}
    return {**shares, "elsewhere": 1 - sum(shares.values())}


@contextmanager
def _hooks(model: Any, wanted: Callable[[Any], bool], before: Any, after: Any) -> Iterator[None]:
    handles = []
    for module in model.modules():
        if wanted(module):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def available_memory(device: torch.device) -> float | None:
    """Return how many bytes a device has left, or None where nothing says so."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return None
