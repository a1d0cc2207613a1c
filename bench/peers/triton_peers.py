"""Packed matmuls that others wrote in Triton: GemLite (0.6) and conch (1.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ropewalk.bench.peers.base import Peer, imported
from ropewalk.bench.peers.weight import Weight


class GemLite(Peer):
    """`gemlite.helper.A16Wn`; it tunes itself at the first call of a size."""

    name = "gemlite"
    package = "gemlite"
    bits = (2, 4, 8)

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Hand over codes, scales and zero points, each with N first."""
        maker = imported("gemlite.helper").A16Wn(device=str(weight.device), dtype=dtype)
        return maker.from_weights(
            weight.codes().t().contiguous(),
            weight.scales.t().contiguous(),
            weight.zeros().t().to(dtype).contiguous(),
            W_nbits=weight.bits,
            group_size=weight.rows_per_group,
        )


class Conch(Peer):
    """`conch.ops.quantization.gemm.mixed_precision_gemm`, which reads the checkpoint's own words."""

    name = "conch"
    package = "conch"
    bits = (2, 4, 8)

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Bring scales and zero points into x's dtype."""
        gemm = imported("conch.ops.quantization.gemm").mixed_precision_gemm
        scales = weight.scales.to(dtype)
        zeros = None if weight.sym else weight.zeros().to(dtype)
        bias = 1 << (weight.bits - 1) if weight.sym else 0
        bits, words, group_size = weight.bits, weight.qweight, weight.rows_per_group
        return lambda x: gemm(x, words, scales, zeros, bits, bias, group_size)
