"""Pictures of a benchmark's results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ropewalk.bench.report import Row, case_name


def plot_rows(rows: Sequence[Row], path: str, *, title: str, ours: str, most: int = 24) -> None:
    """Draw the time of a call over M, a panel for each case and a line for each kernel.

    Args:
        rows: as in a report; wrong results are left out.
        path: the PNG to write.
        most: panels; more cases than these are left out, and the title says so.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    panels = _panels(rows)
    shown = list(panels.items())[:most]
    columns = min(4, len(shown)) or 1
    lines = math.ceil(len(shown) / columns) or 1
    size = (3.6 * columns + 1.6, 2.9 * lines + 0.6)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, dpi=110, layout="constrained", squeeze=False)
    names = _names(rows, ours)
    handles = {}
    for axis, (name, panel) in zip(axes.flat, shown, strict=False):
        for i, kernel in enumerate(names):
            points = [(row["M"], row["seconds"] * 1e3) for row in panel if row["kernel"] == kernel]
            if points:
                width = 2.4 if kernel == ours else 1.2
                (handles[kernel],) = axis.plot(*zip(*points, strict=True), "o-", color=f"C{i}", lw=width, ms=3)
        best = [(row["M"], row["seconds"] * row["share_of_limit"] * 1e3) for row in panel if row["kernel"] == ours]
        if best:
            (handles["limit"],) = axis.plot(*zip(*best, strict=True), ":", color="0.5")
        ms = sorted({row["M"] for row in panel})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ms, [str(m) for m in ms], rotation=0 if len(ms) < 7 else 60)
        axis.minorticks_off()
        axis.set_title(name, fontsize=8, loc="left")
        axis.set_xlabel("M, rows", fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    labels = sorted(handles, key=[*names, "limit"].index)
    figure.legend([handles[label] for label in labels], labels, loc="outside right upper", fontsize=8, frameon=False)
    more = len(panels) - len(shown)
    figure.suptitle(title + (f" ({more} more cases not shown)" if more else ""), fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def plot_decode(rows: Sequence[Row], path: str, *, title: str, ours: str, most: int = 6) -> None:
    """Draw tokens a second, a panel for each model and a bar for each program, with what the memory allows.

    Args:
        rows: as in a report; wrong results are left out.
        path: the PNG to write.
        most: panels; more models than these are left out, and the title says so.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    panels = _panels(rows)
    shown = list(panels.items())[:most]
    bars = [len(panel) for _, panel in shown]
    size = (7.5, 0.6 + sum(0.75 + 0.3 * count for count in bars))
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=size, dpi=110, layout="constrained", squeeze=False, height_ratios=bars
    )
    for axis, (name, panel) in zip(axes.flat, shown, strict=True):
        ordered = sorted(panel, key=lambda row: row["tokens_per_s"])
        speeds = [row["tokens_per_s"] for row in ordered]
        # What one program must read and another need not is its own limit; ours is the one that is drawn.
        limit = next((row["limit_tokens_per_s"] for row in panel if row["kernel"] == ours), max(speeds))
        colours = ["C0" if row["kernel"].startswith(ours) else "0.7" for row in ordered]
        axis.barh([f"{row['kernel']}, {row['dtype']}" for row in ordered], speeds, color=colours, height=0.7)
        axis.axvline(limit, color="0.4", linestyle=":")
        for i, row in enumerate(ordered):
            text = f" {row['tokens_per_s']:.3g}   {row['share_of_limit']:.0%} of its own limit"
            axis.annotate(text, (row["tokens_per_s"], i), va="center", fontsize=8)
        axis.set_xlim(0, 1.45 * max(limit, *speeds))
        axis.annotate(
            f"read bandwidth allows\n{limit:.3g}",
            (limit, 0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
            color="0.4",
        )
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("tokens a second", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    more = len(panels) - len(shown)
    figure.suptitle(title + (f" ({more} more not shown)" if more else ""), fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def plot_load(rows: Sequence[Row], path: str, *, title: str, ours: str, most: int = 6) -> None:
    """Draw how long loading takes and how much memory, two panels for each model and a bar for each loader.

    Args:
        rows: as in a report; wrong results are left out.
        path: the PNG to write.
        most: models; more than these are left out, and the title says so.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    panels = _panels(rows)
    shown = list(panels.items())[:most]
    bars = [len(panel) for _, panel in shown]
    size = (10, 0.7 + sum(0.9 + 0.3 * count for count in bars))
    figure, axes = pyplot.subplots(
        len(shown), 2, figsize=size, dpi=110, layout="constrained", squeeze=False, height_ratios=bars, sharey="row"
    )
    for (times, memory), (name, panel) in zip(axes, shown, strict=True):
        ordered = sorted(panel, key=lambda row: -row["seconds"])
        names = [row["kernel"] + (f", {row['dtype']}" if row["dtype"] else "") for row in ordered]
        colours = ["C0" if row["kernel"] == ours else "0.7" if row["dtype"] else "0.85" for row in ordered]
        for axis, key, factor, unit in ((times, "seconds", 1, "s"), (memory, "peak_bytes", 1e-9, "GB")):
            values = [row[key] * factor for row in ordered]
            axis.barh(names, values, color=colours, height=0.7)
            for i, value in enumerate(values):
                axis.annotate(f" {value:.3g} {unit}", (value, i), va="center", fontsize=8)
            axis.set_xlim(0, 1.25 * max(*values, 1e-9))
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        packed = next((row for row in panel if row["kernel"] == ours), None)
        if packed is not None:
            memory.axvline(packed["checkpoint_bytes"] * 1e-9, color="0.4", linestyle=":")
        times.set_title(name, fontsize=9, loc="left")
        times.set_xlabel("seconds to load, after imports", fontsize=8)
        memory.set_xlabel("peak of resident memory above imports, GB; dotted: the packed files", fontsize=8)
    more = len(panels) - len(shown)
    figure.suptitle(title + (f" ({more} more not shown)" if more else ""), fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def plot_shares(rows: Sequence[Row], path: str, *, title: str, ours: str) -> None:
    """Draw which share of the read bandwidth each kernel reaches at M=1, a panel for each packing.

    Args:
        rows: of matmuls, as in a report; wrong results and other M are left out.
        path: the PNG to write.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    rows = [row for row in rows if row["M"] == 1 and row["verdict"] != "wrong"]
    names = _names(rows, ours)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(case_name(row, m=False).partition(", ")[2], []).append(row)
    lines = max(1, len(panels))
    figure, axes = pyplot.subplots(
        lines, 1, figsize=(10, 2.1 * lines + 0.6), dpi=110, layout="constrained", squeeze=False, sharey=True
    )
    handles = {}
    for axis, (packing, panel) in zip(axes.flat, panels.items(), strict=False):
        shapes = list(dict.fromkeys((row["K"], row["N"]) for row in panel))
        here = [name for name in names if any(row["kernel"] == name for row in panel)]
        width = 0.84 / len(here)
        for row in panel:
            i = here.index(row["kernel"])
            place = shapes.index((row["K"], row["N"])) - 0.42 + (i + 0.5) * width
            handles[row["kernel"]] = axis.bar(place, row["share_of_limit"], 0.92 * width, color=_colour(row, names))
            text = f"{row['share_of_limit']:.0%}".removesuffix("%")
            axis.annotate(text, (place, row["share_of_limit"]), ha="center", va="bottom", fontsize=6.5)
        axis.axhline(1, color="0.4", linestyle=":")
        axis.set_xticks(range(len(shapes)), [f"{k}x{n}" for k, n in shapes])
        axis.set_title(packing, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.spines[["top", "right"]].set_visible(False)
    labels = [name for name in names if name in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"Share of the measured read bandwidth at M=1, each by its own bytes: {title}", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each case, M apart, wrong ones left out."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row["verdict"] != "wrong":
            panels.setdefault(case_name(row, m=False), []).append(row)
    return panels


def _names(rows: Sequence[Row], ours: str) -> list[str]:
    """Return the kernels' names, ours first."""
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    return sorted(names, key=lambda name: (name != ours, not name.startswith(ours)))


def _colour(row: Row, names: Sequence[str]) -> str:
    return f"C{names.index(row['kernel']) % 10}"
