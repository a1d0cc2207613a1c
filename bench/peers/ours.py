"""Ours: the layer as a user has it, in each of its modes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.peers.base import Peer, imported
from ropewalk.bench.peers.weight import Weight
from ropewalk.errors import MissingPackageError
from ropewalk.gptq.cpu_ops import MODES, default_mode
from ropewalk.loader.quant_linear import QuantLinear

OURS = "ropewalk"


class Ropewalk(Peer):
    """`ropewalk.QuantLinear`, loaded from a checkpoint's tensors.

    Args:
        mode: of our kernels for the CPU, None for their default.
    """

    bits = (2, 3, 4, 8)
    act_order = True
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def __init__(self, name: str = OURS, mode: str | None = None, devices: tuple[str, ...] = ("cpu", "cuda")):
        self.name = name
        self.mode = mode
        self.devices = devices

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Load and let the layer derive what its kernels need."""
        layer = packed_layer(weight)
        set_mode(layer, self.mode)
        return layer


def packed_layer(weight: Weight) -> QuantLinear:
    """Return the layer of a weight, loaded and ready."""
    layer = QuantLinear(
        weight.bits, weight.group_size, weight.in_features, weight.out_features, False, device=weight.device
    )
    layer.load_state_dict({name: getattr(weight, name) for name in ("qweight", "qzeros", "scales", "g_idx")})
    layer.post_init()
    return layer


def modes(first: str | None = None) -> list[tuple[str, str | None]]:
    """Return (name, mode) of ours on this CPU: the default mode, or `first`, as "ropewalk", then the other one.

    Where they cannot be had there is one computation, in plain torch.

    Raises:
        MissingPackageError: `first` is given and there are none.
    """
    if not imported("ropewalk.cpu").load():
        if first is not None:
            raise MissingPackageError("--mode: expected kernels for the CPU, found none (see `ropewalk doctor`)")
        return [(OURS, None)]
    first = first or default_mode()
    return [(OURS, first), *((f"{OURS}-{mode}", mode) for mode in MODES if mode != first)]


def set_mode(module: Any, mode: str | None) -> None:
    """Give a module's packed layers a mode of our kernels for the CPU; None leaves them at their default."""
    for layer in module.modules():
        if isinstance(layer, QuantLinear) and mode is not None:
            layer.cpu_mode = mode
