"""Tables with a column for each model with each rope, which `perplexity` and `needle` print."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ropewalk.commands.options import check_rope, load, rope_of
from ropewalk.shipped import resolve
from ropewalk.terminal import Output

LONGEST_NAME = 28  # of a model above its column


class Column(NamedTuple):
    """A loaded model with one of its ropes.

    Attributes:
        name: a short one: of the model where there are several, and of the rope where there are several.
        source: the model as it was named.
        rope: what is known of its rope, as `--json` prints it.
        original: how many tokens the model was first trained with, if its config tells that they were fewer.
        model, tokenizer: of transformers. The next column may be the same model with another rope.
    """

    name: str
    source: str
    rope: dict[str, Any]
    original: int | None
    model: Any
    tokenizer: Any


def check(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the models and ropes that were asked for, each once.

    Raises:
        UsageError: a rope that no model could have.
    """
    for rope in args.rope:
        check_rope(rope)
    return list(dict.fromkeys(args.model)), list(dict.fromkeys(args.rope))


def columns(args: argparse.Namespace, out: Output) -> Iterator[Column]:
    """Load each model once, and yield it with each rope.

    Raises:
        what `ropewalk.load` raises; RopeError where a rope does not go with a model.
    """
    from ropewalk.loader.quantizer import install_rope
    from ropewalk.loader.rope import decide_rope

    models, ropes = check(args)
    shown = _short(models)
    for source in models:
        one = argparse.Namespace(**{**vars(args), "model": source, "rope": ropes[0]})
        model, tokenizer = load(one, out)
        for rope in ropes:
            if rope != ropes[0]:
                install_rope(model, decide_rope(_config(args, source), rope))
            found = rope_of(model)
            asked = f"auto ({found['type']})" if rope == "auto" else rope
            names = [shown[source]] * (len(models) > 1) + [asked] * (len(ropes) > 1)
            name = ", ".join(names) or found["type"]
            yield Column(name, source, found, _original(model.config), model, tokenizer)
        del model
        gc.collect()  # before the next one is loaded


def _original(config: Any) -> int | None:
    original = getattr(config, "original_max_position_embeddings", None)
    return original if isinstance(original, int) and original < config.max_position_embeddings else None


def common(values: Iterable[int | None]) -> int | None:
    """Return what all columns have in common, such as a context to mark in a picture; else None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _config(args: argparse.Namespace, source: str) -> dict[str, Any]:
    """Return config.json of a model that has been loaded, and so is here."""
    from ropewalk.loader.quantize_config import read_json
    from ropewalk.loader.source import find_source

    return read_json(find_source(resolve(source), revision=args.revision).folder / "config.json")


def _short(models: Sequence[str]) -> dict[str, str]:
    """Return short names: the last part of a name or path, cut in its middle, since its end tells the branch."""
    half = LONGEST_NAME // 2
    names = {model: Path(model).name for model in models}
    if len(set(names.values())) < len(models):
        names = {model: model for model in models}
    return {
        model: name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
        for model, name in names.items()
    }
