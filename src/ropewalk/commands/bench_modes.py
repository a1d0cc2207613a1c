"""`ropewalk bench modes`: what our modes on a CPU cost in quality."""

from __future__ import annotations

import argparse

from ropewalk.commands.options import load, read_text, rope_of, write_out
from ropewalk.terminal import Output


def bench_modes_command(args: argparse.Namespace, out: Output) -> None:
    """Print what each mode of packed layers on the CPU costs.

    Raises:
        UsageError: options of the other benchmarks that would seem to be heeded.
        ContextLengthError: a text shorter than a context.
    """
    import torch

    from ropewalk.bench.modes import WINDOW, bench_modes, modes_table
    from ropewalk.bench.perplexity import windows
    from ropewalk.bench.report import machine
    from ropewalk.errors import ContextLengthError, UsageError
    from ropewalk.generation import context_length
    from ropewalk.shipped import held_out_text

    for option, found, expected in (("--device", args.device, "cpu"), ("--dtype", args.dtype, "float32")):
        if found not in (None, expected):
            raise UsageError(f"{option}: expected {expected} for modes, found {found}")
    if args.plot:
        raise UsageError("--plot: expected it for rope, matmul, moe, decode and load, found modes")
    args.rope, args.device, args.dtype = "auto", "cpu", "float32"
    args.bits = args.group_size = None  # those of the model
    text = held_out_text() if args.text is None else read_text(args.text, "--text")
    contexts = sorted(set(args.context or [256, 1024]))
    model, tokenizer = load(args, out)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: args.tokens]
    if contexts[-1] > context_length(model):
        out.note(f"note: {contexts[-1]} tokens are more than the {context_length(model)} that the config names")
    if len(ids) < contexts[-1]:
        raise ContextLengthError(f"--text: expected at least {contexts[-1]} tokens, found {len(ids)}")
    # Every length reads the same tokens: as many as fill the longest windows.
    ids = ids[: len(ids) // contexts[-1] * contexts[-1]]
    with out.bar(3 * sum(len(windows(len(ids), n)) * n for n in contexts), "perplexity") as bar:
        rows = bench_modes(model, ids, contexts, bar.update)
    out.say(f"{len(ids):,} tokens in disjoint windows, logits of the first {min(WINDOW, len(ids))}")
    out.say(modes_table(rows))
    result = {"machine": machine(model.device), "model": args.model, "rope": rope_of(model), "tokens": len(ids)}
    result["results"] = rows
    write_out(args, out, result)
