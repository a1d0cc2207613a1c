"""The operators `ropewalk::rms_norm` and `ropewalk::add_rms_norm`.

On a GPU both are one launch of the kernel in triton_norm.py, on the CPU one pass in C++ where that has been
compiled, elsewhere plain torch (reference.py, where the formula is). What they have in common:

    x, y: [..., K], float16, bfloat16 or float32, of one dtype and shape, any strides.
    weight: [K], x's dtype, contiguous.
    eps: added to the mean of the squares.
    order: int32 [K] or None: channel j of the result is channel order[j] of the norm. Packed layers whose rows were
        sorted by that order (gptq/layout.py) then read their activations as they lie.

Results are contiguous and share no memory with the arguments. The operators are for inference: with an argument that
needs a gradient they raise UsageError, as for arguments that do not belong together. The functions of the same
names compute in plain torch then, which differentiates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.cpu.operators import unless_in_cpp
from ropewalk.errors import UsageError
from ropewalk.norm import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

torch.library.define("ropewalk::rms_norm", "(Tensor x, Tensor weight, float eps, Tensor? order) -> Tensor")
torch.library.define(
    "ropewalk::add_rms_norm",
    "(Tensor x, Tensor y, Tensor weight, float eps, Tensor? order) -> (Tensor sum, Tensor normed)",
)
# Looking an operator up costs as much as calling it.
_rms_norm = torch.ops.ropewalk.rms_norm.default
_add_rms_norm = torch.ops.ropewalk.add_rms_norm.default


def rms_norm(x: Tensor, weight: Tensor, eps: float, order: Tensor | None = None) -> Tensor:
    """Return weight * x / sqrt(mean(x ** 2) + eps), [..., K] in x's dtype, its channels in `order`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return reference.rms_norm(x, weight, eps, order)
    return _rms_norm(x, weight, eps, order)


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return x + y, rounded to their dtype, and `rms_norm` of that."""
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or weight.requires_grad):
        return reference.add_rms_norm(x, y, weight, eps, order)
    return _add_rms_norm(x, y, weight, eps, order)


@torch.library.impl("ropewalk::rms_norm", "CompositeExplicitAutograd")
@unless_in_cpp("rms_norm", "ropewalk::rms_norm_in_torch")
def _in_torch(x: Tensor, weight: Tensor, eps: float, order: Tensor | None) -> Tensor:
    check(x, None, weight, order)
    return reference.rms_norm(x, weight, eps, order).contiguous()


@torch.library.impl("ropewalk::add_rms_norm", "CompositeExplicitAutograd")
@unless_in_cpp("add_rms_norm", "ropewalk::add_rms_norm_in_torch")
def _add_in_torch(x: Tensor, y: Tensor, weight: Tensor, eps: float, order: Tensor | None) -> tuple[Tensor, Tensor]:
    check(x, y, weight, order)
    total, normed = reference.add_rms_norm(x, y, weight, eps, order)
    return total.contiguous(), normed.contiguous()


@torch.library.impl("ropewalk::rms_norm", "CUDA")
def _on_gpu(x: Tensor, weight: Tensor, eps: float, order: Tensor | None) -> Tensor:
    from ropewalk.norm.triton_norm import launch

    check(x, None, weight, order)
    normed = x.new_empty(x.shape)
    launch(x, None, weight, eps, order, None, normed)
    return normed


@torch.library.impl("ropewalk::add_rms_norm", "CUDA")
def _add_on_gpu(x: Tensor, y: Tensor, weight: Tensor, eps: float, order: Tensor | None) -> tuple[Tensor, Tensor]:
    from ropewalk.norm.triton_norm import launch

    check(x, y, weight, order)
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    launch(x, y, weight, eps, order, total, normed)
    return total, normed


@torch.library.register_fake("ropewalk::rms_norm")
def _fake(x: Tensor, weight: Tensor, eps: float, order: Tensor | None) -> Tensor:
    check(x, None, weight, order)
    return x.new_empty(x.shape)


@torch.library.register_fake("ropewalk::add_rms_norm")
def _add_fake(x: Tensor, y: Tensor, weight: Tensor, eps: float, order: Tensor | None) -> tuple[Tensor, Tensor]:
    check(x, y, weight, order)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def check(x: Tensor, y: Tensor | None, weight: Tensor, order: Tensor | None) -> None:
    """Refuse what the operators cannot take; nothing is read from the device.

    Raises:
        UsageError: naming the argument, what was expected and what was found.
    """
    if x.dtype not in DTYPES:
        raise UsageError(f"x: expected float16, bfloat16 or float32, found {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UsageError(f"x: expected [..., K] with a K of at least 1, found {list(x.shape)}")
    wanted = {"weight": (weight, x.dtype, x.shape[-1:])}
    if y is not None:
        wanted["y"] = (y, x.dtype, x.shape)
    if order is not None:
        wanted["order"] = (order, torch.int32, x.shape[-1:])
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise UsageError(f"{name}: expected {dtype} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != x.device:
            raise UsageError(f"{name}: expected on {x.device} as x, found on {tensor.device}")
        if tensor is not y and not tensor.is_contiguous():
            raise UsageError(f"{name}: expected one value after another in memory, found stride {tensor.stride(0)}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, weight) if t is not None):
        raise UsageError("x, y and weight: expected none that needs a gradient, found one; see ropewalk.norm.ops")
