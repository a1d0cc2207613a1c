"""`ropewalk generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse

from ropewalk.commands.options import add_model, load, positive, read_text, rope_of
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
    parser.add_argument("--max-new-tokens", type=positive, default=200, metavar="N", help="(default: 200)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="0 is all (default: 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    parser.add_argument("--seed", type=int, help="of the sampling")


def run(args: argparse.Namespace, out: Output) -> None:
    """Stream a continuation."""
    from ropewalk import templates
    from ropewalk.generation import generate

    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p: expected above 0 and at most 1, found {args.top_p:g}")
    if args.top_k < 0:
        raise UsageError(f"--top-k: expected 0 or more, found {args.top_k}")
    if args.repetition_penalty <= 0:
        raise UsageError(f"--repetition-penalty: expected above 0, found {args.repetition_penalty:g}")
    if args.template not in (None, "auto", *TEMPLATES):
        raise UsageError(f"--template: expected auto or one of {', '.join(TEMPLATES)}, found {args.template!r}")
    text = args.prompt if args.prompt is not None else read_text(args.prompt_file, "--prompt-file")
    model, tokenizer = load(args, out)
    prompt, stop = templates.apply(text, args.template, system=args.system, tokenizer=tokenizer)
    made = generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
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
