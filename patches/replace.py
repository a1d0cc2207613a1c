"""What every patch does alike: look at what it replaces, keep it, give it back."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ropewalk.errors import PatchError

log = logging.getLogger("ropewalk")

_ABSENT = object()


class Replacements:
    """Attributes of modules and classes that a patch has replaced; true while there are any."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, str, Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._kept)

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, and keep what stood there: as it stands in the owner itself, so that a classmethod comes
        back as one and an inherited attribute is inherited again.
        """
        self._kept.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Give everything back, last first. What somebody else has replaced meanwhile stays theirs, with a warning."""
        while self._kept:
            owner, name, before, ours = self._kept.pop()
            if vars(owner).get(name) is not ours:
                log.warning("%s.%s was replaced by others after us; it stays as it is", owner.__name__, name)
            elif before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def expect_arguments(front_end: str, name: str, function: Callable[..., Any], first: Sequence[str]) -> None:
    """Check that a function which is to be replaced has the arguments that are known here.

    Args:
        front_end: the package, for the message.
        name: of the function, for the message.
        first: names that its arguments begin with, without `self` or `cls` of a bound method.

    Raises:
        PatchError: it has others.
    """
    found = list(inspect.signature(function).parameters)
    if found[: len(first)] != list(first):
        known_as = " ".join(filter(None, (front_end, installed(front_end))))
        raise PatchError(known_as, f"{name}({', '.join(first)}, ...)", ", ".join(found))


def absent() -> None:
    """Stand for a function that is not there, which has none of the arguments that are expected of it."""


def installed(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
