"""`ropewalk generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse

from ropewalk.commands.options import add_model, add_sampling, load, read_text, rope_of, sampling
from ropewalk.errors import UsageError
from ropewalk.templates import TEMPLATES
from ropewalk.terminal import Output


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file to continue; - is stdin")
    parser.add_argument("--template", metavar="NAME", help=f"put the prompt into: auto, {', '.join(TEMPLATES)}")
    parser.add_argument("--system", metavar="TEXT", help="system text for the template")
    add_sampling(parser, temperature=0.0, max_new_tokens=200)


def run(args: argparse.Namespace, out: Output) -> None:
    """Stream a continuation."""
    from ropewalk import templates
    from ropewalk.generation import generate

    settings = sampling(args)
    if args.template not in (None, "auto", *TEMPLATES):
        raise UsageError(f"--template: expected auto or one of {', '.join(TEMPLATES)}, found {args.template!r}")
    text = args.prompt if args.prompt is not None else read_text(args.prompt_file, "--prompt-file")
    model, tokenizer = load(args, out)
    prompt, stop = templates.apply(text, args.template, system=args.system, tokenizer=tokenizer)
    made = generate(
        model,
        tokenizer,
        prompt,
        **settings,
        stop=[*stop, *args.stop],
        on_start=lambda: out.say("" if args.template else prompt, end=""),
        on_text=lambda piece: out.say(piece, end=""),
    )
    out.say()
    out.note(
        f"{made.prompt_tokens} tokens of prompt in {made.prefill_seconds:.2f} s, {made.new_tokens} new at "
        f"{made.tokens_per_second:.1f} tokens/s; ended by {made.stopped}"
    )
    out.result(
        {
            "model": args.model,
            "rope": rope_of(model),
            "prompt_tokens": made.prompt_tokens,
            "new_tokens": made.new_tokens,
            "prefill_seconds": made.prefill_seconds,
            "decode_seconds": made.decode_seconds,
            "tokens_per_second": made.tokens_per_second,
            "stopped": made.stopped,
            "text": made.text,
        }
    )
