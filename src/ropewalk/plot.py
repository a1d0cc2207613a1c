"""Pictures of results, drawn with matplotlib to a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ropewalk.errors import MissingPackageError


def load_pyplot() -> Any:
    """Return matplotlib.pyplot, drawing into files only.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError(
            f"--plot: expected the package matplotlib (pip install 'ropewalk[plot]'), {error}"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_perplexity(
    results: Mapping[str, Mapping[str, float]], path: str, *, title: str, mark: int | None = None
) -> None:
    """Draw perplexity over context, a line for each rotary embedding.

    Args:
        results: name -> context, in tokens -> perplexity.
        path: the PNG to write.
        mark: a context to mark, that of the first training.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes.set_yscale("log")
    lines = {}
    for name, values in results.items():
        (lines[name],) = axes.plot([int(n) for n in values], list(values.values()), marker="o", linewidth=2)
    axes.margins(x=0.05, y=0.1)
    ends = {name: list(values.items())[-1] for name, values in results.items()}
    for name, y in _spread({name: value for name, (_, value) in ends.items()}, axes.get_ylim()).items():
        axes.annotate(
            name,
            (int(ends[name][0]), y),
            xytext=(8, 0),
            textcoords="offset points",
            color=lines[name].get_color(),
            va="center",
        )
    every = sorted({int(n) for values in results.values() for n in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(n) for n in every])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    if mark is not None:
        axes.axvline(mark, color="0.6", linestyle=":")
        axes.annotate(
            "original context",
            (mark, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
            color="0.4",
        )
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("perplexity")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def plot_needles(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
    path: str,
    *,
    title: str,
    mark: int | None = None,
    columns: int = 3,
) -> None:
    """Draw heat maps of how often needles were found, depth down and length across.

    Args:
        panels: name -> length, in tokens -> depth, from 0 to 1 -> share found, from 0 to 1. All have the same cells.
        path: the PNG to write.
        mark: a length to mark, the context of the first training.
        columns: panels beside each other, at most.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    lengths = list(next(iter(panels.values())))
    depths = list(panels[next(iter(panels))][lengths[0]])
    across = 2 if len(panels) == 4 else min(columns, len(panels))
    down = math.ceil(len(panels) / across)
    size = ((0.62 * len(lengths) + 0.5) * across + 1.6, (0.36 * len(depths) + 0.8) * down + 0.5)
    figure, axes = pyplot.subplots(
        down, across, figsize=size, dpi=150, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for axis, (name, found) in zip(axes.flat, panels.items(), strict=False):
        cells = [[found[length][depth] for length in lengths] for depth in depths]
        picture = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                colour = "black" if value > 0.6 else "white"
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        within = sum(int(length) <= (mark or 0) for length in lengths)
        if 0 < within < len(lengths):
            axis.axvline(within - 0.5, color="tab:red", linestyle=":", linewidth=2)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(depths)), [f"{100 * float(depth):g} %" for depth in depths])
        axis.tick_params(labelsize=8)
        axis.spines[:].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("length, tokens", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth", fontsize=9)
    bar = figure.colorbar(picture, ax=axes, format=lambda value, _: f"{100 * value:.0f} %", pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    note = f"\ndotted: the original context of {mark} tokens" if mark else ""
    figure.suptitle(title + note, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def _spread(values: Mapping[str, float], limits: tuple[float, float]) -> dict[str, float]:
    """Return where labels go on a logarithmic axis: at their values, moved apart where they would overlap."""
    gap = math.log(limits[1] / limits[0]) * 0.055
    placed: dict[str, float] = {}
    lowest = -math.inf
    for name in sorted(values, key=lambda n: values[n]):
        lowest = max(math.log(values[name]), lowest + gap)
        placed[name] = math.exp(lowest)
    return placed
