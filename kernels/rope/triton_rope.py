"""Rotary embedding of queries and keys in one Triton launch, with an optional write into a KV cache.

The formula is that of reference.py. A program takes a tile of [BLOCK_S tokens, BLOCK_H heads, BLOCK_HALF
pairs of channels] and walks over heads, first those of q, then of k, then of v, so that the angles of its
tokens are computed once. They come from `inv_freq` and the position ids, in registers: no table of
cosines lies in memory. With few tokens the tile is one token by many heads, and heads are shared out over
programs; with many it is many tokens by one head.

Everything is read and written once, in 16-byte pieces where the last stride is 1. Nothing waits for the
device and nothing is allocated, so a CUDA graph can hold the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pairs of channels in a tile: with four warps eight to a thread, which is 16 bytes of float16.
TILE = 1024
# Programs worth having: about eight for each multiprocessor of a large GPU. More would only compute the
# same angles again.
PROGRAMS = 1024


@triton.jit
def cos_sin(angle):
    """Return cosine and sine of float32 angles, within 1.3e-7 up to 1e5 rad (1e6 where tl.fma is fused, as on any GPU).

    Triton 3.7 lowers tl.cos and tl.sin to libdevice's (read from the PTX for sm_75 and sm_90): exact, but
    with a branch and 32 bytes of stack in local memory for angles above 1e5, in every element. Without
    either: a reduction to at most an eighth of a turn by Cody and Waite, with pi / 2 in parts of 8 bits whose
    products with the number of quarter-turns are exact, and the polynomials of Cephes (sinf.c) for what
    remains. The interpreter, too, then computes what a GPU does.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = tl.fma(quarters, -1.5703125, angle)
    r = tl.fma(quarters, -4.825592041015625e-4, r)
    r = tl.fma(quarters, -1.2665987014770508e-6, r)
    r = tl.fma(quarters, -9.92093518482005e-10, r)
    z = r * r
    sine = r + r * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cosine = 1.0 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    quadrant = quarters.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    return tl.where((quadrant == 1) | (quadrant == 2), -c, c), tl.where(quadrant >= 2, -s, s)


@triton.jit
def _rows(x, strides, batch, head, seq):
    """Return pointers [BLOCK_S, BLOCK_H, 1] to channel 0 of some heads of some tokens."""
    token = batch.to(tl.int64) * strides[0] + seq.to(tl.int64) * strides[2]
    return x + (token[:, None] + head.to(tl.int64)[None, :] * strides[1])[:, :, None]


@triton.jit
def _copy(rows, stride, to, to_stride, live, FROM: tl.constexpr, UP_TO: tl.constexpr):
    """Copy channels FROM .. UP_TO - 1 as they are."""
    channel = FROM + tl.arange(0, triton.next_power_of_2(UP_TO - FROM))[None, None, :].to(tl.int64)
    live = live & (channel < UP_TO)
    x = tl.load(rows + channel * stride, mask=live)
    tl.store(to + channel * to_stride, x.to(to.dtype.element_ty), mask=live)


@triton.jit
def _load(rows, stride, live, DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return both channels of every pair, float32, each [BLOCK_S, BLOCK_H, BLOCK_HALF]."""
    BLOCK_HALF: tl.constexpr = triton.next_power_of_2(DIM // 2)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_HALF)[None, None, :].to(tl.int64)
        x = tl.load(rows + channel * stride, mask=live & (channel < DIM), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (rows.shape[0], rows.shape[1], BLOCK_HALF, 2)))
    else:
        channel = tl.arange(0, BLOCK_HALF)[None, None, :].to(tl.int64)
        live = live & (channel < DIM // 2)
        a = tl.load(rows + channel * stride, mask=live, other=0.0).to(tl.float32)
        b = tl.load(rows + (channel + DIM // 2) * stride, mask=live, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(rows, stride, a, b, live, DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Write both channels of every pair."""
    BLOCK_HALF: tl.constexpr = triton.next_power_of_2(DIM // 2)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_HALF)[None, None, :].to(tl.int64)
        x = tl.reshape(tl.join(a, b), (rows.shape[0], rows.shape[1], 2 * BLOCK_HALF))
        tl.store(rows + channel * stride, x.to(rows.dtype.element_ty), mask=live & (channel < DIM))
    else:
        channel = tl.arange(0, BLOCK_HALF)[None, None, :].to(tl.int64)
        live = live & (channel < DIM // 2)
        tl.store(rows + channel * stride, a.to(rows.dtype.element_ty), mask=live)
        tl.store(rows + (channel + DIM // 2) * stride, b.to(rows.dtype.element_ty), mask=live)


@triton.jit
def _table(x, strides, batch, seq, live, channel):
    """Return the table's entries for both channels of a pair, float32, each [BLOCK_S, 1, BLOCK_HALF]."""
    rows = x + (batch.to(tl.int64) * strides[0] + seq.to(tl.int64) * strides[1])[:, None]
    rows += channel[None, :].to(tl.int64) * strides[3]
    a = tl.load(rows, mask=live, other=0.0).to(tl.float32)
    b = tl.load(rows + strides[2], mask=live, other=0.0).to(tl.float32)
    return a[:, None, :], b[:, None, :]


@triton.jit(do_not_specialize=["tokens", "seq_len", "cache_len"])
def rope_kernel(
    q,
    q_out,
    k,
    k_out,
    v,
    k_cache,
    v_cache,
    slots,
    inv_freq,
    position_ids,
    cos,
    sin,
    q_strides,
    q_out_strides,
    k_strides,
    k_out_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    slots_strides,
    position_strides,
    cos_strides,
    sin_strides,
    tokens,
    seq_len,
    cache_len,
    q_heads,
    k_heads,
    attention_scaling,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rotate q and k; see `rotate` for what the arguments mean. Grid: (tiles of tokens, shares of the heads)."""
    BLOCK_HALF: tl.constexpr = triton.next_power_of_2(DIM // 2)
    # Tokens are counted in 32 bits, offsets in 64: the product of a stride passes 2 ** 31 soon.
    token = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    live = token < tokens
    batch = token // seq_len
    seq = token % seq_len

    channel = tl.arange(0, BLOCK_HALF)
    live_pair = live[:, None] & (channel < DIM // 2)[None, :]
    if inv_freq is not None:
        place = batch.to(tl.int64) * position_strides[0] + seq.to(tl.int64) * position_strides[1]
        position = tl.load(position_ids + place, mask=live, other=0).to(tl.float32)
        frequency = tl.load(inv_freq + channel, mask=channel < DIM // 2, other=0.0)
        cosine, sine = cos_sin(position[:, None] * frequency[None, :])
        cos_a = cosine[:, None, :] * attention_scaling
        sin_a = sine[:, None, :] * attention_scaling
        cos_b = cos_a
        sin_b = sin_a
    else:
        cos_a, cos_b = _table(cos, cos_strides, batch, seq, live_pair, channel)
        sin_a, sin_b = _table(sin, sin_strides, batch, seq, live_pair, channel)
        cos_a *= attention_scaling
        cos_b *= attention_scaling
        sin_a *= attention_scaling
        sin_b *= attention_scaling
    if INVERSE:
        kept = sin_a
        sin_a = -sin_b
        sin_b = -kept

    slot = batch
    in_cache = live
    if slots is not None:
        place = batch.to(tl.int64) * slots_strides[0] + seq.to(tl.int64) * slots_strides[1]
        slot = tl.load(slots + place, mask=live, other=-1)
        in_cache = live & (slot >= 0) & (slot < cache_len)

    # The tiles of all heads are numbered through, q's first; this program takes every step-th of them.
    first = tl.program_id(1)
    step = tl.num_programs(1)
    q_tiles = tl.cdiv(q_heads, BLOCK_H)
    k_tiles = tl.cdiv(k_heads, BLOCK_H)
    for tile in range(first, q_tiles, step):
        head = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        here = (live[:, None] & (head < q_heads)[None, :])[:, :, None]
        rows = _rows(q, q_strides, batch, head, seq)
        to = _rows(q_out, q_out_strides, batch, head, seq)
        a, b = _load(rows, q_strides[3], here, DIM, INTERLEAVED)
        _store(to, q_out_strides[3], a * cos_a - b * sin_a, b * cos_b + a * sin_b, here, DIM, INTERLEAVED)
        if not IN_PLACE and HEAD_DIM > DIM:
            _copy(rows, q_strides[3], to, q_out_strides[3], here, DIM, HEAD_DIM)

    for tile in range((first + step - q_tiles % step) % step, k_tiles, step):
        head = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        here = (live[:, None] & (head < k_heads)[None, :])[:, :, None]
        rows = _rows(k, k_strides, batch, head, seq)
        to = _rows(k_out, k_out_strides, batch, head, seq)
        a, b = _load(rows, k_strides[3], here, DIM, INTERLEAVED)
        turned_a = a * cos_a - b * sin_a
        turned_b = b * cos_b + a * sin_b
        _store(to, k_out_strides[3], turned_a, turned_b, here, DIM, INTERLEAVED)
        if not IN_PLACE and HEAD_DIM > DIM:
            _copy(rows, k_strides[3], to, k_out_strides[3], here, DIM, HEAD_DIM)
        if slots is not None:
            here = here & in_cache[:, None, None]
            to = _rows(k_cache, k_cache_strides, batch, head, slot)
            _store(to, k_cache_strides[3], turned_a, turned_b, here, DIM, INTERLEAVED)
            if HEAD_DIM > DIM:
                _copy(rows, k_strides[3], to, k_cache_strides[3], here, DIM, HEAD_DIM)

    if slots is not None:
        for tile in range((first + step - (q_tiles + k_tiles) % step) % step, k_tiles, step):
            head = tile * BLOCK_H + tl.arange(0, BLOCK_H)
            here = (in_cache[:, None] & (head < k_heads)[None, :])[:, :, None]
            rows = _rows(v, v_strides, batch, head, seq)
            to = _rows(v_cache, v_cache_strides, batch, head, slot)
            _copy(rows, v_strides[3], to, v_cache_strides[3], here, 0, V_DIM)


def plan(tokens: int, heads: int, half: int) -> tuple[int, int, int]:
    """Return (BLOCK_S, BLOCK_H, warps) for `tokens` tokens of at most `heads` heads with `half` pairs of channels."""
    block_half = triton.next_power_of_2(half)
    rows = max(1, TILE // block_half)
    block_s = min(rows, triton.next_power_of_2(tokens))
    block_h = min(rows // block_s, triton.next_power_of_2(heads))
    # An element for each thread at least: of a smaller tile several threads would load the same one, and
    # in place one of them might load what another has already stored.
    block_h = max(block_h, 32 // (block_s * block_half))
    return block_s, block_h, max(1, min(4, block_s * block_h * block_half // 256))


def launch(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    inv_freq: Tensor | None = None,
    position_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
    v: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """Launch the kernel on tensors whose shapes `ropewalk.rope.ops` has checked; they are described there.

    Args:
        q_out, k_out: written; q and k themselves, or tensors of their shapes that share no memory with them.
        v, k_cache, v_cache, slots: all of them or none.
    """
    batch, q_heads, seq, head_dim = q.shape
    k_heads, tokens = k.shape[1], batch * seq
    if q.numel() + k.numel() == 0:
        return
    half = inv_freq.shape[0] if inv_freq is not None else cos.shape[-1]  # type: ignore[union-attr]
    block_s, block_h, warps = plan(tokens, max(q_heads, k_heads), half)
    tiles = triton.cdiv(q_heads, block_h) + triton.cdiv(k_heads, block_h) * (1 if slots is None else 2)
    blocks = triton.cdiv(tokens, block_s)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        rope_kernel[(blocks, min(tiles, max(1, PROGRAMS // blocks)))](
            q,
            q_out,
            k,
            k_out,
            v,
            k_cache,
            v_cache,
            slots,
            inv_freq,
            position_ids,
            cos,
            sin,
            q.stride(),
            q_out.stride(),
            k.stride(),
            k_out.stride(),
            _strides(v, 4),
            _strides(k_cache, 4),
            _strides(v_cache, 4),
            _strides(slots, 2),
            _strides(position_ids, 2),
            _table_strides(cos),
            _table_strides(sin),
            tokens,
            seq,
            0 if k_cache is None else k_cache.shape[2],
            q_heads,
            k_heads,
            attention_scaling,
            DIM=2 * half,
            HEAD_DIM=head_dim,
            V_DIM=0 if v is None else v.shape[3],
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            IN_PLACE=q_out is q and k_out is k,
            BLOCK_S=block_s,
            BLOCK_H=block_h,
            num_warps=warps,
        )


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Return x's strides, with 0 for a batch of one, which then serves every row of the batch."""
    if x is None:
        return (0,) * dims
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:])


def _table_strides(x: Tensor | None) -> tuple[int, ...]:
    """Return the strides (batch, seq, member of the pair, pair) of a table with or without the third."""
    batch, seq, *rest = _strides(x, 4)
    if x is None or x.ndim == 4:
        return (batch, seq, *rest)
    return (batch, seq, 0, *rest)
