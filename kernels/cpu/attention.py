"""The operator `ropewalk::cpu_attention`: the attention of a few new tokens, cache and rotation included.

It is there once `ropewalk.cpu.load()` has returned True, and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "ropewalk::cpu_attention",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) length, Tensor? mask, "
    "int heads, int kv_heads, float scaling) -> Tensor",
)
_attention = torch.ops.ropewalk.cpu_attention.default


def attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scaling: float,
) -> Tensor:
    """Return softmax(scaling * q k^T) v for new tokens, whose keys and values go into the cache first.

    Sums are float32, in an order that depends neither on the threads nor on the processor; the softmax's exponential
    is within 2e-7.

    Args:
        qkv: [B, S, (heads + 2 kv_heads) D], float32, float16 or bfloat16: q, k and v of the new tokens, not rotated.
        cos, sin: [1 or B, S, dim], dim <= D, of the new tokens, for half-rotated channels (`ropewalk.rope`).
        k_cache, v_cache: [B, kv_heads, room, D] in qkv's dtype, rows contiguous; written from `length` on.
        length: int64, one number: how many tokens are in the cache, S more afterwards.
        mask: bool [1 or B, 1, S, at least length + S], what a new token sees; None for all up to itself.
        heads, kv_heads: of q, and of k and v.
        scaling: of the scores, D ** -0.5 for most.

    Returns:
        [B, S, heads D] in qkv's dtype; zeros for a token that sees nothing.

    Raises:
        RuntimeError: arguments that do not belong together, or no room in the cache.
    """
    return _attention(qkv, cos, sin, k_cache, v_cache, length, mask, heads, kv_heads, scaling)


@torch.library.register_fake("ropewalk::cpu_attention")
def _(qkv, cos, sin, k_cache, v_cache, length, mask, heads, kv_heads, scaling):  # type: ignore[no-untyped-def]
    dim = qkv.shape[2] // (heads + 2 * kv_heads)
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], heads * dim))
