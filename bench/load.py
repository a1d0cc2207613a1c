"""`ropewalk bench load`: how long loading a checkpoint takes and how much memory at its peak, ours and others', each in
a fresh process with the files in the page cache, beside the time that reading the same bytes takes.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ropewalk import cpu
from ropewalk.bench.decode import TOLERANCE
from ropewalk.bench.decode_rows import MOST
from ropewalk.bench.load_process import LoadError, run_worker
from ropewalk.bench.load_rows import MOST_BESIDES, MOST_MEMORY, MOST_TIME, READ, READ_REUSED
from ropewalk.bench.load_worker import tensor_spans
from ropewalk.bench.memory import SPARE, available_memory, too_little
from ropewalk.bench.model import NoRoomError, PackedModel, packed_model
from ropewalk.bench.peers.base import Program
from ropewalk.bench.peers.decode.plain import plain_model
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.report import Report, Row, add_ratios, largest_error, verdict
from ropewalk.bench.shapes import Packing, parse_shape
from ropewalk.bench.timing import Timing
from ropewalk.bench.unpacked import float16_bytes, float16_folder, no_disk_for_float16
from ropewalk.terminal import size

SHAPE = "20x4096x11008x32x32"  # 2.9 GB as 4b-g32-act
PACKING = "4b-g32-act"
PROMPT = 4  # tokens whose logits are compared
FROM_DISK = 20_000_000  # bytes that may be of libraries, and not of the checkpoint


class Loader(Program):
    """A program that loads a model, in a process of its own.

    Args:
        worker: its name in `load_worker.LOADERS`.
        package: what must be importable, or "".
        dtypes: those it loads to; another one is replaced by the first, none is any.
        unpacked: whether it loads the weights unpacked to float16, from a folder of their own.
        room: bytes of memory it needs for each byte that it loads.
    """

    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True

    def __init__(
        self,
        name: str,
        worker: str,
        *,
        package: str = "",
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
        unpacked: bool = False,
        room: float = 1.2,
        by_default: tuple[str, ...] = ("cpu", "cuda"),
    ):
        self.name, self.worker, self.package = name, worker, package
        self.dtypes, self.unpacked, self.room, self.by_default = dtypes, unpacked, room, by_default

    @property
    def loads_a_model(self) -> bool:
        """Whether there is something to call in the end, and not only tensors."""
        return self.worker not in (READ, READ_REUSED, "safetensors")

    def nbytes(self, model: PackedModel) -> int:
        """Return the size of the tensors that it reads."""
        return float16_bytes(model) if self.unpacked else model.checkpoint.nbytes()


def load_peers() -> list[Loader]:
    """Return all that load, ours first."""
    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    return [
        Loader(OURS, "ropewalk"),
        Loader("transformers-fp16", "transformers", dtypes=(float16,), unpacked=True),
        Loader("transformers-fp32", "transformers", dtypes=(float32,), unpacked=True, room=2.2, by_default=("cpu",)),
        # Its kernels for the CPU want bfloat16.
        Loader("gptqmodel", "gptqmodel", package="gptqmodel", dtypes=(bfloat16, float16), room=3),
        Loader("safetensors", "safetensors"),
    ]


REFERENCES = (Loader(READ, "read"), Loader(READ_REUSED, "read-reused", room=0.1))


@dataclass(frozen=True)
class _Entrant:
    """A loader, and what it is to load."""

    loader: Loader
    dtype: torch.dtype
    folder: Path
    files: tuple[Path, ...]


def bench_load(
    report: Report,
    names: Sequence[str],
    packings: Iterable[Packing],
    *,
    root: Path,
    dtype: torch.dtype,
    peers: Sequence[Loader],
    runs: int,
    threads: int | None = None,
    seconds: float = 0,
    deadline: float | None = None,
    on_case: Callable[[list[Row], list[Row]], None] | None = None,
) -> None:
    """Time loaders on every model, into `report`; they take turns, each time in a fresh process.

    Args:
        names: shapes, as `shapes.parse_shape` takes them.
        root: where models are kept.
        dtype: of activations, for the peers that have it.
        runs: how many times each loads each model.
        threads: of torch, in each process; None for its choice.
        seconds: nothing here depends on it.
        deadline: a `time.monotonic()` after which no further model and no further turn begins.
        on_case: called with the rows of each model and what was skipped in it.

    Raises:
        UsageError: a shape that cannot be packed so.
    """
    cpu.load()  # or the first process would compile it
    for packing in packings:
        for name in names:
            before, rows = len(report.skipped), []
            late = deadline is not None and time.monotonic() > deadline
            reason = "out of time" if late else _cannot_check(name, packing, report.device)
            try:
                if reason is None:
                    model = packed_model(name, packing, root, report.device, rounded=False)
                    rows = _model(report, model, dtype, peers, runs, threads, deadline)
            except NoRoomError as error:
                reason = str(error)
            if reason is not None:
                report.skip("all", reason, model=name, **packing._asdict())
            report.results += rows
            if on_case is not None:
                on_case(rows, report.skipped[before:])


def _model(
    report: Report,
    model: PackedModel,
    dtype: torch.dtype,
    peers: Sequence[Loader],
    runs: int,
    threads: int | None,
    deadline: float | None,
) -> list[Row]:
    keys = {"model": model.name, **model.packing._asdict()}
    entrants = []
    for loader in (*peers, *REFERENCES):
        reason = loader.cannot_hold(model.packing) or _too_large(loader, model, dtype, report.device)
        if reason is not None:
            report.skip(loader.name, reason, **keys)
            continue
        folder = float16_folder(model) if loader.unpacked else model.folder
        files = tuple(sorted(folder.glob("*.safetensors")))
        entrants.append(_Entrant(loader, loader.dtype(dtype), folder, files))
    ids = torch.randint(0, model.shape.vocab, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = _expected(model, ids, report.device)
    samples: dict[str, list[Row]] = {entrant.loader.name: [] for entrant in entrants}
    failed: set[str] = set()
    for turn in range(runs):
        if turn and deadline is not None and time.monotonic() > deadline:
            report.skip("all", f"out of time after {turn} of {runs} runs", **keys)
            break
        for entrant in entrants:
            name = entrant.loader.name
            if name in failed:
                continue
            try:
                samples[name].append(_sample(entrant, report.device, threads, ids, expected))
            except (LoadError, OSError) as error:
                failed.add(name)
                report.skip(name, error, failed=True, **keys)
    right = [entrant for entrant in entrants if entrant.loader.name not in failed]
    rows = [_row(report, model, entrant, samples[entrant.loader.name]) for entrant in right]
    _compare(rows)
    return rows


def _cannot_check(name: str, packing: Packing, device: torch.device) -> str | None:
    """Return that there is no memory for the model whose logits are right, in float32, or None."""
    shape = parse_shape(name, packing)
    needed = shape.packed_bytes(packing) + 8 * shape.vocab * shape.hidden
    return too_little(needed, available_memory(device))


def _too_large(loader: Loader, model: PackedModel, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why there is no room to load a model, or to keep its files, or None."""
    needed, free = loader.room * loader.nbytes(model), available_memory(device)
    # Memory that is available holds the page cache, too, and what loads must not drive the files from it.
    cached = loader.nbytes(model) if device.type == "cpu" else 0
    if free is not None and needed + cached + SPARE > free:
        files = f", {size(cached)} of it for cached files" if cached else ""
        return f"needs about {size(int(needed + cached))} of memory{files}; {size(int(max(free - SPARE, 0)))} are left"
    return no_disk_for_float16(model) if loader.unpacked else None


@torch.inference_mode()
def _expected(model: PackedModel, ids: Sequence[int], device: torch.device) -> Tensor:
    """Return the logits of a prompt by transformers' own model, which unpacks a layer at a time in float32."""
    reference = plain_model(model, torch.float32, device, unpack=False)
    logits: Tensor = reference(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].cpu()
    del reference
    gc.collect()
    return logits


def _sample(entrant: _Entrant, device: torch.device, threads: int | None, ids: Sequence[int], expected: Tensor) -> Row:
    """Load once; return what was measured, with the "error" of the logits over the largest one, and the "logits".

    Raises:
        LoadError: it failed.
    """
    _warm(entrant.files)
    with tempfile.TemporaryDirectory(prefix="ropewalk-load-") as folder:
        logits = Path(folder, "logits.safetensors")
        job = {
            "loader": entrant.loader.worker,
            "folder": str(entrant.folder),
            "files": [str(file) for file in entrant.files],
            "device": str(device),
            "dtype": str(entrant.dtype).removeprefix("torch."),
            "threads": threads,
            "touch": _to_touch(entrant),
            "prompt": ids,
            "logits": str(logits),
        }
        found = run_worker(job)
        if entrant.loader.loads_a_model:
            if not logits.is_file():
                raise LoadError("expected logits, found none: what was loaded is no model")
            found["logits"] = load_file(logits)["logits"]
            found["error"] = largest_error(found["logits"], expected) / float(expected.abs().max())
    return found


def _to_touch(entrant: _Entrant) -> int:
    """Return how much memory is to be touched before: what loading takes, if that can be had."""
    takes = int(entrant.loader.room * sum(file.stat().st_size for file in entrant.files))
    return min(takes, int(0.7 * (available_memory(torch.device("cpu")) or 0)))


def _warm(files: Iterable[Path]) -> None:
    """Read files, so that the page cache holds them."""
    piece = bytearray(4 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass


def _row(report: Report, model: PackedModel, entrant: _Entrant, samples: Sequence[Row]) -> Row:
    loader = entrant.loader
    timing = Timing.of([sample["seconds"] for sample in samples])
    peak = Timing.of([sample["peak_bytes"] for sample in samples])  # its percentiles are what is wanted
    nbytes = sum(span[2] for file in entrant.files for span in tensor_spans(file))
    logits = [sample["logits"] for sample in samples if "logits" in sample]
    error = max((sample["error"] for sample in samples if "error" in sample), default=0.0)
    # What is unpacked was rounded to float16, whatever it is loaded to.
    tolerance = max(TOLERANCE[entrant.dtype], TOLERANCE[torch.float16] if loader.unpacked else 0)
    row: Row = {
        "kernel": loader.name,
        "device": str(report.device),
        "model": model.name,
        **model.packing._asdict(),
        "dtype": str(entrant.dtype).removeprefix("torch.") if loader.loads_a_model else None,
        "checkpoint_bytes": nbytes,
        "seconds": timing.seconds,
        "p20": timing.p20,
        "p80": timing.p80,
        "samples": timing.samples,
        "total_seconds": statistics.median(sample["total_seconds"] for sample in samples),
        "gb_per_s": nbytes / timing.seconds / 1e9,
        "ratio_to": {},
        "peak_bytes": peak.seconds,
        "peak_p20": peak.p20,
        "peak_p80": peak.p80,
        "peak_most": max(sample["peak_bytes"] for sample in samples),
        "peak_to_checkpoint": peak.seconds / nbytes,
        "max_error": error,
        "verdict": verdict(error, tolerance, 1.0, MOST),
        "tolerance": tolerance,
        "same_logits": all(torch.equal(each, logits[0]) for each in logits) if logits else None,
    }
    for key in (
        *("peak_anonymous_bytes", "peak_file_bytes", "kept_bytes", "device_peak_bytes"),
        *("first_call_seconds", "peak_bytes_called", "disk_bytes"),
    ):
        values = [sample[key] for sample in samples if sample.get(key) is not None]
        row[key] = statistics.median(values) if values else None
    row["note"] = _note(row)
    return row


def _note(row: Row) -> str:
    notes = []
    if row["same_logits"] is False:
        notes.append("its runs differ in their logits")
    if (row["disk_bytes"] or 0) > max(0.01 * row["checkpoint_bytes"], FROM_DISK):
        notes.append(f"{size(int(row['disk_bytes']))} came from the disk: the page cache did not hold all")
    return "; ".join(notes)


def _compare(rows: list[Row]) -> None:
    """Fill in what takes several rows: ratios, the share of the limit, and whether the targets are met.

    The limit of a row is reading as many bytes as it reads, as fast as the packed checkpoint was read into memory
    that was kept.
    """
    add_ratios(rows)
    speed = next((row["gb_per_s"] for row in rows if row["kernel"] == READ), None)
    for row in rows:
        limit = None if speed is None else row["checkpoint_bytes"] / speed / 1e9
        row["limit_seconds"] = limit
        row["share_of_limit"] = None if limit is None else limit / row["seconds"]
        row["times_reading"] = None if limit is None else row["seconds"] / limit
        most = MOST_MEMORY * row["checkpoint_bytes"] + MOST_BESIDES
        row["meets"] = {
            "time": None if limit is None else row["seconds"] <= MOST_TIME * limit,
            "memory": row["peak_most"] <= most,
        }


def reading_limit(rows: Sequence[Row]) -> Row:
    """Return what the rows say of reading alone, as the report's "limit" has it: GB/s, the best of all models."""
    names = {"page_cache_gb_per_s": READ, "page_cache_reused_gb_per_s": READ_REUSED}
    return {
        key: max((row["gb_per_s"] for row in rows if row["kernel"] == name), default=None)
        for key, name in names.items()
    }
