"""`ropewalk bench decode --engine vllm`: whole models in vLLM, by our method, by its own, and with unpacked weights.

Each engine has a process of its own. All are there at once and take turns: a turn reads the prompts of a case and
decodes greedily, step by step, as `vllm.LLM.generate` does. What is checked are the tokens that an engine chose, and
how likely it found these and the next best ones, against a float32 model that is given the same tokens.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ropewalk import cpu
from ropewalk.bench.decode import Lengths, reference_bytes, tolerances
from ropewalk.bench.decode_rows import CHECKED, MOST, Case, Measured, decode_row
from ropewalk.bench.engine_check import PROBABLE, Reference, score
from ropewalk.bench.engine_process import EngineError, EngineProcess
from ropewalk.bench.memory import available_memory, too_little
from ropewalk.bench.model import NoRoomError, PackedModel, packed_model
from ropewalk.bench.peers.engines import VllmPeer, VllmUnpacked
from ropewalk.bench.report import Report, Row, add_ratios
from ropewalk.bench.shapes import Packing, parse_shape
from ropewalk.bench.timing import measure
from ropewalk.terminal import size

CACHE = 1 << 30  # bytes for keys and values, at least: what an engine is given that shares a machine
AT_ONCE = 2048  # tokens that a step reads, at least: vLLM's own number


@dataclass
class Engine:
    """An engine with its model.

    Attributes:
        found: what it said of itself when it had started.
        cache: bytes that it has for keys and values.
    """

    peer: VllmPeer
    process: EngineProcess
    dtype: torch.dtype
    found: Row
    cache: int

    @property
    def note(self) -> str:
        """What it is made of, for a person."""
        how = "compiled" if self.found["compiled"] else "not compiled"
        method = self.found["quantization"] or "no quantization"
        return f"vLLM {self.found['version']}, {method}, {how}; {size(self.cache)} of the memory for keys and values"


@dataclass
class _Turns(Measured):
    """An engine in a case."""

    engine: Engine = field(kw_only=True)
    chosen: list[list[int]] | None = None

    def decode(self) -> float:
        """Read the prompts and decode; return the seconds of a step, by the mean of the turn."""
        # The first token comes of the prompt.
        found = self.engine.process.order(prompts=self.prompt.tolist(), tokens=self.case.tokens + 1)
        self.prefills.append(found["prefill"])
        self.steps += found["steps"]
        self.nbytes = max(self.nbytes, self.engine.found["nbytes"] + found["peak_bytes"])
        self.chosen = self.chosen or found["tokens"]
        if self.chosen != found["tokens"] and "differ" not in self.note:
            self.note += "; its turns differ in their tokens"
        return math.fsum(found["steps"]) / len(found["steps"])


def bench_engine(
    report: Report,
    names: Sequence[str],
    packings: Iterable[Packing],
    lengths: Lengths,
    *,
    root: Path,
    dtype: torch.dtype,
    peers: Sequence[VllmPeer],
    seconds: float,
    threads: int,
    eager: bool = False,
    deadline: float | None = None,
    on_case: Callable[[list[Row], list[Row]], None] | None = None,
    start: Callable[[int, str | None], EngineProcess] | None = None,
) -> None:
    """Time engines on every model and case, into `report`.

    Args:
        names: shapes, as `shapes.parse_shape` takes them.
        lengths: prompts are as long as their contexts, and engines read all of that.
        root: where models are kept.
        dtype: of activations.
        seconds: how long each engine decodes in a case, at least; three turns whatever it is.
        threads: of each engine, on a CPU.
        eager: whether to leave out torch.compile.
        deadline: a `time.monotonic()` after which no further engine starts and no further case begins.
        on_case: called with the rows of each case and what was skipped in it.
        start: makes a process, of threads and a mode of our kernels; `EngineProcess` by default.

    Raises:
        UsageError: a shape that cannot be packed so.
    """
    if report.device.type == "cpu":
        cpu.load()  # or the first engine would compile it
    for packing in packings:
        for name in names:
            run = _Run(report, lengths, dtype, peers, seconds, deadline, threads, eager, start or EngineProcess)
            run.on_case = on_case or run.on_case
            run.model(name, packing, root)
            gc.collect()


@dataclass
class _Run:
    """The options of a run, for one model after the other."""

    report: Report
    lengths: Lengths
    dtype: torch.dtype
    peers: Sequence[VllmPeer]
    seconds: float
    deadline: float | None
    threads: int
    eager: bool
    start: Callable[[int, str | None], EngineProcess]
    on_case: Callable[[list[Row], list[Row]], None] = field(default=lambda rows, skipped: None)

    def model(self, name: str, packing: Packing, root: Path) -> None:
        """Time one model; all engines are gone when this returns."""
        report, before = self.report, len(self.report.skipped)
        keys = {"model": name, **packing._asdict()}
        shape = parse_shape(name, packing)
        free = available_memory(report.device)
        reason = "out of time" if self._late() else too_little(reference_bytes(shape, packing), free)
        engines: dict[str, Engine] = {}
        try:
            if reason is None:
                model = packed_model(name, packing, root, report.device, rounded=False)
                reference = Reference(model, report.device)
                self._start_all(model, keys, engines)
        except NoRoomError as error:
            reason = str(error)
        try:
            if reason is not None:
                report.skip("all", reason, **keys)
            if len(report.skipped) > before:
                self.on_case([], report.skipped[before:])
            for case in self.cases() if engines else ():
                before = len(report.skipped)
                rows = self._case(model, engines, case, reference)
                report.results += rows
                self.on_case(rows, report.skipped[before:])
        finally:
            for engine in engines.values():
                engine.process.close()

    def cases(self) -> list[Case]:
        """Return the cases; unlike `bench_decode` this one has the whole context read."""
        return [Case(case.context, case.context, case.batch, case.tokens) for case in self.lengths.cases()]

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _start_all(self, model: PackedModel, keys: Row, engines: dict[str, Engine]) -> None:
        """Start what fits, into `engines`; the reasons of the others go into the report."""
        for peer in self.peers:
            own = peer.dtype(self.dtype)
            cache = self._cache(model, own)
            free = available_memory(self.report.device)
            reason = "out of time" if self._late() else peer.cannot_run(model)
            reason = reason or too_little(peer.memory(model, own) + cache, free)
            if reason is not None:
                self.report.skip(peer.name, reason, **keys)
                continue
            process = self.start(self.threads, peer.mode)
            try:
                found = process.order(**self._order(peer, model, own, cache))
            except EngineError as error:
                process.close()
                self.report.skip(peer.name, error, failed=True, **keys)
                continue
            except BaseException:
                process.close()
                raise
            engines[peer.name] = Engine(peer, process, own, found, cache)

    def _order(self, peer: VllmPeer, model: PackedModel, own: torch.dtype, cache: int) -> Row:
        """Return what starts an engine."""
        cases, share = self.cases(), None
        if self.report.device.type == "cuda":
            # Of the GPU's memory, which the others need too; vLLM's own is nearly all of it.
            share = (peer.memory(model, own) + cache) / torch.cuda.get_device_properties(
                self.report.device
            ).total_memory
        return {
            "folder": str(peer.folder(model)),
            "device": str(self.report.device),
            "dtype": str(own).removeprefix("torch."),
            "quantization": peer.quantization,
            "eager": self.eager,
            "sequences": max(case.batch for case in cases),
            "length": max(case.capacity for case in cases) + 1,
            "at_once": max(AT_ONCE, *(case.batch * case.prompt for case in cases)),
            "cache_bytes": cache,
            "share": share,
        }

    def _cache(self, model: PackedModel, own: torch.dtype) -> int:
        """Return how many bytes an engine is given for keys and values: what the largest case needs, and CACHE."""
        largest = max(case.batch * model.shape.kv_bytes(case.capacity, own.itemsize) for case in self.cases())
        return CACHE + math.ceil(largest)

    def _case(self, model: PackedModel, engines: dict[str, Engine], case: Case, reference: Reference) -> list[Row]:
        """Time one case."""
        report = self.report
        keys = {"model": model.name, **model.packing._asdict(), "context": case.context, "batch": case.batch}
        if self._late():
            report.skip("all", "out of time", **keys)
            return []
        cache = reference.prompts(case) * model.shape.kv_bytes(case.capacity, 4)
        reason = too_little(cache, available_memory(report.device))
        if reason is not None:
            report.skip("all", reason, **keys)
            return []
        turns: dict[str, _Turns] = {}
        dense: dict[torch.dtype, float] = {}
        for name, engine in engines.items():
            try:
                turns[name] = _prepare(engine, case, reference)
            except EngineError as error:
                report.skip(name, error, failed=True, **keys)
                continue
            if isinstance(engine.peer, VllmUnpacked):
                dense[engine.dtype] = min(turns[name].error, MOST)
        reference.forget()
        _, failed = measure({name: one.decode for name, one in turns.items()}, self.seconds)
        for name, why in failed.items():
            report.skip(name, why, failed=True, **keys)
        allowed = tolerances(dense)
        rows = [self._row(model, one, case, allowed[one.dtype]) for name, one in turns.items() if name not in failed]
        add_ratios(rows, "seconds_per_token")
        return rows

    def _row(self, model: PackedModel, one: _Turns, case: Case, tolerance: float) -> Row:
        row = decode_row(self.report, model, one.engine.peer, one, case, tolerance)
        found = one.engine.found
        return row | {
            "engine": "vllm",
            "engine_version": found["version"],
            "quantization": found["quantization"],
            "compiled": found["compiled"],
            "threads": found["threads"],
            "cache_bytes": one.engine.cache,
        }


def _prepare(engine: Engine, case: Case, reference: Reference) -> _Turns:
    """Check an engine in a case; return it ready, each step of it run once.

    Raises:
        EngineError: it failed.
    """
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, reference.vocab, (case.batch, case.prompt), generator=generator)
    one = _Turns(engine.dtype, engine.found["nbytes"], prompt, case, note=engine.note, engine=engine)
    prompts = reference.ids(case)
    found = engine.process.order(prompts=prompts, tokens=CHECKED + 1, logprobs=PROBABLE)
    one.error, one.agreeing = score(prompts, found, reference.logits)
    engine.process.order(prompts=prompt.tolist(), tokens=2)  # what is compiled where no logarithms are asked for
    return one
