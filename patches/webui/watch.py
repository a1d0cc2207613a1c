"""Having something done right after a module was imported, by whomever."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], None]
While = Callable[[], AbstractContextManager[Any]]


class _Watch:
    """A finder that leaves finding to the others, and runs what is wanted around the execution of some modules."""

    def __init__(self, then: Mapping[str, Then], during: Mapping[str, While]):
        self._then, self._during = dict(then), dict(during)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._then:
            return None
        then = self._then.pop(name)  # once; and the search below must not come here again
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with self._during.get(name, nullcontext)():
                execute(module)
            then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch(then: Mapping[str, Then], during: Mapping[str, While] | None = None) -> Callable[[], None]:
    """Call `then[name](module)` after a module is imported, the import itself within `during[name]()`.

    Returns:
        what ends the watch; calling it twice does no harm.
    """
    finder: Any = _Watch(then, during or {})
    sys.meta_path.insert(0, finder)

    def end() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)

    return end
