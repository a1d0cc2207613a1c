"""`ropewalk webui`: our loader in text-generation-webui."""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
import traceback
from pathlib import Path

from ropewalk.errors import MissingFileError
from ropewalk.terminal import Output


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    put = actions.add_parser("install", help="put the extension and the instruction templates into a webui's folder")
    put.add_argument(
        "--at-start",
        action="store_true",
        help="also have this Python add the loader whenever it runs webui's server.py (a .pth file), so that "
        "`python server.py --loader Ropewalk --model X` works as it is",
    )
    out = actions.add_parser("uninstall", help="remove all that, and nothing else")
    for action in (put, out):
        action.add_argument("folder", type=Path, metavar="DIR", help="webui's folder, the one with server.py")
        for flag in ("--json", "--debug"):
            action.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    run_it = actions.add_parser(
        "run", help="run webui with the loader in it: run server.py --loader Ropewalk --model X"
    )
    run_it.add_argument("server", type=Path, metavar="server.py", help="webui's program; it runs in its folder")
    run_it.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what it takes, and --rope and such")


def run(args: argparse.Namespace, out: Output) -> None:
    """Do what was asked.

    Raises:
        MissingFileError: no webui where it should be.
        UsageError: files of somebody else where ours would be.
    """
    if args.action == "run":
        _run_server(args.server.expanduser(), args.arguments)
        return
    from ropewalk.webui import install

    if args.action == "install":
        done = install.install(args.folder, args.at_start)
        out.result(done)
        out.say(f"installed in {done['webui']}:")
        for file in done["files"]:
            out.say(f"  {file}")
        started = "python server.py" if args.at_start else "ropewalk webui run server.py"
        out.say(f"start it there with: {started} --loader Ropewalk --model FOLDER --extensions ropewalk")
        return
    done = install.uninstall(args.folder)
    out.result(done)
    out.say(f"removed from {done['webui']}: {len(done['removed'])} files")
    for file in done["removed"]:
        out.say(f"  {file}")
    for sentence in done["left"]:
        out.note(f"left as it is: {sentence}")


def _run_server(server: Path, arguments: list[str]) -> None:
    """Run webui's program in this process and its folder, with our hook before its first import."""
    from ropewalk.patches.webui import known, start

    folder = server.parent
    if not server.is_file() or not known.is_webui(folder):
        found = "another" if server.is_file() else "none"
        raise MissingFileError(server, f"the server.py of {known.PACKAGE}", found)
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
    sys.argv = [server.name, *arguments]
    logging.getLogger().handlers.clear()  # the command's own; webui has its own, and each line would come twice
    start.hook()
    try:
        runpy.run_path(server.name, run_name="__main__")
    except Exception:  # webui's own, to be seen as if it had been run by itself
        traceback.print_exc()
        raise SystemExit(1) from None
