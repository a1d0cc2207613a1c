"""The operators `ropewalk::rope`, `ropewalk::rope_` and `ropewalk::rope_and_cache_`.

Each rotates queries and keys together: on a GPU in one launch of the kernel in triton_rope.py, on the CPU in one
pass of cpu/rope.cpp where that has been compiled, elsewhere in plain torch. What they have in common:

    q: [batch, heads, seq, head_dim], float16, bfloat16 or float32, any strides.
    k: [batch, kv_heads, seq, head_dim], q's dtype, any strides.
    inv_freq: float32 [dim / 2] with dim <= head_dim, radians per position; the channels above pass unchanged.
    position_ids: integers [1 or batch, seq], in any order.
    cos, sin: instead of these two, tables of any floating dtype: [1 or batch, seq, dim / 2], or
        [1 or batch, seq, 2, dim / 2] where the two channels of a pair have entries of their own (those of
        transformers, `cos.unflatten(-1, (2, -1))`).
    attention_scaling: factor for cosine and sine.
    interleaved: which channels make a pair, see reference.py.

Angles are float32 and so is the arithmetic; each result is rounded once. Gradients flow to q and k alone, and
through `rope` alone. Arguments that do not belong together raise RopeError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.cpu.operators import unless_in_cpp
from ropewalk.errors import RopeError
from ropewalk.rope import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op("ropewalk::rope", mutates_args=())
@unless_in_cpp("rope", "ropewalk::rope_in_torch")
def rope(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor | None = None,
    position_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, as new tensors; with `inverse` by the opposite angles, which is the gradient."""
    check(q, k, inv_freq, position_ids, cos, sin)
    cos, sin = _tables(inv_freq, position_ids, cos, sin, attention_scaling)
    return (
        reference.rotate_by_tables(q, cos, sin, interleaved=interleaved, inverse=inverse),
        reference.rotate_by_tables(k, cos, sin, interleaved=interleaved, inverse=inverse),
    )


@rope.register_kernel("cuda")
def rope_on_gpu(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor | None = None,
    position_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `rope` with the Triton kernel."""
    from ropewalk.rope.triton_rope import launch

    check(q, k, inv_freq, position_ids, cos, sin, on_gpu=True)
    out = torch.empty_like(q), torch.empty_like(k)
    launch(q, k, *out, inv_freq, position_ids, cos, sin, attention_scaling, interleaved, inverse)
    return out


@rope.register_fake
def _fake(q: Tensor, k: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, *tensors, ctx.attention_scaling, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
    grads = rope(grad_q, grad_k, *ctx.saved_tensors, ctx.attention_scaling, ctx.interleaved, not ctx.inverse)
    return *grads, *(None,) * 7


rope.register_autograd(_backward, setup_context=_setup_context)

# `rope` without its way through autograd, for callers on the CPU that need no gradient (see rope.cpp). It is
# there once `ropewalk.cpu.load` has returned True.
torch.library.define("ropewalk::rope_cpu", str(torch.ops.ropewalk.rope.default._schema).removeprefix("ropewalk::rope"))
torch.library.register_fake("ropewalk::rope_cpu")(_fake)
rope_on_cpu = torch.ops.ropewalk.rope_cpu.default


@torch.library.custom_op("ropewalk::rope_", mutates_args=("q", "k"))
@unless_in_cpp("rope_", "ropewalk::rope_in_torch_", mutates_args=("q", "k"))
def rope_(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor | None = None,
    position_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Rotate q and k in place."""
    check(q, k, inv_freq, position_ids, cos, sin)
    _check_written(q=q, k=k)
    cos, sin = _tables(inv_freq, position_ids, cos, sin, attention_scaling)
    for x in (q, k):
        reference.rotate_by_tables(x, cos, sin, interleaved=interleaved, out=x)


@rope_.register_kernel("cuda")
def rope_on_gpu_(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor | None = None,
    position_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Compute `rope_` with the Triton kernel."""
    from ropewalk.rope.triton_rope import launch

    check(q, k, inv_freq, position_ids, cos, sin, on_gpu=True)
    _check_written(q=q, k=k)
    launch(q, k, q, k, inv_freq, position_ids, cos, sin, attention_scaling, interleaved)


@rope_.register_fake
def _(q: Tensor, k: Tensor, *_: object, **__: object) -> None:
    _check_written(q=q, k=k)  # a compiled training step would lose the gradient without a word


@torch.library.custom_op("ropewalk::rope_and_cache_", mutates_args=("q", "k", "k_cache", "v_cache"))
@unless_in_cpp("rope_and_cache_", "ropewalk::rope_and_cache_in_torch_", mutates_args=("q", "k", "k_cache", "v_cache"))
def rope_and_cache_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    inv_freq: Tensor | None = None,
    position_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Rotate q and k in place, and write the rotated k, and v, into a KV cache.

    Args:
        v: [batch, kv_heads, seq, any dim], any strides.
        k_cache, v_cache: [batch, kv_heads, length, dim of k or v], any strides and floating dtype; or with a
            batch of one, into which all of the batch then writes (a paged cache, seen as one long row).
        slots: int64 [1 or batch, seq]: where in the length each token goes. No slot twice; a slot outside
            0 .. length - 1 (padding has -1) is not written.
    """
    check(q, k, inv_freq, position_ids, cos, sin)
    _check_cache(k, v, k_cache, v_cache, slots)
    _check_written(q=q, k=k, k_cache=k_cache, v_cache=v_cache)
    cos, sin = _tables(inv_freq, position_ids, cos, sin, attention_scaling)
    for x in (q, k):
        reference.rotate_by_tables(x, cos, sin, interleaved=interleaved, out=x)
    reference.write_cache(k, k_cache, slots)
    reference.write_cache(v, v_cache, slots)


@rope_and_cache_.register_kernel("cuda")
def rope_and_cache_on_gpu_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    inv_freq: Tensor | None = None,
    position_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Compute `rope_and_cache_` with the Triton kernel."""
    from ropewalk.rope.triton_rope import launch

    check(q, k, inv_freq, position_ids, cos, sin, on_gpu=True)
    _check_cache(k, v, k_cache, v_cache, slots)
    _check_written(q=q, k=k, k_cache=k_cache, v_cache=v_cache)
    launch(
        q,
        k,
        q,
        k,
        inv_freq,
        position_ids,
        cos,
        sin,
        attention_scaling,
        interleaved,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        slots=slots,
    )


@rope_and_cache_.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object, **__: object) -> None:
    _check_written(q=q, k=k, k_cache=k_cache, v_cache=v_cache)


def _tables(
    inv_freq: Tensor | None, position_ids: Tensor | None, cos: Tensor | None, sin: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    if inv_freq is not None and position_ids is not None:
        return reference.cos_sin(inv_freq, position_ids, scaling)
    assert cos is not None and sin is not None  # checked
    return cos.float() * scaling, sin.float() * scaling


def check(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor | None,
    position_ids: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    on_gpu: bool = False,
) -> None:
    """Refuse what the operators cannot take, by shapes and dtypes alone: nothing is read from the device.

    Raises:
        RopeError: naming the argument, what was expected and what was found.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise RopeError(f"q and k: expected 4 dimensions each, found {q.ndim} and {k.ndim}")
    batch, _, seq, head_dim = q.shape
    if k.dtype != q.dtype or (on_gpu and q.dtype not in DTYPES):
        raise RopeError(f"q and k: expected one dtype of float16, bfloat16 and float32, found {q.dtype} and {k.dtype}")
    if (k.shape[0], k.shape[2], k.shape[3]) != (batch, seq, head_dim):
        raise RopeError(f"k: expected [{batch}, kv_heads, {seq}, {head_dim}] as q has them, found {list(k.shape)}")
    if batch * seq >= 2**30:
        raise RopeError(f"q: expected fewer than 2 ** 30 tokens, found {batch * seq}")
    if inv_freq is not None and position_ids is not None and cos is None and sin is None:
        if inv_freq.ndim != 1 or not 1 <= inv_freq.shape[0] <= head_dim // 2 or not inv_freq.is_contiguous():
            raise RopeError(f"inv_freq: expected 1 to {head_dim // 2} values in a row, found {list(inv_freq.shape)}")
        if inv_freq.dtype != torch.float32:
            raise RopeError(f"inv_freq: expected float32, found {inv_freq.dtype}")
        if position_ids.is_floating_point() or not _is_per_token(position_ids, 2, batch, seq):
            found = f"{position_ids.dtype} {list(position_ids.shape)}"
            raise RopeError(f"position_ids: expected integers [1 or {batch}, {seq}], found {found}")
        others = {"k": k, "inv_freq": inv_freq, "position_ids": position_ids}
    elif inv_freq is None and position_ids is None and cos is not None and sin is not None:
        for name, table in (("cos", cos), ("sin", sin)):
            fits = _is_per_token(table, 3, batch, seq) or (_is_per_token(table, 4, batch, seq) and table.shape[2] == 2)
            if not fits or not 1 <= table.shape[-1] <= head_dim // 2 or not table.is_floating_point():
                wanted = (
                    f"[1 or {batch}, {seq}, up to {head_dim // 2}] or [1 or {batch}, {seq}, 2, up to {head_dim // 2}]"
                )
                raise RopeError(f"{name}: expected {wanted}, found {table.dtype} {list(table.shape)}")
        if cos.shape[-1] != sin.shape[-1]:
            raise RopeError(f"sin: expected as many channels as cos has, {cos.shape[-1]}, found {sin.shape[-1]}")
        others = {"k": k, "cos": cos, "sin": sin}
    else:
        raise RopeError("expected either inv_freq and position_ids, or cos and sin, found another choice of them")
    for name, tensor in others.items():
        if tensor.device != q.device:
            raise RopeError(f"{name}: expected on {q.device} as q, found on {tensor.device}")


def _is_per_token(x: Tensor, ndim: int, batch: int, seq: int) -> bool:
    return x.ndim == ndim and x.shape[0] in (1, batch) and x.shape[1] == seq


def _check_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    batch, heads, seq, head_dim = k.shape
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise RopeError(f"v: expected [{batch}, {heads}, {seq}, any], found {list(v.shape)}")
    length = k_cache.shape[2] if k_cache.ndim == 4 else 0
    for name, cache, dim in (("k_cache", k_cache, head_dim), ("v_cache", v_cache, v.shape[3])):
        if cache.ndim != 4 or cache.shape[0] not in (1, batch) or cache.shape[1:] != (heads, length, dim):
            raise RopeError(f"{name}: expected [1 or {batch}, {heads}, length, {dim}], found {list(cache.shape)}")
    if slots.dtype != torch.int64 or not _is_per_token(slots, 2, batch, seq):
        raise RopeError(f"slots: expected int64 [1 or {batch}, {seq}], found {slots.dtype} {list(slots.shape)}")
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("slots", slots)):
        if tensor.device != k.device:
            raise RopeError(f"{name}: expected on {k.device} as k, found on {tensor.device}")


def _check_written(**tensors: Tensor) -> None:
    """Refuse to write into a tensor whose gradient would be lost, or several of whose elements are one in memory."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RopeError(
                f"{name}: expected a tensor that requires no gradient, since it is overwritten; see ropewalk::rope"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise RopeError(f"{name}: expected memory of its own for every element, found an expanded tensor")
