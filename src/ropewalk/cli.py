"""The command `ropewalk`.

Every command takes --json (one JSON object on stdout and nothing else there), exits with 0 on success, 2 on
bad usage and 1 on a failure, and says in one line on stderr what went wrong (--debug: with the traceback).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from typing import NoReturn

from ropewalk import __version__
from ropewalk.errors import RopewalkError, UsageError
from ropewalk.terminal import Output

# command -> what `ropewalk --help` says of it; each is a module of ropewalk.commands
COMMANDS = {
    "demo": "the main job on the small model that ships with the package",
    "inspect": "what is in a checkpoint, which rotary embedding it means, and what it would cost on a device",
    "generate": "continue a prompt, streaming",
    "chat": "a chat in the terminal",
    "serve": "transformers' server with GPTQ models, for programs that talk to OpenAI's",
    "perplexity": "perplexity over a text, by length of context",
    "needle": "whether a model finds a line again that it has read, by length and depth",
    "quantize": "pack a float16 model with GPTQ",
    "convert": "write any checkpoint that is read here as safetensors",
    "export": "write a checkpoint with its rope as longrope, for engines without our code: vLLM, transformers, …",
    "bench": "our kernels against others found here, in one run",
    "compile": "kernels ahead of time for named architectures: registers, shared memory, spills",
    "tune": "find the fastest plans for the GPU that is here, and keep them",
    "fastchat": "FastChat's command line and servers, with our loader in them",
    "webui": "our loader in text-generation-webui: install, uninstall, run",
    "doctor": "what is installed here, and what will be used",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser(command: str | None) -> Parser:
    """Return the parser, with the arguments of `command` filled in: the others' modules stay unimported."""
    parser = Parser(prog="ropewalk", description="Long-context GPTQ models, right and fast.")
    parser.add_argument("--version", action="version", version=f"ropewalk {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=f"ropewalk {name}: {summary}.")
        if name == command:
            importlib.import_module(f"ropewalk.commands.{name}").arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((a for a in arguments if not a.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    out = Output(json=args.json)
    _quiet_libraries(args.debug)
    try:
        importlib.import_module(f"ropewalk.commands.{args.command}").run(args, out)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
        return 1
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, (RopewalkError, OSError, MemoryError))
        kind = "" if known else f"unexpected {type(error).__name__}: "
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if known else " (--debug shows where)"
        print(f"ropewalk {args.command}: {kind}{text}{hint}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _quiet_libraries(debug: bool) -> None:
    """Log our own words to stderr; let libraries speak only of errors, and show bars only to a terminal."""
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, format="%(name)s: %(message)s")
    ours = logging.getLogger("ropewalk")
    ours.setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "info" if debug else "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
