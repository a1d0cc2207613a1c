"""What a command prints: words or one JSON object on stdout, progress and notices on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Output:
    """Where a command's words go.

    Args:
        json: whether stdout is kept for one JSON object.
    """

    def __init__(self, json: bool = False):
        self.json = json

    def say(self, text: str = "", end: str = "\n") -> None:
        """Print for a person; on stdout, or nowhere with --json."""
        if not self.json:
            print(text, end=end, flush=True)

    def note(self, text: str) -> None:
        """Print a notice on stderr."""
        print(text, file=sys.stderr, flush=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print the JSON object, with --json."""
        if self.json:
            print(json.dumps(value), flush=True)

    def bar(self, total: int, name: str, unit: str = "token") -> Any:
        """Return a tqdm progress bar on stderr; it shows only on a terminal."""
        from tqdm import tqdm

        return tqdm(total=total, desc=name, unit=unit, unit_scale=True, leave=False, disable=not sys.stderr.isatty())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, the first column flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def size(nbytes: int) -> str:
    """Return a number of bytes for a person: 3.9 MB, 7.26 GB."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
