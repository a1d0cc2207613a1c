"""`ropewalk fastchat PROGRAM …`: FastChat's own programs, with our loader in them."""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib.util import find_spec

from ropewalk.commands.options import adapters, add_cpu_mode, add_rope, add_threads, check_rope, chosen
from ropewalk.errors import MissingPackageError, UsageError
from ropewalk.shipped import resolve
from ropewalk.terminal import Output

# what it is called here -> module of FastChat
PROGRAMS = {
    "cli": "fastchat.serve.cli",
    "worker": "fastchat.serve.model_worker",
    "controller": "fastchat.serve.controller",
    "openai_api_server": "fastchat.serve.openai_api_server",
}
# Those that load a model.
_LOADS = ("cli", "worker")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; what follows the program is its own."""
    add_rope(parser)
    parser.add_argument("--lora", action="append", metavar="DIR", help="a PEFT adapter to put on top; may be repeated")
    parser.add_argument("--cache-packed", action="store_true", help="keep packed layers on disk as the CPU wants them")
    add_cpu_mode(parser)
    add_threads(parser)
    parser.add_argument("program", choices=PROGRAMS, metavar="PROGRAM", help=", ".join(PROGRAMS))
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="…", help="its own arguments (PROGRAM --help lists them)"
    )


def run(args: argparse.Namespace, out: Output) -> None:
    """Run a program of FastChat in this process, as `python -m` would."""
    if out.json:
        raise UsageError("--json: expected none, since FastChat's programs print their own words, found it")
    if find_spec("fastchat") is None:
        raise MissingPackageError("fastchat: expected it installed (pip install 'ropewalk[fastchat]'), found none")
    check_rope(args.rope)
    given = list(args.arguments)
    if args.program in _LOADS and not {"-h", "--help"} & set(given):
        given = _prepare(args, given)
    elif args.program == "openai_api_server":
        from ropewalk.patches import fastchat

        fastchat.mend_streaming()
    sys.argv = [args.program, *given]
    runpy.run_module(PROGRAMS[args.program], run_name="__main__", alter_sys=True)


def _prepare(args: argparse.Namespace, given: list[str]) -> list[str]:
    """Patch what loads models; return the program's arguments with `demo` and the device filled in."""
    import torch
    from fastchat.conversation import conv_templates

    from ropewalk.patches import fastchat, patch

    if args.threads:
        torch.set_num_threads(args.threads)
    patch("transformers", "fastchat")
    options = chosen(args, ("rope", "cpu_mode", "cache_packed"))
    fastchat.load_with(**options, **({"lora": adapters(args.lora)} if args.lora else {}))
    if _value(given, "--device") is None and not torch.cuda.is_available():
        given += ["--device", "cpu"]  # its own default is cuda
    template = _value(given, "--conv-template")
    if template is not None and template not in conv_templates:
        raise UsageError(f"--conv-template: expected one of {', '.join(conv_templates)}, found {template!r}")
    if _value(given, "--model-path") == "demo":
        given += ["--model-path", str(resolve("demo"))]  # the last one counts
    return given


def _value(given: list[str], option: str) -> str | None:
    """Return the last value that an option has among arguments."""
    found = None
    for i, text in enumerate(given):
        if text == option and i + 1 < len(given):
            found = given[i + 1]
        elif text.startswith(f"{option}="):
            found = text.partition("=")[2]
    return found
