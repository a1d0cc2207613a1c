"""The kernels of the CPU: C++ that is compiled once, at install or at first use, and loaded when it is needed.

The sources in this folder register operators for schemas that Python modules define with torch.library; this
package only brings them into the process. What the environment says:

    ROPEWALK_CPU_KERNELS=0    do without them
    ROPEWALK_CPU_LEVEL        the highest instruction set that they may use; the C++ side reads it
    ROPEWALK_CPU_CFLAGS       further flags for compiling and linking (a sanitizer's)
    ROPEWALK_CACHE            where libraries are kept, instead of ~/.cache/ropewalk
    CXX, MAX_JOBS             the compiler, and how many of it run at once

This floor knows no model, file or front end; importing it compiles and loads nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

from ropewalk.cpu import build

__all__ = ["load", "status"]

_lock = threading.Lock()
# What became of the one attempt of this process.
_library: Path | None = None
_failure: build.BuildError | None = None
_nothing_built = False  # when it was last looked for


def load(*, notice: bool = True, build_it: bool = True) -> bool:
    """Load the operators, built first where no built library is found; return whether they are there.

    Only the first call does anything, and a build that failed is not tried again in this process: it says so
    once, in a warning of the logger "ropewalk". With ROPEWALK_CPU_KERNELS=0 this is False, and silent.

    Args:
        notice: whether to warn; a caller that passes False tells the user itself what `status` says.
        build_it: False for what is not worth waiting for a compiler; it gets the library that is there, if one is.
    """
    global _library, _failure, _nothing_built
    if _off():
        return False
    if _library is not None:
        return True
    if not build_it and _nothing_built:
        return False
    with _lock:
        if _library is None and _failure is None:
            try:
                _library = _find_or_build(build_it)
                _nothing_built = _library is None
            except build.BuildError as error:
                _failure = error
                if notice:
                    logging.getLogger("ropewalk").warning(
                        "on the CPU packed layers are computed in plain torch, much slower than by ropewalk's "
                        "kernels: %s",
                        error,
                    )
    return _library is not None


def status() -> dict[str, Any]:
    """Return how things stand, without building or loading anything.

    Returns:
        {"state", "library", "compiler", "why"}. state is "loaded" (in this process), "built" (lies ready),
        "not built" (first use will), "failed" (here, or when these sources were last compiled), "no compiler"
        or "off". library is a path or None, compiler its command and version or None, why a line or None.
    """
    compiler, lacking = None, None
    try:
        compiler = str(build.find_compiler())
    except build.NoCompilerError as error:
        lacking = str(error)
    library = _library or (None if _failure else _ready())
    failed = None if library else str(_failure) if _failure else build.earlier_failure(build.SOURCES)
    why = None
    if _off():
        state, why = "off", "ROPEWALK_CPU_KERNELS=0"
    elif library:
        state = "loaded" if _library else "built"
    elif lacking:
        state, why = "no compiler", lacking
    else:
        state, why = "failed" if failed else "not built", failed
    return {
        "state": state,
        "library": str(library) if library else None,
        "compiler": compiler,
        "why": why,
    }


def _off() -> bool:
    return os.environ.get("ROPEWALK_CPU_KERNELS") == "0"


def _find_or_build(build_it: bool) -> Path | None:
    """Load the library built at install, the cache's, or a new one; return its path."""
    library = build.intact(_prebuilt(), build.key_of(build.SOURCES))
    if library and _refused(library) is None:
        return library
    library = build.cached(build.SOURCES)
    if library and _refused(library) is None:
        return library
    if not build_it:
        return None
    library = build.build(build.SOURCES, anew=library is not None)
    why = _refused(library)
    if why is not None:
        raise build.BuildError(f"a library was built, but does not load: {why}")
    return library


def _prebuilt() -> Path:
    """Return where setup.py puts the library that it builds at install."""
    return build.SOURCES / "prebuilt"


def _ready() -> Path | None:
    """Return a built library that would be loaded, or None."""
    return build.intact(_prebuilt(), build.key_of(build.SOURCES)) or build.cached(build.SOURCES)


def _refused(library: Path) -> str | None:
    """Load a library; return None, or why it does not load."""
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return str(error.__cause__ or error)
    return None
