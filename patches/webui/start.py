"""The hook that has to be there before webui's first import, for `--loader Ropewalk --model X`.

Two things put it there: `ropewalk webui run`, and a .pth file that `ropewalk webui install --at-start` writes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ropewalk.errors import PatchError
from ropewalk.patches import webui
from ropewalk.patches.webui import known, options
from ropewalk.patches.webui.watch import watch

log = logging.getLogger("ropewalk")

_ends: list[Callable[[], None]] = []
_refused: list[PatchError] = []


def hook() -> None:
    """Watch for webui's modules, which nothing has imported yet. Doing it twice changes nothing."""
    if not _ends:
        then = {"modules.shared": _shared_was_imported, "modules.models": _models_was_imported}
        _ends.append(watch(then, {"modules.shared": _parsing_our_arguments}))


def unhook() -> None:
    """Watch no more."""
    while _ends:
        _ends.pop()()


def hook_if_webui() -> None:
    """Do `hook`, if this process was started to run webui's server.py."""
    for argument in sys.orig_argv[1:]:
        if Path(argument).name == "server.py":
            if known.is_webui(Path(argument).parent):
                hook()
            return


@contextmanager
def _parsing_our_arguments() -> Iterator[None]:
    """Have our options in webui's parser, which it makes and uses while `modules.shared` is imported."""
    parse_args = argparse.ArgumentParser.parse_args

    def with_ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        options.add_arguments(self)
        return parse_args(self, *args, **kwargs)

    argparse.ArgumentParser.parse_args = with_ours  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]


def _shared_was_imported(shared: Any) -> None:
    """Take the loader's name from the arguments as they were given: webui has dropped the one it does not know."""
    if options.is_ours(getattr(getattr(shared, "original_args", None), "loader", None)):
        if _refused:  # by then, as some webuis import their models first
            raise SystemExit(f"ropewalk: {_refused[0]}")
        shared.args.loader = shared.original_args.loader = options.NAME


def _models_was_imported(_: Any) -> None:
    try:
        webui.apply()
    except PatchError as error:
        _refused.append(error)
        if options.is_ours(getattr(getattr(sys.modules["modules.shared"], "args", None), "loader", None)):
            raise SystemExit(f"ropewalk: {error}") from None
        log.warning("%s", error)
