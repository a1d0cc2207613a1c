"""torch's own: the dense linear layer (cuBLAS on a GPU) and the int4 matmul that gpt-fast uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from ropewalk.bench.peers.base import Peer
from ropewalk.bench.peers.weight import Weight


class TorchLinear(Peer):
    """torch.nn.functional.linear with the weight unpacked to a dtype."""

    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True
    dense = True

    def __init__(self, name: str, dtype: torch.dtype, by_default: tuple[str, ...] = ("cpu", "cuda")):
        self.name = name
        self.dtypes = (dtype,)
        self.by_default = by_default

    def dtype(self, asked: torch.dtype) -> torch.dtype:
        """Return its own: each dtype is a peer of its own."""
        return self.dtypes[0]

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Unpack the weight to [N, K]."""
        w = weight.dense().to(dtype).t().contiguous()
        return lambda x: linear(x, w)


class TorchInt4(Peer):
    """`_weight_int4pack_mm`: 4 bits, bfloat16; W = (code - 8) * scale + zero."""

    name = "torch-int4"
    devices = ("cpu", "cuda")
    group_sizes = (32, 64, 128, 256)
    dtypes = (torch.bfloat16,)

    def refuses(self, weight: Weight) -> str | None:
        """Besides the usual, say which shapes do not fill its tiles."""
        if weight.in_features % 128 or weight.out_features % 64:
            return "needs K in steps of 128 and N in steps of 64"
        return super().refuses(weight)

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Repack by torch's own functions."""
        codes = weight.codes().t().contiguous()
        scales = weight.scales.float()
        zeros = (8 - weight.zeros().float()) * scales
        both = torch.stack([scales, zeros], -1).to(dtype).contiguous()
        group_size = weight.group_size
        if weight.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, both)
        # The even column goes into the high half of a byte. 8 tiles along K is what gpt-fast takes.
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group_size, both)
