"""What the benchmarks of a folder come to: tables for people, and pictures of shares of the limit.

python -m ropewalk.bench.summary bench/results/cpu
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ropewalk.bench.decode_rows import decode_table
from ropewalk.bench.load_rows import load_summary
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.plots import plot_shares
from ropewalk.bench.report import Row, case_name, machine_name
from ropewalk.terminal import table

# Those that ours is to be compared with, in columns.
PEERS = ("llama.cpp", "torch-bf16", "torch-int4", "gptqmodel")
EXPERTS_PEERS = (f"{OURS}-one-by-one", "transformers-grouped", "transformers-eager", "llama.cpp-one-by-one")


def main() -> None:
    """Read matmul.json, moe.json, decode*.json and load.json, print tables, and draw what shares of the limit kernels
    reach.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    kinds = {"matmul": _products, "moe": _products, "decode": _decode, "decode-context": _contexts}
    kinds |= {"decode-batch": _contexts, "decode-vllm": _contexts, "load": _load}
    for name, show in kinds.items():
        path = folder / f"{name}.json"
        if path.is_file():
            show(name, json.loads(path.read_text()), folder)


def _products(name: str, found: dict[str, Any], folder: Path) -> None:
    rows, machine = found["results"], machine_name(found["machine"])
    limit = f"{found['limit']['read_gb_per_s']:.1f} GB/s"
    print(f"\n{machine}: {limit}. How many times as fast as each other one ours is:\n")
    print(products_summary(rows, PEERS if name == "matmul" else EXPERTS_PEERS))
    plot_shares(rows, str(folder / f"{name}-share.png"), title=machine, ours=OURS)


def _decode(name: str, found: dict[str, Any], folder: Path) -> None:
    rows = found["results"]
    for case in dict.fromkeys(case_name(row) for row in rows):
        print(f"\n{case}\n")
        print(decode_table([row for row in rows if case_name(row) == case], OURS))


def _contexts(name: str, found: dict[str, Any], folder: Path) -> None:
    rows = found["results"]
    for case in dict.fromkeys(case_name(row, m=False) for row in rows):
        print(f"\n{case}: tokens/s (share of what the machine allows), memory at the peak\n")
        print(contexts_summary([row for row in rows if case_name(row, m=False) == case]))


def _load(name: str, found: dict[str, Any], folder: Path) -> None:
    for text in load_summary(found["results"], OURS):
        print(text)


def products_summary(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Return a line for each case and mode of ours: GB/s, share of the limit, and how many times as fast as others.

    What another cannot hold has "–"; so has a wrong result, in either.
    """
    lines = [("", "", "GB/s", "of limit", "bound by", *peers)]
    for row in rows:
        if row["kernel"].startswith(OURS) and row["kernel"] not in peers:
            who = row.get("mode") or row["kernel"]
            lines.append((case_name(row), who, *_figures(row), *_ratios(row, peers)))
    return table(lines)


def contexts_summary(rows: Sequence[Row]) -> str:
    """Return a line for each length of context and number of sequences, a column for each program."""
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    right = {(row["context"], row["batch"], row["kernel"]): row for row in rows if row["verdict"] != "wrong"}
    lines = [("context", "sequences", *names)]
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in rows):
        cells = (_cell(right.get((context, batch, name))) for name in names)
        lines.append((f"{context:,}", str(batch), *cells))
    return table(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row['tokens_per_s']:.3g} ({row['share_of_limit']:.0%}), {row['peak_bytes'] / 1e9:.2f} GB"


def _figures(row: Row) -> tuple[str, str, str]:
    bound = {"read": "reading", "flops": "arithmetic"}[row["bound"]]
    return f"{row['gb_per_s']:.1f}", f"{row['share_of_limit']:.0%}", bound


def _ratios(row: Row, peers: Iterable[str]) -> tuple[str, ...]:
    right = {} if row["verdict"] == "wrong" else row["ratio_to"]
    return tuple(f"{right[name]:.2f}" if name in right else "–" for name in peers)


if __name__ == "__main__":
    main()
