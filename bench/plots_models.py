"""Pictures of whole models: tokens a second and memory, by program or over the length of context, and loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ropewalk.bench.plots import colour_of, names_of, panels_of
from ropewalk.bench.report import Row


def plot_decode(rows: Sequence[Row], path: str, *, title: str, ours: str) -> None:
    """Draw what `bench decode` found: over the length of context where there are several, over the number of sequences
    where there are several of these, else a bar for each program.

    Args:
        rows: as in a report; wrong results are left out.
        path: the PNG to write.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    several = [key for key in ("context", "batch") if len({row.get(key) for row in rows}) > 1]
    if several:
        plot_over(rows, path, several[0], title=title, ours=ours)
    else:
        plot_programs(rows, path, title=title, ours=ours)


def plot_over(rows: Sequence[Row], path: str, key: str, *, title: str, ours: str, most: int = 6) -> None:
    """Draw tokens a second and memory over "context" or "batch", two panels for each model and a line for each program,
    with what the machine allows.

    Args:
        rows: as in a report; wrong results are left out.
        path: the PNG to write.
        key: what goes along.
        most: pairs of panels; more than these are left out, and the title says so.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    panels: dict[str, list[Row]] = {}
    other, of_other = ("batch", "{}, {} sequences") if key == "context" else ("context", "{}, context {}")
    for name, panel in panels_of(rows).items():
        for row in panel:
            panels.setdefault(of_other.format(name, row[other]).replace(", 1 sequences", ""), []).append(row)
    shown = list(panels.items())[:most]
    names = names_of(rows, ours)
    size = (11, 3.1 * max(1, len(shown)) + 0.6)
    figure, axes = pyplot.subplots(max(1, len(shown)), 2, figsize=size, dpi=110, layout="constrained", squeeze=False)
    handles = {}
    for (speed, memory), (name, panel) in zip(axes, shown, strict=False):
        along = sorted({row[key] for row in panel})
        for kernel in names:
            own = sorted((row for row in panel if row["kernel"] == kernel), key=lambda row: row[key])
            if not own:
                continue
            style = {"color": colour_of(kernel, names, ours), "lw": 2.6 if kernel == ours else 1.3, "ms": 4}
            x = [row[key] for row in own]
            (handles[f"{kernel}, {own[0]['dtype']}"],) = speed.plot(
                x, [row["tokens_per_s"] for row in own], "o-", **style
            )
            memory.plot(x, [row["peak_bytes"] / 1e9 for row in own], "o-", **style)
            if kernel == ours:
                (limit,) = speed.plot(x, [row["limit_tokens_per_s"] for row in own], ":", color="0.4", lw=1.8)
                handles[f"what the machine allows {ours}"] = limit
                (cache,) = memory.plot(x, [row["kv_bytes"] / 1e9 for row in own], "--", color="0.4", lw=1.2)
                handles["its keys and values alone"] = cache
        for axis, what in ((speed, "tokens a second"), (memory, "memory at the peak, GB")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(along, [f"{x:,}" for x in along])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.set_xlabel("tokens of context" if key == "context" else "sequences", fontsize=8)
            axis.set_ylabel(what, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        speed.set_title(name, fontsize=9, loc="left")
    labels = sorted(handles, key=lambda label: label.startswith(("what", "its")))
    figure.legend([handles[label] for label in labels], labels, loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, path, title, len(panels) - len(shown))


def plot_programs(rows: Sequence[Row], path: str, *, title: str, ours: str, most: int = 6) -> None:
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
    panels = panels_of(rows)
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
    _save(figure, path, title, len(panels) - len(shown))


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
    panels = panels_of(rows)
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
    _save(figure, path, title, len(panels) - len(shown))


def _save(figure: Any, path: str, title: str, left_out: int) -> None:
    """Write a figure whose title says how many panels are not in it, and let go of it."""
    from ropewalk.plot import load_pyplot

    figure.suptitle(title + (f" ({left_out} more not shown)" if left_out else ""), fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    load_pyplot().close(figure)
