"""HalfLinear and HalfEmbedding: layers that keep their weight in the checkpoint's 16 bits where the model is float32.

On the CPU a model computes in float32, and widening what is not packed to that would double it: for the output
embedding what every token has to read (of a model of 1.1 billion parameters 262 MB, half as much again as all of its
packed layers), and for both embeddings the memory that they take. Here the weight stays as it is in the file, and
each number is widened when it is used.

The weights are buffers, so that a model's dtype, which transformers takes from its first parameter, is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ropewalk import cpu
from ropewalk.cpu.dense import dense_linear
from ropewalk.loader.keeps_dtypes import KeepsDtypes

HALVES = (torch.float16, torch.bfloat16)
MOST_ROWS = 8  # above, widening the weight once is less work than reading it once for two rows


class HalfLinear(KeepsDtypes, nn.Linear):
    """torch's Linear with a weight in float16 or bfloat16 that takes activations of other dtypes.

    Args:
        weight: [N, K].
        bias: [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(1, 1, bias=False, device="meta")  # the weight is there already
        self.out_features, self.in_features = weight.shape
        _hold(self, weight)
        if bias is not None:
            del self.bias
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in x's dtype for x [..., K]."""
        weight, bias = self.weight, self.bias
        if (
            x.dtype == torch.float32
            and weight.dtype in HALVES
            and x.is_cpu
            and x.numel() <= MOST_ROWS * self.in_features
            and not (torch.is_grad_enabled() and x.requires_grad)
            and cpu.load()
        ):
            y = dense_linear(x, weight)
            return y if bias is None else y + bias.to(x.dtype)
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class HalfEmbedding(KeepsDtypes, nn.Embedding):
    """torch's Embedding with a weight in float16 or bfloat16 that gives vectors of another dtype.

    Args:
        weight: [words, K].
        padding_idx: as torch's.
        dtype: of the vectors; it follows the model's, while that of the weight does not.
    """

    def __init__(self, weight: Tensor, padding_idx: int | None, dtype: torch.dtype):
        super().__init__(1, 1, device="meta")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.dtype = dtype
        _hold(self, weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., K] for whole numbers [...]."""
        return embedding(ids, self.weight, self.padding_idx).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)


def _hold(module: nn.Module, weight: Tensor) -> None:
    del module.weight
    module.register_buffer("weight", weight)
