"""Ours: the layer as a user has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ropewalk.bench.peers.base import Peer
from ropewalk.bench.peers.weight import Weight
from ropewalk.loader.quant_linear import QuantLinear

OURS = "ropewalk"


class Ropewalk(Peer):
    """`ropewalk.QuantLinear`, loaded from a checkpoint's tensors."""

    name = OURS
    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Load and let the layer derive what its kernels need."""
        layer = QuantLinear(
            weight.bits, weight.group_size, weight.in_features, weight.out_features, False, device=weight.device
        )
        layer.load_state_dict({name: getattr(weight, name) for name in ("qweight", "qzeros", "scales", "g_idx")})
        layer.post_init()
        return layer
