"""HalfLinear: a linear layer that keeps its weight in the checkpoint's 16 bits where activations are float32.

On the CPU a model computes in float32, and transformers widens what is not packed to that. For the output embedding
this doubles what every token has to read: of a model of 1.1 billion parameters 262 MB, half as much again as all of
its packed layers. Here the weight stays as it is in the file, and each number is widened when it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ropewalk import cpu
from ropewalk.cpu.dense import dense_linear
from ropewalk.loader.checkpoint import Checkpoint

HALVES = (torch.float16, torch.bfloat16)
MOST_ROWS = 8  # above, widening the weight once is less work than reading it once for two rows


class HalfLinear(nn.Linear):
    """torch's Linear with a weight in float16 or bfloat16 that takes activations of other dtypes.

    Args:
        weight: [N, K].
        bias: [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(1, 1, bias=False, device="meta")  # the weight is there already
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in x's dtype for x [..., K]."""
        weight, bias = self.weight, self.bias
        if (
            x.dtype == torch.float32
            and weight.dtype in HALVES
            and x.is_cpu
            and x.numel() <= MOST_ROWS * self.in_features
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and cpu.load()
        ):
            y = dense_linear(x, weight)
            return y if bias is None else y + bias.to(x.dtype)
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def keep_half(model: Any, checkpoint: Checkpoint) -> bool:
    """Put the output embedding of a model on the CPU back into the dtype that it has in the checkpoint.

    Args:
        model: of transformers, loaded from the checkpoint.

    Returns:
        whether that was done: for a linear layer in float32, not tied to the input embedding, that was read from
        float16 or bfloat16, and with kernels that multiply with it.
    """
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    entry = checkpoint.tensors.get(f"{name}.weight")
    if not name or type(head) is not nn.Linear or entry is None or entry.dtype not in HALVES:
        return False
    weight = head.weight.detach()
    tied = getattr(model.get_input_embeddings(), "weight", None) is head.weight
    if tied or weight.dtype != torch.float32 or weight.device.type != "cpu" or not cpu.load():
        return False
    parent, _, attribute = name.rpartition(".")
    half = HalfLinear(weight.to(entry.dtype), None if head.bias is None else head.bias.detach())
    setattr(model.get_submodule(parent), attribute, half)
    return True
