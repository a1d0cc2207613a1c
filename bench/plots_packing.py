"""The picture of `ropewalk bench packing`: quality over bits."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.bench.packing import Row, line_name

_COLOURS = {32: "C0", 128: "C1", -1: "C2"}


def plot_packing(rows: Sequence[Row], path: str, *, title: str) -> None:
    """Draw KL over the bits of a packed weight, scales and all, with a line for each group size, order and method.

    Args:
        rows: as `bench_packing` returns them.
        path: the PNG to write.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["bits"] is not None:
            lines.setdefault(line_name(row), []).append(row)
    figure, axis = pyplot.subplots(figsize=(8.5, 5), dpi=110, layout="constrained")
    for name, line in lines.items():
        line = sorted(line, key=lambda row: row["bits_per_weight"])
        first = line[0]
        style = ":" if first["method"] == "rtn" else "-" if first["desc_act"] else "--"
        axis.plot(
            [row["bits_per_weight"] for row in line],
            [row["kl"] for row in line],
            style,
            marker="o" if first["sym"] else "s",
            color=_COLOURS.get(first["group_size"] or 0, "C3"),
            markerfacecolor="white" if not first["sym"] else None,
            ms=4,
            label=name,
        )
    axis.set_yscale("log")
    axis.set_xscale("log", base=2)
    axis.set_xticks([2, 3, 4, 8], ["2", "3", "4", "8"])
    axis.minorticks_off()
    axis.set_xlabel("bits of a packed weight, with scales, zero points and order")
    axis.set_ylabel("KL(float || packed), nats a token")
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
