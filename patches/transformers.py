"""transformers: `from_pretrained` on a GPTQ folder computes with our layers, our rope types have names, and
the rotary embedding of every half-rotated family is one kernel on a GPU.

What is changed, all of it undone by `revert`: the entry "gptq" of transformers' table of quantizers, which
otherwise asks for optimum and gptqmodel; `apply_rotary_pos_emb` of the modeling modules that are imported (see
`ropewalk.loader.apply_rotary`); and `PreTrainedModel.__init__`, so as to do that for the ones to come.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ropewalk.errors import UsageError

_original: Any = None
_original_init: Any = None


def apply() -> str:
    """Patch transformers; return one line that says what was done. Doing it twice changes nothing."""
    global _original
    from transformers.quantizers import auto

    from ropewalk.loader import apply_rotary, quantizer

    quantizer.register()
    apply_rotary.replace_imported()
    _watch_models()
    if auto.AUTO_QUANTIZER_MAPPING["gptq"] is not quantizer.RopewalkQuantizer:
        _original = auto.AUTO_QUANTIZER_MAPPING["gptq"]
        auto.AUTO_QUANTIZER_MAPPING["gptq"] = quantizer.RopewalkQuantizer
    return (
        "transformers: GPTQ checkpoints load with ropewalk; rope types partial-ntk, ntk-by-parts and ntk registered; "
        "half-rotated families rotate q and k in one kernel on a GPU"
    )


def _watch_models() -> None:
    """Have `apply_rotary_pos_emb` of a family replaced when the first of its models is built, however it is."""
    global _original_init
    from transformers import PreTrainedModel

    from ropewalk.loader import apply_rotary

    if _original_init is not None:
        return
    original = PreTrainedModel.__init__
    found = list(inspect.signature(original).parameters)
    if found[:2] != ["self", "config"]:
        raise UsageError(f"transformers: expected PreTrainedModel(config, ...), found ({', '.join(found[1:])})")

    @functools.wraps(original)
    def init(self: Any, config: Any, *inputs: Any, **kwargs: Any) -> None:
        apply_rotary.replace(type(self).__module__)
        original(self, config, *inputs, **kwargs)

    PreTrainedModel.__init__ = init
    _original_init = original


def revert() -> str:
    """Give transformers its own quantizer and functions back; models that are loaded keep their layers."""
    global _original, _original_init
    from ropewalk.loader import apply_rotary

    apply_rotary.restore()
    if _original_init is not None:
        from transformers import PreTrainedModel

        PreTrainedModel.__init__ = _original_init
        _original_init = None
    if _original is not None:
        from transformers.quantizers import auto

        auto.AUTO_QUANTIZER_MAPPING["gptq"] = _original
        _original = None
    return "transformers: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "applied"}; it imports nothing that is not imported already."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed: str | None = version("transformers")
    except PackageNotFoundError:
        installed = None
    return {"package": "transformers", "version": installed, "applied": _original is not None}
