"""Random packed weights of any size, made at once: no benchmark needs a quantizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ropewalk import cpu
from ropewalk.gptq import cpu_layout, cpu_ops  # noqa: F401  the second defines operators
from ropewalk.gptq.format import (
    dequantize,
    expected_tensors,
    pack,
    sequential_g_idx,
    symmetric_zeros,
    unpack,
    zeros_v1_to_v2,
    zeros_v2_to_v1,
)
from ropewalk.gptq.layout import row_order


@dataclass(frozen=True)
class Weight:
    """A packed weight W [K, N] as a v1 checkpoint holds it (see `ropewalk.gptq.format`).

    Attributes:
        desc_act: whether act-order was asked for; with one group it has no effect.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    @property
    def in_features(self) -> int:
        """K."""
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]

    @property
    def rows_per_group(self) -> int:
        """The group size, or K for -1."""
        return self.in_features if self.group_size == -1 else self.group_size

    @property
    def act_order(self) -> bool:
        """Whether rows of a group lie apart."""
        return self.desc_act and self.rows_per_group < self.in_features

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.qweight.device

    @property
    def nbytes(self) -> int:
        """The fewest bytes a kernel must read of it: codes, scales, zero points unless symmetric, and order."""
        total = self.qweight.nbytes + self.scales.nbytes
        return total + (0 if self.sym else self.qzeros.nbytes) + (self.g_idx.nbytes if self.act_order else 0)

    def clone(self) -> Weight:
        """Return a copy in buffers of its own."""
        tensors = {name: getattr(self, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
        return replace(self, **tensors)

    def to(self, device: torch.device) -> Weight:
        """Return it on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("qweight", "qzeros", "scales", "g_idx")}
        return replace(self, **tensors)

    def codes(self) -> Tensor:
        """Return the codes, uint8 [K, N]."""
        return unpack(self.qweight, self.bits)

    def qzeros_v2(self) -> Tensor:
        """Return the packed zero points without v1's "less one", int32 [G, N * bits / 32]."""
        return zeros_v1_to_v2(self.qzeros, self.bits)

    def zeros(self) -> Tensor:
        """Return the zero points, uint8 [G, N]."""
        return unpack(self.qzeros_v2(), self.bits, dim=1)

    def dense(self) -> Tensor:
        """Return W in float32 [K, N]."""
        if self.device.type == "cpu" and cpu.load(notice=False):
            # The same bits (tests/test_cpu_kernels.py), in a tenth of the time.
            return self._dense_in_cpp()
        zeros = None if self.sym else self.qzeros_v2()
        g_idx = self.g_idx if self.act_order else None
        return dequantize(self.qweight, self.scales, zeros, g_idx, bits=self.bits, group_size=self.group_size)

    def _dense_in_cpp(self) -> Tensor:
        order = row_order(self.g_idx, self.group_size) if self.act_order else None
        rows = cpu_layout.row_map(order, self.in_features, self.group_size)
        blocks = cpu_layout.block_count(self.in_features, self.group_size)
        words = torch.ops.ropewalk.cpu_repack(self.qweight, rows, self.bits, blocks)
        scales = cpu_layout.scales_for_tiles(self.scales)
        zeros = None if self.sym else cpu_layout.tile_columns(self.zeros())
        return torch.ops.ropewalk.cpu_dequantize(
            words, scales, zeros, rows, self.bits, self.group_size, self.in_features, self.out_features
        )


def random_weight(
    in_features: int,
    out_features: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    desc_act: bool = False,
    sym: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Weight:
    """Return a weight of random codes, whose outputs for normal inputs are of the order of 1 to 10.

    Raises:
        FormatError: a size or setting that the format cannot hold.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shapes = {name: shape for name, (shape, _) in expected_tensors(in_features, out_features, bits, group_size).items()}
    words = torch.randint(-(1 << 31), 1 << 31, shapes["qweight"], dtype=torch.int64, device=device, generator=generator)
    scales = torch.rand(shapes["scales"], device=device, generator=generator) + 0.5
    scales = scales * (4 * math.sqrt(12 / in_features) / (1 << bits))
    groups = shapes["scales"][0]
    if sym:
        qzeros = symmetric_zeros(groups, out_features, bits).to(device)
    else:
        # From 1 on: a zero point of 0 is stored as -1, which programs disagree about.
        zeros = torch.randint(1, 1 << bits, shapes["scales"], device=device, generator=generator)
        qzeros = zeros_v2_to_v1(pack(zeros, bits, dim=1), bits)
    g_idx = sequential_g_idx(in_features, group_size).to(device)
    if desc_act:
        g_idx = g_idx[torch.randperm(in_features, device=device, generator=generator)].contiguous()
    return Weight(bits, group_size, desc_act, sym, words.to(torch.int32), qzeros, scales.to(torch.float16), g_idx)
