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
