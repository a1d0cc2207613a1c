"""Replacing a function of webui in every module that has imported it by name, and giving it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from ropewalk.patches.replace import Replacements


class Rebindings(Replacements):
    """Functions that were replaced in all of webui, and what else is to be undone with them."""

    def __init__(self) -> None:
        super().__init__()
        self._rebound: list[tuple[str, Any, Any]] = []
        self._undo: list[Callable[[], Any]] = []

    def rebind(self, owner: Any, name: str, value: Any) -> None:
        """Replace `owner.name` there and wherever in webui the same object goes by the same name."""
        original = getattr(owner, name)
        self._rebound.append((name, original, value))
        for module in _modules():
            if vars(module).get(name) is original:
                self.put(module, name, value)

    def also(self, undo: Callable[[], Any]) -> None:
        """Have `restore` call something, too."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Give everything back, to modules as well that were imported since, which found ours."""
        super().restore()
        for name, original, value in self._rebound:
            for module in _modules():
                if vars(module).get(name) is value:
                    setattr(module, name, original)
        while self._undo:
            self._undo.pop()()
        self._rebound.clear()


def _modules() -> Iterator[Any]:
    """Yield what webui consists of: its program, its modules and its extensions."""
    for name, module in list(sys.modules.items()):
        if module is not None and name.startswith(("__main__", "modules.", "extensions.", "user_ext_")):
            yield module
