"""Kernels of other projects, run only where they are installed, and ours in the same shape.

Each peer is a small class: whether it is here, what it can hold, and how a weight becomes a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from ropewalk.bench.peers.base import Peer, Program
from ropewalk.bench.peers.exllamav2 import ExLlamaV2
from ropewalk.bench.peers.gptqmodel import GPTQModel
from ropewalk.bench.peers.humming import Humming
from ropewalk.bench.peers.llamacpp import LlamaCpp
from ropewalk.bench.peers.ours import OURS, Ropewalk, modes
from ropewalk.bench.peers.rotary import FlashAttn, FlatRotary, Liger, RopewalkInPlace, RotaryPeer, Transformers
from ropewalk.bench.peers.rotary import Ropewalk as RopewalkRotary
from ropewalk.bench.peers.torch_linear import TorchInt4, TorchLinear
from ropewalk.bench.peers.triton_peers import Conch, GemLite
from ropewalk.errors import UsageError

AnyPeer = TypeVar("AnyPeer", bound="Program | RotaryPeer")


def matmul_peers(device: torch.device | None = None, mode: str | None = None) -> list[Peer]:
    """Return all that multiply, ours first: on a CPU in each of its modes.

    Args:
        mode: of our kernels for the CPU, as `ours.modes` takes it.
    """
    ours = [Ropewalk()]
    if device is not None and device.type == "cpu":
        ours = [Ropewalk(name, one, ("cpu",)) for name, one in modes(mode)]
    return [
        *ours,
        # In float32 a GPU takes as long for one product as for all the others.
        TorchLinear("torch-fp32", torch.float32, by_default=("cpu",)),
        TorchLinear("torch-bf16", torch.bfloat16),
        TorchLinear("torch-fp16", torch.float16),
        TorchInt4(),
        LlamaCpp(),
        GPTQModel(),
        GPTQModel("marlin", "gptq_marlin", devices=("cuda",)),
        Humming(),
        GemLite(),
        Conch(),
        ExLlamaV2(),
    ]


def rotary_peers() -> list[RotaryPeer]:
    """Return all that rotate, ours first."""
    return [
        RopewalkRotary(),
        RopewalkInPlace(),
        Transformers(),
        Transformers("transformers-compiled", compiled=True),
        Liger(),
        FlashAttn(),
        FlatRotary("vllm", "vllm", "vllm._custom_ops", "rotary_embedding"),
        FlatRotary("conch", "conch", "conch.ops.embedding.rotary_embedding", "rotary_embedding"),
    ]


def choose(
    peers: Sequence[AnyPeer], names: Sequence[str] | None, device: torch.device
) -> tuple[list[AnyPeer], dict[str, str]]:
    """Return the peers to time on a device, and why others are not.

    Args:
        names: those wanted besides ours that are timed by default; None for all that are.

    Raises:
        UsageError: a name that no peer has.
    """
    known = [peer.name for peer in peers if peer.name != OURS]
    for name in names or ():
        if name not in known:
            raise UsageError(f"--peers: expected some of {', '.join(known)}, found {name!r}")
    chosen, missing = [], {}
    for peer in peers:
        by_default = device.type in peer.by_default and device.type in peer.devices
        always = by_default and (names is None or peer.name.startswith(OURS))
        if not always and peer.name not in (names or ()):
            continue
        why = peer.available(device)
        if why is None:
            chosen.append(peer)
        else:
            missing[peer.name] = why
    return chosen, missing
