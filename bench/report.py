"""What a benchmark says: the machine, rows of results, tables, a plot, and one JSON object."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ropewalk
from ropewalk.bench.limits import Limits
from ropewalk.errors import RopewalkError
from ropewalk.terminal import table

Row = dict[str, Any]

# Whose versions a report names, besides torch's.
PACKAGES = ("triton", "transformers", "gptqmodel", "llama-cpp-python")


class DeviceLostError(RopewalkError):
    """A kernel left the GPU in a state in which nothing runs any more."""


@dataclass
class Report:
    """A run's outcome, filled while it runs, so that an interrupted one still has something to say.

    Attributes:
        results: rows as `ropewalk bench --json` prints them. "seconds" is a median, "share_of_limit" the least
            time that the measured limits allow over it, "bound" which of them that is.
        skipped: what was not timed: "kernel", "why" and the settings.
    """

    device: torch.device
    limits: Limits
    machine: dict[str, Any]
    results: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {
            "machine": self.machine,
            "limit": self.limits.as_json(),
            "results": self.results,
            "skipped": self.skipped,
        }

    def fault(self, ours: str) -> str | None:
        """Return in one line what is wrong with our own results (kernels whose names begin so), or None."""
        wrong = [row for row in self.results if row["kernel"].startswith(ours) and row["verdict"] == "wrong"]
        failed = [note for note in self.skipped if note["kernel"].startswith(ours) and note.get("failed")]
        if wrong:
            row = wrong[0]
            where = f"{case_name(row)}, off by {row['max_error']:.3g}"
            return f"{row['kernel']}: expected right results, found {len(wrong)} wrong ones, the first at {where}"
        return f"{failed[0]['kernel']}: {failed[0]['why']}" if failed else None

    def skip(self, kernel: str, why: object, **settings: Any) -> Row:
        """Note that a kernel was not timed; return the note."""
        text = " ".join(str(why).split()) or type(why).__name__
        self.skipped.append({"kernel": kernel, "why": text[:300], **settings})
        return self.skipped[-1]

    def fail(self, kernel: str, error: Exception, **settings: Any) -> None:
        """Note that a kernel failed, and find out whether the device survived it.

        Raises:
            DeviceLostError: it did not.
        """
        self.skip(kernel, f"{type(error).__name__}: {error}", failed=True, **settings)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                why = " ".join(str(error).split())[:120]
                raise DeviceLostError(
                    f"{kernel} broke the GPU's context ({why}); run again without it (--peers)"
                ) from error


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the machine is, as far as it tells."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "ropewalk": ropewalk.__version__,
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def quiet() -> redirect_stdout[Any]:
    """Return a context in which what others print goes to stderr: stdout may be kept for one JSON object."""
    return redirect_stdout(sys.stderr)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference; the largest float32 for another shape or what is not a number."""
    nothing = torch.finfo(torch.float32).max
    if found.shape != expected.shape:
        return nothing
    error = float((found.float() - expected).abs().max())
    return error if error < nothing else nothing


def verdict(error: float, tolerance: float, largest: float, most: float = 0.02) -> str:
    """Judge a result by its largest error: "ok", "approximate" or "wrong".

    Up to `tolerance` it is what the dtype allows. Kernels that also round activations or scales are further
    off by design; beyond `most` of the largest output it cannot be that any more. For one product that is 2 %:
    int8 activations with a scale for each row of 22016 cost 1 %, and with one for each block of 32 half of that.
    """
    if error <= tolerance:
        return "ok"
    return "approximate" if error <= most * largest else "wrong"


def add_ratios(rows: Sequence[Row], key: str = "seconds") -> None:
    """Fill in "ratio_to": how many times as fast a row's kernel is as each other one of the same case.

    A wrong result has no speed worth comparing with.

    Args:
        key: where a row has its time.
    """
    right = {row["kernel"]: row[key] for row in rows if row["verdict"] != "wrong"}
    for row in rows:
        row["ratio_to"] = {name: t / row[key] for name, t in right.items() if name != row["kernel"]}


def rows_table(rows: Sequence[Row], ours: str) -> str:
    """Return the rows of one case as a table, a line for each kernel; the last column says how many times as
    fast as it ours is.
    """
    lead: dict[str, float] = next((row["ratio_to"] for row in rows if row["kernel"] == ours), {})
    lines = [("kernel", "dtype", "time", "p20", "p80", "GB/s", "of limit", "max error", "", f"{ours} is")]
    for row in rows:
        ratio = lead.get(row["kernel"])
        lines.append(
            (
                row["kernel"],
                computes(row),
                *(duration(row[key]) for key in ("seconds", "p20", "p80")),
                f"{row['gb_per_s']:.1f}",
                f"{row['share_of_limit']:.2f}",
                f"{row['max_error']:.1e}",
                {"wrong": "WRONG"}.get(row["verdict"], row["verdict"]),
                "" if ratio is None else f"{ratio:.2f}x as fast",
            )
        )
    return table(lines)


def duration(seconds: float) -> str:
    """Return a time for a person: 12.3 µs, 4.56 ms, 1.23 s."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            break
    return f"{seconds * factor:.3g} {unit}"


def machine_name(found: dict[str, Any]) -> str:
    """Return the name of what was measured: the GPU, or the processor and how many threads."""
    gpu = found.get("gpu")
    return str(gpu["name"]) if gpu else f"{found['cpu']}, {found['threads']} threads"


def machine_line(found: dict[str, Any], limits: Limits) -> str:
    """Return the machine and its limits in one line."""
    gpu = found.get("gpu")
    name = machine_name(found) + (f" (driver {gpu['driver']})" if gpu else "")
    flops = ", ".join(f"{_short(dtype)} {value / 1e9:,.0f}" for dtype, value in limits.flops_by_dtype.items())
    return (
        f"{name}, torch {found['torch']}: reads {limits.read_gb_per_s:.1f} GB/s, "
        f"copies {limits.copy_gb_per_s:.1f} GB/s, multiplies at {flops} GFLOP/s"
    )


def case_name(row: Row, m: bool = True) -> str:
    """Return what a row was measured on; with `m` unset without its M, or its context and batch."""
    if row["bits"] is None:
        name = f"{row['heads']} heads, {row['kv_heads']} of k, {row['head_dim']} channels, {row['dtype']}"
    else:
        what = row.get("model") or f"{row['K']}x{row['N']}"
        if "experts" in row:
            what = f"{row['top_k']} of {row['experts']} experts of {what}"
        name = f"{what}, {packing_name(row)}"
    if not m:
        return name
    counts = {"M": "M={}", "context": "context {}", "batch": "{} sequences"}
    parts = [
        text.format(row[key]) for key, text in counts.items() if key in row and not (key == "batch" and row[key] == 1)
    ]
    return ", ".join([name, *parts])


def packing_name(row: Row) -> str:
    """Return how a row's weights are packed, for a person."""
    groups = "one group" if row["group_size"] == -1 else f"groups of {row['group_size']}"
    order = ", act-order" if row["desc_act"] else ""
    return f"{row['bits']} bits, {groups}{order}, {'symmetric' if row['sym'] else 'asymmetric'}"


def computes(row: Row) -> str:
    """Return the dtype of a row, with int8 where our kernel rounds activations to that."""
    return _short(row["dtype"]) + (", int8" if row.get("mode") == "int8" else "")


def _short(dtype: str) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(dtype, dtype)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout that this runs from, with + where files differ; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _output("git", "-C", str(root), "status", "--porcelain", "-uno") else "")


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None
