"""One module for each front end, with `apply()`, `revert()` and `status()`.

`apply` checks the version and the signatures of what it replaces, keeps that, and returns one line that says what it
did; doing it twice changes nothing. It raises PatchError where the front end is not as it is known here, and has
changed nothing then. `revert` gives back what was kept. `status` imports nothing that is not imported already.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from ropewalk.errors import UsageError

log = logging.getLogger("ropewalk")

# Each is a module here.
FRONT_ENDS = ("transformers", "peft", "webui", "fastchat", "auto_gptq", "gptqmodel", "gptq_for_llama", "vllm")


def patch(*front_ends: str) -> None:
    """Have a front end in this process load and run GPTQ checkpoints with ropewalk.

    After `patch()`, which means transformers, `AutoModelForCausalLM.from_pretrained(folder)` needs neither optimum nor
    gptqmodel for a GPTQ folder, and gives models of 2023 the rotary embedding they mean. Calling it again changes
    nothing; `unpatch` undoes it.

    Args:
        front_ends: names of `FRONT_ENDS`.

    Raises:
        UsageError: an unknown name.
        PatchError: a version that is not as it is known here; nothing of that front end is changed then.
    """
    for module in _modules(front_ends):
        log.info(module.apply())


def unpatch(*front_ends: str) -> None:
    """Undo `patch`: of the front ends named, or of all that are patched. Models that are loaded stay as they are."""
    patched = [status["front_end"] for status in statuses() if status["applied"]]
    for module in _modules(front_ends or tuple(dict.fromkeys([*patched, "transformers"]))):
        log.info(module.revert())


def statuses() -> list[dict[str, Any]]:
    """Return {"front_end", "package", "version", "tested", "applied"} of each front end: its name here, the package
    that it comes in and the version that is installed (or None), the versions it was tested with, and whether it is
    patched in this process.
    """
    return [{"front_end": name, **_module(name).status()} for name in FRONT_ENDS]


def _modules(names: tuple[str, ...]) -> list[Any]:
    unknown = sorted(set(names) - set(FRONT_ENDS))
    if unknown:
        raise UsageError(f"patch: expected one of {', '.join(FRONT_ENDS)}, found {unknown[0]!r}")
    return [_module(name) for name in names or ("transformers",)]


def _module(name: str) -> Any:
    return importlib.import_module(f"ropewalk.patches.{name}")
