"""The operator `ropewalk::cpu_dense_linear`: a few rows of float32 times a matrix that stays in 16 bits.

It is there once `ropewalk.cpu.load()` has returned True, and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("ropewalk::cpu_dense_linear", "(Tensor x, Tensor weight) -> Tensor")
_dense_linear = torch.ops.ropewalk.cpu_dense_linear.default


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight transposed; every product and sum is float32, in an order that depends on K alone.

    Args:
        x: float32 [..., K].
        weight: [N, K], float16 or bfloat16, contiguous.

    Returns:
        float32 [..., N].

    Raises:
        RuntimeError: arguments of other dtypes or shapes.
    """
    return _dense_linear(x, weight)


@torch.library.register_fake("ropewalk::cpu_dense_linear")
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
