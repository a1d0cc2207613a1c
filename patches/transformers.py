"""transformers: `from_pretrained` on a GPTQ folder computes with our layers, and our rope types have names.

What is changed, all of it undone by `revert`: the entry "gptq" of transformers' table of quantizers, which
otherwise asks for optimum and gptqmodel.
"""

from __future__ import annotations

from typing import Any

_original: Any = None


def apply() -> str:
    """Patch transformers; return one line that says what was done. Doing it twice changes nothing."""
    global _original
    from transformers.quantizers import auto

    from ropewalk.loader import quantizer

    quantizer.register()
    if auto.AUTO_QUANTIZER_MAPPING["gptq"] is not quantizer.RopewalkQuantizer:
        _original = auto.AUTO_QUANTIZER_MAPPING["gptq"]
        auto.AUTO_QUANTIZER_MAPPING["gptq"] = quantizer.RopewalkQuantizer
    return "transformers: GPTQ checkpoints load with ropewalk; rope types partial-ntk, ntk-by-parts and ntk registered"


def revert() -> str:
    """Give transformers its own quantizer back; models that are loaded stay as they are."""
    global _original
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
