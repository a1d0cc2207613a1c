"""PEFT: `PeftModel.from_pretrained`, `get_peft_model` and transformers' `load_adapter` put LoRA on packed layers.

What is changed and given back, and what happens where PEFT is not imported yet, is told in
`ropewalk.loader.peft_hook`. Loading a packed model does this, too.
"""

from __future__ import annotations

from typing import Any

from ropewalk.errors import PatchError
from ropewalk.patches.replace import installed


def apply() -> str:
    """Have PEFT know packed layers, now if it is imported, else when it is; return one line that says so. Doing it
    twice changes nothing.

    Raises:
        PatchError: a PEFT that is imported and whose methods are not as they are known here; nothing is changed then.
    """
    from ropewalk.loader import peft_hook

    if not peft_hook.enable():
        expected = ", ".join(f"{name}({', '.join(names)})" for name, names in peft_hook.SIGNATURES.items())
        raise PatchError(f"peft {installed('peft')}", f"a LoraModel with {expected}", "another")
    return "peft: LoRA goes on packed layers, and is not merged into them"


def revert() -> str:
    """Give PEFT its own methods back; models that have adapters keep them."""
    from ropewalk.loader import peft_hook

    peft_hook.disable()
    return "peft: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}; applied also where it waits for PEFT to be imported."""
    import sys

    hook = sys.modules.get("ropewalk.loader.peft_hook")
    return {
        "package": "peft",
        "version": installed("peft"),
        "tested": "0.18 to 0.21",
        "applied": hook is not None and (hook.is_enabled() or hook.is_waiting()),
    }
