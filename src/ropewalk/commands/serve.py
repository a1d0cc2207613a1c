"""`ropewalk serve [MODEL]`: `transformers serve` with the patch on."""

from __future__ import annotations

import argparse
import enum
from typing import Any

from ropewalk.errors import PatchError
from ropewalk.templates import TEMPLATES
from ropewalk.terminal import Output

# Only this machine is answered unless another address is asked for.
_HOST = "127.0.0.1"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: ours, and those of transformers' own command."""
    from ropewalk.serving import options

    parser.description = (
        "ropewalk serve: transformers' own server with GPTQ models, for programs that talk to OpenAI's "
        "(/v1/chat/completions, /v1/completions, /v1/models)."
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a name on the Hub (user/name or user/name:branch) or demo; without one, whatever requests name",
    )
    parser.add_argument("--template", metavar="NAME", help=f"chat template: {', '.join(TEMPLATES)}")
    group = parser.add_argument_group("options of transformers serve")
    try:
        theirs = options()
    except PatchError as error:
        parser.exit(1, f"ropewalk serve: {error}\n")
    for name, (kind, default, text) in theirs.items():
        _add(group, name, kind, _HOST if name == "host" else default, text)


def _add(group: Any, name: str, kind: Any, default: Any, text: str) -> None:
    """Add one of transformers' options."""
    flag, text = f"--{name.replace('_', '-')}", text.replace("%", "%%")
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    shown = text if default is None else f"{text} (default: {getattr(default, 'value', default)})"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        group.add_argument(flag, type=kind, choices=list(kind), default=kind(default), help=shown, metavar=name.upper())
        return
    group.add_argument(flag, type=kind, default=default, help=shown, metavar=name.upper())


def run(args: argparse.Namespace, out: Output) -> None:
    """Serve until the process is told to end."""
    from ropewalk.serving import check_packages, options, serve

    check_packages()
    out.result({"model": args.model, "url": f"http://{args.host}:{args.port}"})
    serve(args.model, args.template, **{name: getattr(args, name) for name in options()})
