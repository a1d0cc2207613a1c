"""What the benchmarks of a folder come to: one line for each case, and a picture of shares of the bandwidth.

python -m ropewalk.bench.summary bench/results/cpu
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ropewalk.bench.load import load_summary
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.plots import plot_shares
from ropewalk.bench.report import Row, case_name, decode_table
from ropewalk.terminal import table

# Those that ours is to be compared with, in columns.
PEERS = ("llama.cpp", "torch-bf16", "torch-int4", "gptqmodel")


def main() -> None:
    """Read matmul.json, decode.json and load.json, print tables, and draw matmul-share.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, show in (("matmul", _matmul), ("decode", _decode), ("load", _load)):
        path = folder / f"{name}.json"
        if path.is_file():
            show(json.loads(path.read_text()), folder)


def _matmul(found: dict[str, Any], folder: Path) -> None:
    rows, name = found["results"], f"{found['machine']['cpu']}, {found['machine']['threads']} threads"
    print(f"\n{name}: {found['limit']['read_gb_per_s']:.1f} GB/s. How many times as fast as each other one ours is:\n")
    print(matmul_summary(rows))
    plot_shares(rows, str(folder / "matmul-share.png"), title=name, ours=OURS)


def _decode(found: dict[str, Any], folder: Path) -> None:
    rows = found["results"]
    for case in dict.fromkeys(case_name(row) for row in rows):
        print(f"\n{case}\n")
        print(decode_table([row for row in rows if case_name(row) == case], OURS))


def _load(found: dict[str, Any], folder: Path) -> None:
    for text in load_summary(found["results"], OURS):
        print(text)


def matmul_summary(rows: Sequence[Row]) -> str:
    """Return a line for each case and mode of ours: GB/s, share of the limit, and how many times as fast as others.

    What another cannot hold has "–"; so has a wrong result, in either.
    """
    lines = [("", "", "GB/s", "of limit", "bound by", *PEERS)]
    for row in rows:
        if row["kernel"].startswith(OURS):
            who = row.get("mode") or row["kernel"]
            lines.append((case_name(row), who, *_figures(row), *_ratios(row, PEERS)))
    return table(lines)


def _figures(row: Row) -> tuple[str, str, str]:
    bound = {"read": "reading", "flops": "arithmetic"}[row["bound"]]
    return f"{row['gb_per_s']:.1f}", f"{row['share_of_limit']:.0%}", bound


def _ratios(row: Row, peers: Iterable[str]) -> tuple[str, ...]:
    right = {} if row["verdict"] == "wrong" else row["ratio_to"]
    return tuple(f"{right[name]:.2f}" if name in right else "–" for name in peers)


if __name__ == "__main__":
    main()
