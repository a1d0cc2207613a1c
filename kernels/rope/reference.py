"""Rotary embedding in plain torch: what every kernel is tested against.

A pair of channels (a, b) of a head at position p turns by p * inv_freq[i]:

    a' = a cos - b sin          b' = b cos + a sin

Which channels make a pair is the layout. "Half-rotated" (GPT-NeoX, Llama as Hugging Face stores it):
channel i with channel i + dim / 2. "Interleaved" (GPT-J, Llama as Meta stores it): 2i with 2i + 1.
Where fewer channels are rotated than the head has, the rest pass through unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cos_sin(inv_freq: Tensor, position_ids: Tensor, attention_scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every angle, float32.

    Args:
        inv_freq: float32 [dim / 2], radians per position.
        position_ids: integers [batch, seq], in any order, repeated or not.
        attention_scaling: factor for both results.

    Returns:
        two tensors [batch, seq, dim / 2].
    """
    angles = position_ids[..., None].float() * inv_freq.float()
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the leading 2 * cos.shape[-1] channels of `x`; computed in float32 (float64 for a float64 x),
    returned in x's dtype.

    Args:
        x: [..., head_dim], any strides; it is not changed.
        cos, sin: broadcastable to [..., dim / 2] with dim <= head_dim.
    """
    dim = 2 * cos.shape[-1]
    if dim > x.shape[-1]:
        raise ValueError(f"rotary dim: expected at most the head's {x.shape[-1]} channels, found {dim}")
    rotated, passed = x[..., :dim].to(torch.promote_types(x.dtype, torch.float32)), x[..., dim:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), passed), dim=-1)


def rope(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor,
    attention_scaling: float = 1.0,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys to their positions.

    Args:
        q: [batch, heads, seq, head_dim].
        k: [batch, kv_heads, seq, head_dim].
        inv_freq: float32 [dim / 2], dim <= head_dim.
        position_ids: integers [batch, seq] (or [1, seq] for all of the batch).

    Returns:
        q and k rotated, in their own dtypes.
    """
    cos, sin = (t[:, None] for t in cos_sin(inv_freq, position_ids, attention_scaling))
    return rotate(q, cos, sin, interleaved=interleaved), rotate(k, cos, sin, interleaved=interleaved)


def rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor,
    attention_scaling: float = 1.0,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `rope` with respect to q and k: the same rotation by the opposite angle."""
    return rope(grad_q, grad_k, -inv_freq, position_ids, attention_scaling, interleaved=interleaved)


def rotate_by_tables(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Rotate x [batch, heads, seq, head_dim] by tables as the operators take them (see ops.py).

    Args:
        cos, sin: [1 or batch, seq, dim / 2], or [1 or batch, seq, 2, dim / 2] with entries of their own for
            the two channels of a pair.
        inverse: turn by the opposite angle; of tables with entries of their own, the transpose.
        out: where the result goes; x itself will do. By default a new tensor with x's strides.
    """
    (cos_a, cos_b), (sin_a, sin_b) = (
        t[:, None].unbind(3) if t.ndim == 4 else (t[:, None], t[:, None]) for t in (cos, sin)
    )
    if inverse:
        sin_a, sin_b = -sin_b, -sin_a
    dim = 2 * cos.shape[-1]
    out = torch.empty_like(x) if out is None else out
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = (channels.to(wide) for channels in _pairs(x[..., :dim], interleaved))
    turned = (a * cos_a).sub_(b * sin_a), (b * cos_b).add_(a * sin_b)
    for channels, value in zip(_pairs(out[..., :dim], interleaved), turned, strict=True):
        channels.copy_(value)
    if out is not x:
        out[..., dim:] = x[..., dim:]
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """View the first and the second channels of all pairs, each [..., dim / 2]."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def write_cache(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write x [batch, heads, seq, dim] into cache [1 or batch, heads, length, dim] at slots [1 or batch, seq]."""
    slots = slots.expand(x.shape[0], -1)
    batch, seq = ((slots >= 0) & (slots < cache.shape[2])).nonzero(as_tuple=True)
    row = batch if cache.shape[0] > 1 else torch.zeros_like(batch)
    cache[row, :, slots[batch, seq]] = x[batch, :, seq].to(cache.dtype)
