"""The operators of packed linear layers on the CPU: `ropewalk::cpu_linear`, `cpu_gate_up` and `cpu_experts`.

They compute in C++ (kernels/cpu) over the layout of cpu_layout.py, once `ropewalk.cpu.load()` has returned True. They
have two modes. Activations become integers in blocks of 32 that share a scale, which processors multiply with packed
codes several times as fast as they do in float32:

    "int8"   8 bits, as llama.cpp has them. An error of up to 1/254 of the largest value of the block.
    "exact"  24 bits for float32, 16 for float16 and bfloat16: what rounding in float32 would leave anyway.

Sums within a block are exact. Between blocks they are float32, in the order of the rows, so that a row of x gives the
same bits on every processor, with any number of threads and whatever other rows come with it. A row that holds an
infinity or what is not a number gives results that are not numbers.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ropewalk.errors import UsageError

MODES = ("exact", "int8")
DEFAULT_MODE = "int8"
_VARIABLE = "ROPEWALK_CPU_MODE"

_WEIGHT = "Tensor words, Tensor scales, Tensor? zeros, Tensor? rows, Tensor? bias"
for _name in ("cpu_linear", "cpu_gate_up"):
    torch.library.define(
        f"ropewalk::{_name}",
        f"(Tensor x, {_WEIGHT}, int bits, int group_size, int out_features, bool exact) -> Tensor",
    )
torch.library.define(
    "ropewalk::cpu_experts",
    f"(Tensor x, {_WEIGHT}, Tensor expert_ids, Tensor? routing_weights, int bits, int group_size, "
    "int out_features, bool exact, bool gate_up=False) -> Tensor",
)
torch.library.define("ropewalk::cpu_repack", "(Tensor qweight, Tensor? rows, int bits, int blocks) -> Tensor")
torch.library.define("ropewalk::cpu_repack_into", "(Tensor(a!) words, Tensor qweight, Tensor? rows, int bits) -> ()")
torch.library.define(
    "ropewalk::cpu_unpack", "(Tensor words, Tensor? rows, int bits, int in_features, int out_features) -> Tensor"
)
torch.library.define(
    "ropewalk::cpu_dequantize",
    "(Tensor words, Tensor scales, Tensor? zeros, Tensor? rows, int bits, int group_size, int in_features, "
    "int out_features) -> Tensor",
)


# Looking an operator up costs as much as calling it.
_linear = torch.ops.ropewalk.cpu_linear.default
_gate_up = torch.ops.ropewalk.cpu_gate_up.default


def default_mode() -> str:
    """Return the mode of layers that name none: $ROPEWALK_CPU_MODE, or "int8".

    Raises:
        UsageError: another value of the variable.
    """
    return check_mode(os.environ.get(_VARIABLE) or DEFAULT_MODE, _VARIABLE)


def check_mode(mode: str, name: str) -> str:
    """Return a mode, or raise UsageError for what is none."""
    if mode not in MODES:
        raise UsageError(f"{name}: expected {' or '.join(MODES)}, found {mode!r}")
    return mode


def linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    exact: bool,
) -> Tensor:
    """Return x @ W + bias for a weight in the layout of cpu_layout.py.

    Where a gradient with respect to x is wanted the product is exact, whatever the mode.

    Args:
        x: [..., K], float16, bfloat16 or float32.
        words: int32 [tiles, blocks, 32 * bits].
        scales: [tiles, G, 32], float16 or float32.
        zeros: uint8 [tiles, G, 32]; None where all are 2 ** (bits - 1).
        rows: int32 [blocks * 32] as `cpu_layout.row_map` returns them, or None.
        bias: [N], any floating dtype, or None; no gradient is computed for it.
        bits: 2, 3, 4 or 8.
        group_size: rows to a group, -1 for one group.
        out_features: N.
        exact: which mode.

    Returns:
        [..., N] in x's dtype.

    Raises:
        RuntimeError: arguments that do not belong together.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return linear_with_grad(x, words, scales, zeros, rows, bias, bits, group_size, out_features)
    # This operator has no autograd kernel: one written in Python would cost a call more than a small layer does.
    return _linear(x, words, scales, zeros, rows, bias, bits, group_size, out_features, exact)


@torch.library.register_fake("ropewalk::cpu_linear")
def _(x, words, scales, zeros, rows, bias, bits, group_size, out_features, exact):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def gate_up(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    exact: bool,
) -> Tensor:
    """Return silu(x @ gate) * (x @ up), [..., N / 2], for a weight that has the columns of gate and then those of up.

    It has no gradient. The arguments are those of `linear`, N a multiple of 64; silu is within 3e-7 of itself, and the
    result is rounded once.
    """
    return _gate_up(x, words, scales, zeros, rows, bias, bits, group_size, out_features, exact)


@torch.library.register_fake("ropewalk::cpu_gate_up")
def _(x, words, scales, zeros, rows, bias, bits, group_size, out_features, exact):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features // 2))


@torch.library.custom_op("ropewalk::cpu_linear_with_grad", mutates_args=(), device_types="cpu")
def linear_with_grad(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """Compute `linear` exactly, and differentiably with respect to x."""
    return _linear(x, words, scales, zeros, rows, bias, bits, group_size, out_features, True)


@linear_with_grad.register_fake
def _(x, words, scales, zeros, rows, bias, bits, group_size, out_features):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("ropewalk::cpu_linear_grad", mutates_args=(), device_types="cpu")
def linear_grad(
    grad: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return the gradient of `linear` with respect to x: grad [..., N] @ W transposed, [..., K]."""
    weight = torch.ops.ropewalk.cpu_dequantize(
        words, scales, zeros, rows, bits, group_size, in_features, grad.shape[-1]
    )
    return grad @ weight.to(grad.dtype).t()


@linear_grad.register_fake
def _(grad, words, scales, zeros, rows, bits, group_size, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, words, scales, zeros, rows, _, ctx.bits, ctx.group_size, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(words, scales, zeros, rows)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = linear_grad(grad, *ctx.saved_tensors, ctx.bits, ctx.group_size, ctx.in_features)
    return grad_x, None, None, None, None, None, None, None, None


linear_with_grad.register_autograd(_backward, setup_context=_setup_context)


@torch.library.register_fake("ropewalk::cpu_experts")
def _(  # type: ignore[no-untyped-def]
    x,
    words,
    scales,
    zeros,
    rows,
    bias,
    expert_ids,
    routing_weights,
    bits,
    group_size,
    out_features,
    exact,
    gate_up=False,
):
    columns = out_features // 2 if gate_up else out_features
    return x.new_empty((*(expert_ids.shape if routing_weights is None else expert_ids.shape[:1]), columns))
