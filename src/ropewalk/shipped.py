"""The small model that ships with the package, and the text it has not seen."""

from __future__ import annotations

from pathlib import Path

from ropewalk.errors import MissingFileError

NAME = "strand-4m-pntk-1k-gptq"
FOLDER = Path(__file__).parent / "models" / NAME
NEEDLE_NAME = "strand-4m-needle-1k"


def held_out_text() -> str:
    """Return public-domain English that the model was not trained on (see its README)."""
    return (FOLDER / "heldout.txt").read_text(encoding="utf-8")


def needle_folder() -> Path:
    """Return where the float16 model that was tuned to find needles is: in the repository, not in a wheel.

    Raises:
        MissingFileError: there is none beside this code or below the current folder.
    """
    # In an editable install this file is a link into the repository.
    roots = (Path(__file__).resolve().parents[2], Path.cwd())
    for folder in (root / "bench" / "models" / NEEDLE_NAME for root in roots):
        if folder.is_dir():
            return folder
    raise MissingFileError(
        f"bench/models/{NEEDLE_NAME}", "the folder of ropewalk's repository (it is in no wheel)", "none here"
    )


def resolve(model: str | Path) -> str | Path:
    """Return what `ropewalk.loader.source.find_source` takes for what a user names.

    `demo` is the folder of the shipped model and `needle` the one of the repository that finds needles, unless there
    are folders of these names; all else is left as it is.

    Raises:
        MissingFileError: `needle` where there is no repository.
    """
    if model not in ("demo", "needle") or Path(model).exists():
        return model
    return FOLDER if model == "demo" else needle_folder()
