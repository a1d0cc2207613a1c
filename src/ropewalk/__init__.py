"""Ropewalk: long-context rotary embeddings and packed GPTQ weights, fused, in the front ends people use.

Everything below is imported when it is first asked for; `import ropewalk` itself touches no GPU, compiles
nothing and patches nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ropewalk import errors as errors
    from ropewalk.loader.convert import convert as convert
    from ropewalk.loader.export import export as export
    from ropewalk.loader.inspect import inspect as inspect
    from ropewalk.loader.load import load as load
    from ropewalk.loader.quant_linear import QuantLinear as QuantLinear
    from ropewalk.loader.quantize import quantize as quantize
    from ropewalk.loader.rotary import LlamaPartNTKScaledRotaryEmbedding as LlamaPartNTKScaledRotaryEmbedding
    from ropewalk.loader.rotary import RopewalkRotaryEmbedding as RopewalkRotaryEmbedding
    from ropewalk.patches import patch as patch
    from ropewalk.patches import unpatch as unpatch

# name -> module that has it ("" where the name is the module)
_FACE = {
    "load": "ropewalk.loader.load",
    "inspect": "ropewalk.loader.inspect",
    "quantize": "ropewalk.loader.quantize",
    "convert": "ropewalk.loader.convert",
    "export": "ropewalk.loader.export",
    "patch": "ropewalk.patches",
    "unpatch": "ropewalk.patches",
    "QuantLinear": "ropewalk.loader.quant_linear",
    "RopewalkRotaryEmbedding": "ropewalk.loader.rotary",
    "LlamaPartNTKScaledRotaryEmbedding": "ropewalk.loader.rotary",
    "errors": "",
}

__all__ = [*_FACE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'ropewalk' has no attribute {name!r}")
    if not _FACE[name]:
        return importlib.import_module(f"ropewalk.{name}")
    value = getattr(importlib.import_module(_FACE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
