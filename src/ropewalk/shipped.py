"""The small model that ships with the package, and the text it has not seen."""

from __future__ import annotations

from pathlib import Path

NAME = "strand-4m-pntk-1k-gptq"
FOLDER = Path(__file__).parent / "models" / NAME


def held_out_text() -> str:
    """Return public-domain English that the model was not trained on (see its README)."""
    return (FOLDER / "heldout.txt").read_text(encoding="utf-8")


def resolve(model: str | Path) -> str | Path:
    """Return what `ropewalk.loader.source.find_source` takes for what a user names.

    `demo` is the folder of the shipped model, unless there is a folder of that name; all else is left as it is.
    """
    return FOLDER if model == "demo" and not Path(model).exists() else model
