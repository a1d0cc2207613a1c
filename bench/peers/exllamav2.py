"""ExLlamaV2's GPTQ kernel (0.3.2), through its extension; it builds that with nvcc at the first import."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ropewalk.bench.peers.base import Peer, imported
from ropewalk.bench.peers.weight import Weight


class ExLlamaV2(Peer):
    """`gemm_half_q_half`: 4 bits, float16."""

    name = "exllamav2"
    package = "exllamav2"
    act_order = True
    dtypes = (torch.float16,)

    def __init__(self) -> None:
        # Large products go through an unpacked copy; one serves all layers, as in a model.
        self._unpacked: Tensor | None = None

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Repack in place; the extension keeps pointers, so the tensors live as long as the function."""
        ext = imported("exllamav2.ext")
        size, columns = weight.in_features * weight.out_features, weight.out_features
        if self._unpacked is None or self._unpacked.numel() < size:
            self._unpacked = torch.empty(size, dtype=torch.float16, device=weight.device)
        unpacked = self._unpacked
        tensors = {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales}
        if weight.act_order:
            tensors["g_idx"] = weight.g_idx
        handle = ext.make_q_matrix(tensors, unpacked, max_dq_rows=weight.in_features)

        def run(x: Tensor, alive: object = (tensors, unpacked)) -> Tensor:
            out = torch.empty(x.shape[0], columns, dtype=torch.float16, device=x.device)
            ext.exllamav2_ext.gemm_half_q_half(x, handle, out, False)
            return out

        return run
