"""`ropewalk perplexity MODEL --text FILE --context 512 2048`."""

from __future__ import annotations

import argparse

from ropewalk.commands.options import add_model, load, positive, read_text, rope_of
from ropewalk.shipped import held_out_text
from ropewalk.terminal import Output, table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser)
    parser.add_argument(
        "--text", metavar="FILE", help="what to read; - is stdin (default, for demo: its held-out text)"
    )
    parser.add_argument(
        "--context", type=positive, nargs="+", default=[512], metavar="N", help="lengths (default: 512)"
    )
    parser.add_argument(
        "--stride", type=positive, metavar="N", help="slide windows by so many tokens (default: disjoint)"
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="use only the first N tokens of the text")
    parser.add_argument("--plot", metavar="FILE", help="draw perplexity over context to a PNG")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print a table of perplexity by length of context."""
    import torch

    from ropewalk.bench.perplexity import perplexity, windows
    from ropewalk.errors import ContextLengthError, UsageError
    from ropewalk.generation import context_length

    if args.text is None and args.model != "demo":
        raise UsageError("--text: expected a file, found none")
    text = held_out_text() if args.text is None else read_text(args.text, "--text")
    contexts = sorted(set(args.context))
    model, tokenizer = load(args, out)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: args.tokens]
    if contexts[-1] > context_length(model):
        out.note(f"note: {contexts[-1]} tokens are more than the {context_length(model)} that the config names")
    if len(ids) < contexts[-1]:
        raise ContextLengthError(f"--text: expected at least {contexts[-1]} tokens, found {len(ids)}")
    # Every length reads the same tokens: as many as fill the longest windows.
    ids = ids[: len(ids) // contexts[-1] * contexts[-1]]
    found = {}
    total = sum(len(windows(len(ids), n, args.stride)) * n for n in contexts)
    with out.bar(total, "perplexity") as bar:
        for n in contexts:
            found[str(n)] = perplexity(model, ids, n, stride=args.stride, progress=bar.update)
    kind = f"sliding by {args.stride}" if args.stride else "disjoint"
    out.say(f"perplexity over {len(ids):,} tokens, {kind} windows, rope {rope_of(model)['type']}")
    out.say(table([("context", *found), ("perplexity", *(f"{value:.3f}" for value in found.values()))]))
    if args.plot:
        from ropewalk.plot import plot_perplexity

        plot_perplexity({rope_of(model)["type"]: found}, args.plot, title=f"Perplexity of {args.model}")
        out.note(f"plot: {args.plot}")
    out.result(
        {
            "model": args.model,
            "rope": rope_of(model),
            "tokens": len(ids),
            "stride": args.stride,
            "perplexity": found,
        }
    )
