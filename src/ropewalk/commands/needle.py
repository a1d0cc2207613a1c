"""`ropewalk needle [MODEL …] --rope auto none`: whether a model finds a line again, by length and depth."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ropewalk.commands.columns import Column, check, columns, common
from ropewalk.commands.options import add_model, add_out, check_out, positive, read_text, write_out
from ropewalk.shipped import held_out_text
from ropewalk.terminal import Output, table

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the context, the lengths by default
TOKENS_PER_BATCH = 8192
CHUNK = 2048


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser, several=True, default="needle")
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        metavar="N",
        help="of prompts, in tokens (default: an eighth, a quarter, a half, three quarters and all of the context)",
    )
    parser.add_argument(
        "--depths",
        type=share,
        nargs="+",
        default=DEPTHS,
        metavar="SHARE",
        help="where the line is: 0 at the beginning, 1 right before the question (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--samples", type=positive, default=16, metavar="N", help="prompts for each length and depth (default: 16)"
    )
    parser.add_argument(
        "--distractors", type=int, default=3, metavar="N", help="lines with other keys in a prompt (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of keys, values, places and texts (default: 0)")
    parser.add_argument("--text", metavar="FILE", help="what to hide it in; - is stdin (default: demo's held-out text)")
    parser.add_argument(
        "--chunk",
        type=positive,
        default=CHUNK,
        metavar="N",
        help=f"read longer prompts so many tokens at a time, over a KV cache (default: {CHUNK})",
    )
    add_out(parser, "a heat map for each column")


def share(text: str) -> float:
    """Parse a number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, found {text}")
    return value


def run(args: argparse.Namespace, out: Output) -> None:
    """Print how often the value was found, in percent, a table for each model with each rope."""
    from ropewalk.bench.needle import chance, check_distractors
    from ropewalk.generation import context_length

    check_out(args)
    check(args)
    check_distractors(args.distractors)
    text = held_out_text() if args.text is None else read_text(args.text, "--text")
    lengths: list[int] = sorted(set(args.lengths or ()))
    guessing = chance(args.distractors)
    found, originals = [], []
    for column in columns(args, out):
        # All columns have the lengths of the first.
        longest = context_length(column.model)
        lengths = lengths or sorted({round(part * longest) for part in SHARES})
        if lengths[-1] > longest:
            out.note(f"note: {lengths[-1]} tokens are more than the {longest} that the config names ({column.name})")
        found.append(_measure(args, out, column, text, lengths))
        originals.append(column.original)
        _say(found[-1], out)
    out.say(
        f"\nfound in percent of {args.samples} prompts, {args.distractors} other lines in each; by guessing among all "
        f"values {100 * guessing['any_value']:.1f}, among those in the prompt {100 * guessing['value_in_prompt']:.1f}"
    )
    if args.plot:
        from ropewalk.plot import plot_needles

        maps = {one["name"]: one["accuracy"] for one in found}
        title = f"Lines found again, percent of {args.samples} prompts"
        plot_needles(maps, args.plot, title=title, mark=common(originals))
        out.note(f"plot: {args.plot}")
    settings = {key: getattr(args, key) for key in ("samples", "distractors", "seed")}
    write_out(args, out, {**found[0], **settings, "chance": guessing, **({"columns": found} if found[1:] else {})})


def _measure(
    args: argparse.Namespace, out: Output, column: Column, text: str, lengths: Sequence[int]
) -> dict[str, Any]:
    """Return what a column found, by length and depth."""
    import torch

    from ropewalk.bench.needle import Needles, prompts, retrieve

    needles = Needles(column.tokenizer)
    ids = torch.tensor(column.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    depths = sorted(set(args.depths))
    accuracy: dict[str, dict[str, float]] = {}
    probability: dict[str, dict[str, float]] = {}
    with out.bar(sum(lengths) * len(depths) * args.samples, f"needle, {column.name}") as bar:
        for length in lengths:
            accuracy[str(length)], probability[str(length)] = {}, {}
            for depth in depths:
                # The same keys, values and texts at every depth, and for every model and rope.
                generator = torch.Generator().manual_seed(args.seed * 1_000_003 + length)
                made = prompts(needles, ids, length, depth, args.samples, args.distractors, generator)
                right, chances = retrieve(column.model, made, args.chunk, TOKENS_PER_BATCH, bar.update)
                accuracy[str(length)][f"{depth:g}"] = sum(right) / len(right)
                probability[str(length)][f"{depth:g}"] = sum(chances) / len(chances)
    cells = [value for row in accuracy.values() for value in row.values()]
    return {
        "model": column.source,
        "rope": column.rope,
        "accuracy": accuracy,
        "probability": probability,
        "mean_accuracy": sum(cells) / len(cells),
        "name": column.name,
    }


def _say(found: dict[str, Any], out: Output) -> None:
    """Print a table, depth down and length across."""
    lengths = found["accuracy"]
    out.say(f"\n{found['name']}: {100 * found['mean_accuracy']:.1f} on average")
    rows = [(depth, *(f"{100 * lengths[n][depth]:.0f}" for n in lengths)) for depth in next(iter(lengths.values()))]
    out.say(table([("depth, length", *lengths), *rows]))
