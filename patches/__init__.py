"""One module for each front end, with `apply()`, `revert()` and `status()`."""

from __future__ import annotations

import logging

log = logging.getLogger("ropewalk")


def patch() -> None:
    """Let transformers' own `from_pretrained` load GPTQ checkpoints with our layers, in this process.

    After it, `AutoModelForCausalLM.from_pretrained(folder)` needs neither optimum nor gptqmodel for a folder
    whose config.json has a quantization_config, and gives models of 2023 the rotary embedding they mean.
    Calling it again changes nothing; `unpatch` undoes it.
    """
    from ropewalk.patches import transformers

    log.info(transformers.apply())


def unpatch() -> None:
    """Undo `patch`. Models that are loaded already stay as they are."""
    from ropewalk.patches import transformers

    log.info(transformers.revert())
