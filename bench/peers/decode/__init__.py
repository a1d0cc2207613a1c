"""Programs that decode with whole models: ours, and others where they are installed."""

from __future__ import annotations

from typing import Any

import torch

from ropewalk.bench.peers.decode.base import DecodePeer
from ropewalk.bench.peers.decode.llamacpp import LlamaCpp
from ropewalk.bench.peers.decode.models import Dense, GPTQModel, Ropewalk
from ropewalk.bench.peers.ours import OURS, modes

# Rows of ours besides the default: what follows its name, and what `ropewalk.load` is given for it. They take part
# where --peers names them.
_UP_TO = {"qkv": "qkv", "gate-up": "qkv,gate-up", "norm": "qkv,gate-up,norm,act-order"}
VARIANTS: dict[str, dict[str, Any]] = {
    "unfused": {"fuse": "none"},
    # One fusion after the other; the last of them, attention, makes it the default.
    **{f"fused-up-to-{name}": {"fuse": fusions} for name, fusions in _UP_TO.items()},
}


def decode_peers(dtype: torch.dtype, device: torch.device, mode: str | None = None) -> list[DecodePeer]:
    """Return all that decode, ours first.

    Args:
        dtype: that ours is asked for; on a CPU it is timed in bfloat16 besides.
        mode: of our kernels for the CPU, as `ours.modes` takes it.
    """
    ours: list[DecodePeer] = [Ropewalk()]
    first = None
    if device.type == "cpu":
        named = modes(mode)
        first = named[0][1]
        ours = [Ropewalk(name, one, devices=("cpu",)) for name, one in named]
        if dtype != torch.bfloat16:
            ours.append(Ropewalk(f"{OURS}-bf16", first, torch.bfloat16, ("cpu",)))
    # On a CPU compiling takes minutes and gains little.
    ours.append(Ropewalk(f"{OURS}-compiled", first, by_default=("cuda",), compiled=True))
    for name, options in VARIANTS.items():
        ours.append(Ropewalk(f"{OURS}-{name}", first, by_default=(), **options))
    return [
        *ours,
        Dense("torch-fp32", torch.float32, by_default=("cpu",)),
        Dense("torch-bf16", torch.bfloat16),
        Dense("torch-fp16", torch.float16, by_default=("cuda",)),
        Dense("torch-bf16-compiled", torch.bfloat16, by_default=(), compiled=True),
        Dense("torch-fp16-compiled", torch.float16, by_default=("cuda",), compiled=True),
        LlamaCpp(),
        LlamaCpp("llama.cpp-q8", "Q8_0"),
        GPTQModel(),
    ]
