"""`ropewalk bench decode`: whole models decoding greedily, ours and others', in one run and each checked.

A case is a length of context and a number of sequences. Of what is in the cache when decoding begins the last tokens,
up to PROMPT, are a prompt that is read; before it lie random keys and values, the same for every program and for the
float32 model that results are checked against: reading 16,384 tokens would take minutes on a CPU, and tell nothing
more of decoding.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ropewalk.bench.decode_rows import CHECKED, MOST, Case, Timed, decode_row
from ropewalk.bench.memory import Meter, available_memory, too_little
from ropewalk.bench.model import NoRoomError, PackedModel, packed_model
from ropewalk.bench.peers.decode.base import DecodePeer, Decoder
from ropewalk.bench.peers.decode.models import Dense
from ropewalk.bench.peers.decode.plain import plain_model
from ropewalk.bench.peers.decode.with_transformers import TransformersDecoder
from ropewalk.bench.report import Report, Row, add_ratios, largest_error, quiet
from ropewalk.bench.shapes import Packing, Shape, parse_shape
from ropewalk.bench.timing import measure

PROMPT = 128  # tokens, at most, that are read before decoding
FILL_SECONDS = 120  # that a program may take to read what others are given as keys and values
ROUNDED = 3e9  # parameters above which a model is made of random codes: rounding would take many minutes

# What a dtype may cost where the run has no dense model in it to show that.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}


@dataclass(frozen=True)
class Lengths:
    """How much is decoded: tokens in the cache before, tokens to decode, and sequences; every combination is a case."""

    contexts: tuple[int, ...]
    tokens: int
    batches: tuple[int, ...] = (1,)

    def cases(self) -> list[Case]:
        """Return the cases, those of a batch size one after the other."""
        return [
            Case(context, min(context, PROMPT), batch, self.tokens)
            for batch in self.batches
            for context in self.contexts
        ]


@dataclass
class _Loaded:
    """A program with its model."""

    peer: DecodePeer
    decoder: Decoder
    dtype: torch.dtype
    nbytes: int


@dataclass
class _Checks:
    """What right logits are.

    Attributes:
        ids: int64 [P, PROMPT + CHECKED], prompts and the tokens after them.
        logits: by length of context, [P, CHECKED + 1, vocabulary].
    """

    ids: Tensor
    logits: dict[int, Tensor] = field(default_factory=dict)

    def given(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return ids [B, prompt + CHECKED] and logits of a case: the prompts take turns among its sequences."""
        rows = torch.arange(case.batch) % len(self.ids)
        return self.ids[rows, : case.prompt + CHECKED], self.logits[case.context][rows]


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
    """Time peers on every model and case, into `report`.

    All of them are loaded at once and take turns, each of which is a prompt and all tokens after it.

    Args:
        names: shapes, as `shapes.parse_shape` takes them.
        root: where models are kept.
        dtype: of activations, for the peers that have it.
        seconds: how long each peer decodes in a case, at least; three turns whatever it is.
        deadline: a `time.monotonic()` after which no further case begins.
        on_case: called with the rows of each case and what was skipped in it.

    Raises:
        DeviceLostError: a peer broke the GPU's context; the report has what came before.
        UsageError: a shape that cannot be packed so.
    """
    for packing in packings:
        for name in names:
            run = _Run(report, lengths, dtype, peers, seconds, deadline, on_case or (lambda rows, skipped: None))
            run.model(name, packing, root)
            gc.collect()  # models refer to themselves


@dataclass
class _Run:
    """The options of a run, for one model after the other."""

    report: Report
    lengths: Lengths
    dtype: torch.dtype
    peers: Sequence[DecodePeer]
    seconds: float
    deadline: float | None
    on_case: Callable[[list[Row], list[Row]], None]

    def model(self, name: str, packing: Packing, root: Path) -> None:
        """Time one model; all that was loaded is gone when this returns."""
        report, before = self.report, len(self.report.skipped)
        keys = {"model": name, **packing._asdict()}
        shape = parse_shape(name, packing)
        reason = "out of time" if self._late() else too_little(*self._needed(shape, packing))
        loaded: dict[str, _Loaded] = {}
        try:
            if reason is None:
                rounded = shape.parameters() < ROUNDED
                model = packed_model(name, packing, root, report.device, rounded=rounded)
                checks = self._checks(model, keys)
                loaded = self._load_all(model, keys)
        except NoRoomError as error:
            reason = str(error)
        if reason is not None:
            report.skip("all", reason, **keys)
        if len(report.skipped) > before:
            self.on_case([], report.skipped[before:])
        try:
            for case in self.lengths.cases() if loaded else ():
                before = len(report.skipped)
                rows = self._case(model, loaded, case, checks)
                report.results += rows
                self.on_case(rows, report.skipped[before:])
        finally:
            for one in loaded.values():
                one.decoder.close()

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _needed(self, shape: Shape, packing: Packing, context: int = 0) -> tuple[float, float | None]:
        """Return what the model that results are checked against needs, in float32, and what there is."""
        needed = reference_bytes(shape, packing) + self._prompts() * shape.kv_bytes(context, 4)
        return needed, available_memory(self.report.device)

    def _prompts(self) -> int:
        return min(2, max(self.lengths.batches))

    def _checks(self, model: PackedModel, keys: Row) -> _Checks:
        """Compute the logits that are right, where there is memory to do so."""
        report, shape = self.report, model.shape
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, shape.vocab, (self._prompts(), PROMPT + CHECKED), generator=generator)
        found = _Checks(ids)
        reference = TransformersDecoder(plain_model(model, torch.float32, report.device, unpack=False))
        wanted = {case.context: case for case in self.lengths.cases()}
        if any(case.filled for case in wanted.values()) and not all(peer.fills_at_once for peer in self.peers):
            wanted[PROMPT] = Case(PROMPT, PROMPT, 1, self.lengths.tokens)  # where those that read it all are checked
        for context, case in wanted.items():
            reason = None
            if shape.longest is not None and case.capacity > shape.longest:
                reason = f"has positions for {shape.longest} tokens"
            elif context > PROMPT:
                # The model itself is there already.
                _, free = self._needed(shape, model.packing)
                reason = too_little(self._prompts() * shape.kv_bytes(context, 4), free)
            if reason is not None:
                report.skip("all", reason, **keys, context=context)
                continue
            reference.start(len(ids), case.capacity)
            if case.filled:
                reference.fill(case.filled)
            found.logits[context] = reference.logits(ids[:, : case.prompt + CHECKED], CHECKED + 1).cpu()
        reference.close()
        gc.collect()
        return found

    def _load_all(self, model: PackedModel, keys: Row) -> dict[str, _Loaded]:
        """Load what fits; the reasons of the others go into the report."""
        found = {}
        for peer in self.peers:
            own = peer.dtype(self.dtype)
            reason = peer.cannot_run(model)
            reason = reason or too_little(peer.memory(model, own), available_memory(self.report.device))
            if reason is not None:
                self.report.skip(peer.name, reason, **keys)
                continue
            gc.collect()
            meter = Meter(self.report.device)
            before = meter.held()
            try:
                with quiet():
                    decoder = peer.load(model, own, self.report.device)
                    # What is made at the first call belongs to the model.
                    decoder.start(1, 16)
                    decoder.prefill(torch.arange(4)[None])
                    decoder.stop()
            except Exception as error:
                self.report.fail(peer.name, error, **keys)
                continue
            gc.collect()
            found[peer.name] = _Loaded(peer, decoder, own, max(0, meter.held() - before))
        return found

    def _case(self, model: PackedModel, loaded: dict[str, _Loaded], case: Case, checks: _Checks) -> list[Row]:
        """Time one case; its caches are gone when this returns."""
        report = self.report
        keys = {"model": model.name, **model.packing._asdict(), "context": case.context, "batch": case.batch}
        if case.context not in checks.logits:
            return []  # said already
        if self._late():
            report.skip("all", "out of time", **keys)
            return []
        timed: dict[str, Timed] = {}
        dense: dict[torch.dtype, float] = {}
        try:
            for name, one in loaded.items():
                reason = self._refuses(model, one, case)
                if reason is None:
                    try:
                        with quiet():
                            timed[name], reason = _prepare(model, one, case, checks, Meter(report.device))
                    except Exception as error:
                        report.fail(name, error, **keys)
                        continue
                if reason is not None:
                    timed.pop(name, None)
                    report.skip(name, reason, **keys)
                elif isinstance(one.peer, Dense):
                    dense[one.dtype] = min(timed[name].error, dense.get(one.dtype, MOST))
            _, failed = measure({name: one.decode for name, one in timed.items()}, self.seconds)
            for name, why in failed.items():
                report.fail(name, why, **keys)
            allowed = tolerances(dense)
            rows = [
                decode_row(report, model, loaded[name].peer, one, case, allowed[one.dtype])
                for name, one in timed.items()
                if name not in failed
            ]
            add_ratios(rows, "seconds_per_token")
            return rows
        finally:
            for one in loaded.values():
                one.decoder.stop()

    def _refuses(self, model: PackedModel, one: _Loaded, case: Case) -> str | None:
        """Return why a program does not take part in a case, or None."""
        most = one.peer.most_sequences
        if most is not None and case.batch > most:
            return f"is driven with {most} sequence here"
        cache = case.batch * model.shape.kv_bytes(case.capacity, one.dtype.itemsize)
        return too_little(cache, available_memory(self.report.device))


def reference_bytes(shape: Shape, packing: Packing) -> float:
    """Return how much memory the model takes that results are checked against, in float32, without keys and values."""
    widest = max(k * n for _, k, n in shape.linears())
    return shape.packed_bytes(packing) + 4 * (2 * shape.vocab * shape.hidden + 3 * widest)


def tolerances(dense: Mapping[torch.dtype, float]) -> dict[torch.dtype, float]:
    """Return what each dtype may cost: twice what it costs a model with unpacked weights, by its error, if one ran."""
    # Such a model may be the one that is wrong.
    return TOLERANCE | {own: min(2 * error + TOLERANCE[torch.float32], MOST) for own, error in dense.items()}


def _prepare(model: PackedModel, one: _Loaded, case: Case, checks: _Checks, meter: Meter) -> tuple[Timed, str | None]:
    """Check a program's logits and fill its cache; return it ready, and why it is not to be timed, or None."""
    decoder = one.decoder
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, model.shape.vocab, (case.batch, case.prompt), generator=generator)
    timed = Timed(one.dtype, one.nbytes, prompt, case, note=decoder.note, decoder=decoder)
    before = meter.held()
    decoder.start(case.batch, case.capacity)
    at = case if one.peer.fills_at_once else Case(case.prompt, case.prompt, case.batch, case.tokens)
    if at.filled:
        decoder.fill(at.filled)
    ids, expected = checks.given(at)
    begin = time.perf_counter()
    # Copies: the next call may overwrite what this one returned.
    found = [decoder.prefill(ids[:, : at.prompt]).float().cpu().clone()]
    seconds = time.perf_counter() - begin
    found += [decoder.step(tokens).float().cpu().clone() for tokens in ids[:, at.prompt :].unbind(1)]
    logits = torch.stack(found, 1)
    timed.error = largest_error(logits, expected) / float(expected.abs().max())
    timed.agreeing = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    if at.filled < case.filled:
        takes = seconds / at.prompt * case.filled
        if takes > FILL_SECONDS:
            return timed, f"would take about {takes:.0f} s to read {case.filled} tokens"
        decoder.rewind(0)
        decoder.fill(case.filled)
        timed.filled_by = "tokens"
    timed.nbytes += max(0, meter.peak() - before)
    return timed, None
