"""Pictures of kernels: time over M, and shares of the limit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from ropewalk.bench.report import Row, case_name, packing_name

BLUES = ("#08519c", "#6baed6", "#3182bd", "#9ecae1", "#c6dbef")
OTHERS = ("#e6550d", "#31a354", "#756bb1", "#de2d26", "#8c6d31", "#e377c2", "#636363", "#bcbd22", "#17a2a2", "#fdae6b")


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
    panels = panels_of(rows)
    shown = list(panels.items())[:most]
    columns = min(4, len(shown)) or 1
    lines = math.ceil(len(shown) / columns) or 1
    size = (3.6 * columns + 2.6, 2.9 * lines + 0.6)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, dpi=110, layout="constrained", squeeze=False)
    names = names_of(rows, ours)
    handles, limit = {}, f"what the machine allows {ours}"
    for axis, (name, panel) in zip(axes.flat, shown, strict=False):
        for kernel in names:
            points = [(row["M"], row["seconds"] * 1e3) for row in panel if row["kernel"] == kernel]
            if points:
                width = 2.4 if kernel == ours else 1.2
                (handles[kernel],) = axis.plot(
                    *zip(*points, strict=True), "o-", color=colour_of(kernel, names, ours), lw=width, ms=3
                )
        best = [(row["M"], row["seconds"] * row["share_of_limit"] * 1e3) for row in panel if row["kernel"] == ours]
        if best:
            (handles[limit],) = axis.plot(*zip(*best, strict=True), ":", color="0.5")
        ms = sorted({row["M"] for row in panel})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ms, [str(m) for m in ms], rotation=0 if len(ms) < 7 else 60)
        axis.minorticks_off()
        axis.set_title(textwrap.fill(name, 44), fontsize=8, loc="left")
        axis.set_xlabel("M, tokens" if "experts" in panel[0] else "M, rows", fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    labels = sorted(handles, key=[*names, limit].index)
    figure.legend([handles[label] for label in labels], labels, loc="outside right upper", fontsize=8, frameon=False)
    more = len(panels) - len(shown)
    figure.suptitle(title + (f" ({more} more cases not shown)" if more else ""), fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def plot_shares(rows: Sequence[Row], path: str, *, title: str, ours: str) -> None:
    """Draw which share of its limit each kernel reaches, a panel for each packing and a group of bars for each shape at
    the smallest M; where there is one shape, or experts or a rotary embedding, a group for each M.

    Args:
        rows: of matmuls, experts or rotary embeddings, as in a report; wrong results are left out.
        path: the PNG to write.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    rows = [row for row in rows if row["verdict"] != "wrong"]
    by_shape = len({(row["K"], row["N"]) for row in rows}) > 1 and all(
        "experts" not in row and row["bits"] for row in rows
    )
    first = min((row["M"] for row in rows), default=1)
    if by_shape:
        rows = [row for row in rows if row["M"] == first]
    names = names_of(rows, ours)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(packing_name(row) if by_shape else case_name(row, m=False), []).append(row)
    lines = max(1, len(panels))
    figure, axes = pyplot.subplots(
        lines, 1, figsize=(10, 2.1 * lines + 0.6), dpi=110, layout="constrained", squeeze=False, sharey=True
    )
    handles = {}
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        labels = [f"{row['K']}x{row['N']}" if by_shape else f"M={row['M']}" for row in panel]
        groups = list(dict.fromkeys(labels))
        here = [kernel for kernel in names if any(row["kernel"] == kernel for row in panel)]
        width = 0.84 / len(here)
        for row, label in zip(panel, labels, strict=True):
            i = here.index(row["kernel"])
            place = groups.index(label) - 0.42 + (i + 0.5) * width
            bar = axis.bar(place, row["share_of_limit"], 0.92 * width, color=colour_of(row["kernel"], names, ours))
            handles[row["kernel"]] = bar
            text = f"{row['share_of_limit']:.0%}".removesuffix("%")
            axis.annotate(text, (place, row["share_of_limit"]), ha="center", va="bottom", fontsize=6.5)
        axis.axhline(1, color="0.4", linestyle=":")
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.spines[["top", "right"]].set_visible(False)
    shown = [name for name in names if name in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside right upper", fontsize=8, frameon=False)
    at = f" at M={first}" if by_shape else ""
    figure.suptitle(f"Share of the measured limit{at}, each by its own bytes: {title}", fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def panels_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each case, whatever their M or context, wrong ones left out."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row["verdict"] != "wrong":
            panels.setdefault(case_name(row, m=False), []).append(row)
    return panels


def names_of(rows: Sequence[Row], ours: str) -> list[str]:
    """Return the kernels' names, ours first."""
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    return sorted(names, key=lambda name: (name != ours, not name.startswith(ours)))


def colour_of(name: str, names: Sequence[str], ours: str) -> str:
    """Return the colour of a kernel: ours are blue, and no other is."""
    own = [other for other in names if other.startswith(ours)]
    if name in own:
        return BLUES[own.index(name) % len(BLUES)]
    return OTHERS[[other for other in names if other not in own].index(name) % len(OTHERS)]
