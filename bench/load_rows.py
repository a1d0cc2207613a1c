"""What is said of loaders: tables, whether the targets are met, and a summary of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ropewalk.bench.load_process import SAMPLE
from ropewalk.bench.report import Row, case_name, duration
from ropewalk.terminal import size, table

# What ours is to meet: of the time that reading takes, of the checkpoint's size, and bytes besides.
MOST_TIME = 1.5
MOST_MEMORY, MOST_BESIDES = 1.10, 200_000_000

READ, READ_REUSED = "read", "read-reused"


def load_table(rows: Sequence[Row], ours: str) -> str:
    """Return the rows of one model as a table, a line for each loader."""
    lead: dict[str, float] = next((row["ratio_to"] for row in rows if row["kernel"] == ours), {})
    heads = ("time", "p20", "p80", "with imports", "GB/s", "x reading", "peak", "x files", "first call")
    lines = [("", "dtype", *heads, "max error", "", f"{ours} is")]
    for row in rows:
        ratio, times, first = lead.get(row["kernel"]), row["times_reading"], row["first_call_seconds"]
        lines.append(
            (
                row["kernel"],
                row["dtype"] or "",
                *(duration(row[key]) for key in ("seconds", "p20", "p80", "total_seconds")),
                f"{row['gb_per_s']:.2f}",
                "" if times is None else f"{times:.2f}",
                size(int(row["peak_bytes"])),
                f"{row['peak_to_checkpoint']:.2f}",
                "" if first is None else duration(first),
                f"{row['max_error']:.1e}" if row["dtype"] else "",
                {"wrong": "WRONG"}.get(row["verdict"], row["verdict"]) if row["dtype"] else "",
                "" if ratio is None else f"{ratio:.2f}x as fast",
            )
        )
    return table(lines)


def load_lines(rows: Sequence[Row], ours: str) -> list[str]:
    """Return what there is to say of a model besides the table: the limit, and the targets of ours."""
    speeds = {row["kernel"]: row for row in rows}
    lines = []
    if READ in speeds and READ_REUSED in speeds:
        kept, reused = speeds[READ], speeds[READ_REUSED]
        lines.append(
            f"reading {size(kept['checkpoint_bytes'])} from the page cache takes {duration(kept['seconds'])} into "
            f"memory that is kept, {duration(reused['seconds'])} through a buffer that is used again"
        )
    if ours in speeds:
        lines += _lines_of_ours(speeds[ours])
    for row in rows:
        if row["device_peak_bytes"] is not None:
            lines.append(f"{row['kernel']} allocates {size(int(row['device_peak_bytes']))} on the device at the peak")
    return lines


def _lines_of_ours(row: Row) -> list[str]:
    parts = []
    if row["times_reading"] is not None:
        parts.append(f"{row['times_reading']:.2f} times reading {_met(row, 'time', f'at most {MOST_TIME:g}')}")
    most = f"at most {MOST_MEMORY:.2f} x {size(row['checkpoint_bytes'])} + {size(MOST_BESIDES)}"
    parts.append(f"{size(int(row['peak_most']))} at the peak {_met(row, 'memory', most)}")
    lines = [f"{row['kernel']} takes {' and '.join(parts)}"]
    if row["peak_anonymous_bytes"] is not None:
        own, file = size(int(row["peak_anonymous_bytes"])), size(int(row["peak_file_bytes"]))
        lines.append(
            f"its memory, looked at every {SAMPLE * 1e3:.0f} ms: {own} of its own and {file} of files and shared "
            f"memory at most; {size(int(row['kept_bytes']))} when it is done"
        )
    return lines


def _met(row: Row, what: str, target: str) -> str:
    return f"(target: {target}: {'met' if row['meets'][what] else 'NOT met'})"


def load_summary(rows: Sequence[Row], ours: str) -> Iterator[str]:
    """Yield what a report's rows come to, model by model."""
    for case in dict.fromkeys(case_name(row) for row in rows):
        here = [row for row in rows if case_name(row) == case]
        yield f"\n{case}\n"
        yield load_table(here, ours)
        yield from load_lines(here, ours)
