"""`ropewalk perplexity MODEL [MODEL …] --rope auto none --text FILE --context 512 2048`: the model cards' table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ropewalk.commands.columns import Column, check, columns, common
from ropewalk.commands.options import add_model, add_out, check_out, positive, read_text, write_out
from ropewalk.shipped import held_out_text
from ropewalk.terminal import Output, table

CHUNK = 2048  # as in ropewalk.bench.perplexity, which would bring torch into --help


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser, several=True)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="what to read; - is stdin (default, for demo: its held-out text)")
    text.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="read a data set of the Hub, or a folder with one, by the package datasets; by default its split test",
    )
    parser.add_argument(
        "--context", type=positive, nargs="+", default=[512], metavar="N", help="lengths (default: 512)"
    )
    parser.add_argument(
        "--stride", type=positive, metavar="N", help="slide windows by so many tokens (default: disjoint)"
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="use only the first N tokens of the text")
    parser.add_argument(
        "--chunk",
        type=positive,
        default=CHUNK,
        metavar="N",
        help=f"read longer windows so many tokens at a time, over a KV cache (default: {CHUNK})",
    )
    add_out(parser, "perplexity over context, a line for each column")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print a table of perplexity, a row for each length of context, a column for each model with each rope."""
    from ropewalk.errors import UsageError

    check_out(args)
    models, _ = check(args)
    if args.text is None and args.dataset is None and set(models) != {"demo"}:
        raise UsageError("--text: expected a file, found none")
    text = _text(args)
    found, originals = [], []
    for column in columns(args, out):
        found.append(_measure(args, out, column, text))
        originals.append(column.original)
    _say(found, args.stride, out)
    if args.plot:
        from ropewalk.plot import plot_perplexity

        title = f"Perplexity of {models[0]}" if len(models) == 1 else "Perplexity by context"
        lines = {one["name"]: one["perplexity"] for one in found}
        plot_perplexity(lines, args.plot, title=title, mark=common(originals))
        out.note(f"plot: {args.plot}")
    write_out(args, out, {**found[0], **({"columns": found} if len(found) > 1 else {})})


def _text(args: argparse.Namespace) -> str:
    """Return what is read.

    Raises:
        MissingPackageError, UsageError: the data set, or the file, is not there or is not text.
    """
    if args.dataset is not None:
        from ropewalk.bench.dataset import dataset_text

        return dataset_text(args.dataset)
    return held_out_text() if args.text is None else read_text(args.text, "--text")


def _measure(args: argparse.Namespace, out: Output, column: Column, text: str) -> dict[str, Any]:
    """Return the perplexities of a column, and what they are of.

    Raises:
        ContextLengthError: a text shorter than the longest context.
    """
    import torch

    from ropewalk.bench.perplexity import perplexity, windows
    from ropewalk.errors import ContextLengthError
    from ropewalk.generation import context_length

    contexts = sorted(set(args.context))
    ids = torch.tensor(column.tokenizer(text, verbose=False)["input_ids"])[: args.tokens]
    if len(ids) < contexts[-1]:
        option = "--text" if args.dataset is None else "--dataset"
        raise ContextLengthError(f"{option}: expected at least {contexts[-1]} tokens, found {len(ids)}")
    if contexts[-1] > context_length(column.model):
        named = context_length(column.model)
        out.note(f"note: {contexts[-1]} tokens are more than the {named} that the config names ({column.name})")
    # Every length reads the same tokens: as many as fill the longest windows.
    ids = ids[: len(ids) // contexts[-1] * contexts[-1]]
    total = sum(len(windows(len(ids), n, args.stride)) * n for n in contexts)
    settings = {"stride": args.stride, "chunk": args.chunk}
    with out.bar(total, f"perplexity, {column.name}") as bar:
        values = {str(n): perplexity(column.model, ids, n, **settings, progress=bar.update) for n in contexts}
    return {
        "model": column.source,
        "rope": column.rope,
        "tokens": len(ids),
        "stride": args.stride,
        "perplexity": values,
        "name": column.name,
    }


def _say(found: Sequence[dict[str, Any]], stride: int | None, out: Output) -> None:
    """Print the table: across for a single column, else a row for each context."""
    tokens = " or ".join(dict.fromkeys(f"{column['tokens']:,}" for column in found))
    kind = f"perplexity over {tokens} tokens, {f'sliding by {stride}' if stride else 'disjoint'} windows"
    values = [column["perplexity"] for column in found]
    if len(found) == 1:
        out.say(f"{kind}, rope {found[0]['rope']['type']}")
        out.say(table([("context", *values[0]), ("perplexity", *(f"{value:.3f}" for value in values[0].values()))]))
        return
    out.say(kind)
    rows = [(n, *(f"{column[n]:.3f}" for column in values)) for n in values[0]]
    out.say(table([("context", *(column["name"] for column in found)), *rows]))
