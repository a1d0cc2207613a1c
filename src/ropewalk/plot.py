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


def _spread(values: Mapping[str, float], limits: tuple[float, float]) -> dict[str, float]:
    """Return where labels go on a logarithmic axis: at their values, moved apart where they would overlap."""
    gap = math.log(limits[1] / limits[0]) * 0.055
    placed: dict[str, float] = {}
    lowest = -math.inf
    for name in sorted(values, key=lambda n: values[n]):
        lowest = max(math.log(values[name]), lowest + gap)
        placed[name] = math.exp(lowest)
    return placed
