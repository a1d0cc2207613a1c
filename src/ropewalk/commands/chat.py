"""`ropewalk chat MODEL`: a chat in the terminal, or by a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ropewalk.commands.options import add_model, add_sampling, load, rope_of, sampling
from ropewalk.errors import ContextLengthError, UsageError
from ropewalk.templates import TEMPLATES
from ropewalk.terminal import Output

# Both ends of what goes over several lines, each on a line of its own.
_FENCE = '"""'
_HELP = f"A line is a turn, or several lines between two that are {_FENCE}; /reset begins anew, /exit or Ctrl-D ends."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser)
    parser.add_argument(
        "--template",
        default="auto",
        metavar="NAME",
        help="of the conversation: auto (the tokenizer's own, or by the model's name), none (what is typed is "
        f"continued as it is), {', '.join(TEMPLATES)}",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text, in place of the template's own")
    parser.add_argument("--no-history", action="store_true", help="answer every turn as if it were the first")
    add_sampling(parser, temperature=0.7, max_new_tokens=512)


def run(args: argparse.Namespace, out: Output) -> None:
    """Chat until the input ends."""
    from ropewalk.chat import Chat, choose_template

    settings = sampling(args)
    if args.template not in ("auto", "none", *TEMPLATES):
        raise UsageError(f"--template: expected auto, none or one of {', '.join(TEMPLATES)}, found {args.template!r}")
    model, tokenizer = load(args, out)
    template, why = choose_template(args.template, args.model, tokenizer)
    out.note(f"template: {template or 'none'}, {why}. {_HELP}")
    chat = Chat(model, tokenizer, template, system=args.system, stop=args.stop, history=not args.no_history, **settings)
    turns: list[dict[str, Any]] = []
    for text in _inputs(out):
        if text == "/reset":
            chat.reset()
            out.note("forgotten")
            continue
        try:
            reply = chat.answer(text, lambda piece: out.say(piece, end=""))
        except ContextLengthError as error:
            out.note(f"{error}; nothing was answered")
            continue
        out.say()
        if reply.dropped:
            few = "turn was" if reply.dropped == 1 else f"{reply.dropped} turns were"
            out.note(f"the oldest {few} left out: the context is {chat.context} tokens")
        turns.append({"user": text, **vars(reply)})
    out.result({"model": args.model, "template": template, "rope": rope_of(model), "turns": turns})


def _inputs(out: Output) -> Iterator[str]:
    """Yield what the user says, until the input ends or /exit."""
    shown = sys.stdin.isatty() and not out.json
    if shown:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (so that input() edits lines and remembers them)
    while True:
        text = _line("> " if shown else "")
        if text is not None and text.strip() == _FENCE:
            lines = []
            while (line := _line("… " if shown else "")) is not None and line.strip() != _FENCE:
                lines.append(line)
            text = "\n".join(lines)
        if text is None or text.strip() == "/exit":
            if text is None and shown:
                out.say()
            return
        if text.strip():
            yield text.strip() if text.strip() == "/reset" else text


def _line(prompt: str) -> str | None:
    """Return a line of the input, or None at its end."""
    try:
        return input(prompt)
    except EOFError:
        return None
