"""Humming: CUDA C++ compiled at run time (humming-kernels 0.1.19)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ropewalk.bench.peers.base import Peer, imported
from ropewalk.bench.peers.weight import Weight


class Humming(Peer):
    """`humming.layer.HummingLayer` on the checkpoint's own codes."""

    name = "humming"
    package = "humming"
    bits = (2, 3, 4, 8)

    def refuses(self, weight: Weight) -> str | None:
        """Besides the usual, say which shapes do not fill its tiles."""
        if weight.in_features % 32 or weight.out_features % 64:
            return "needs K in steps of 32 and N in steps of 64"
        return super().refuses(weight)

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Hand over codes, scales and zero points, each with N first, and let it choose its own layout."""
        layer = (
            imported("humming.layer")
            .HummingLayer(
                shape_n=weight.out_features,
                shape_k=weight.in_features,
                weight_config={
                    "dtype": f"uint{weight.bits}",
                    "group_size": 0 if weight.rows_per_group == weight.in_features else weight.group_size,
                    "has_zero_point": not weight.sym,
                },
                torch_dtype=dtype,
            )
            .to(weight.device)
        )
        tensors = {"weight": weight.qweight.t().contiguous(), "weight_scale": weight.scales.t().to(dtype).contiguous()}
        if not weight.sym:
            tensors["zero_point"] = weight.qzeros_v2().t().contiguous()
        layer.load_from_tensors(tensors)
        layer.transform()
        return layer
