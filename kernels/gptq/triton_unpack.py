"""What the Triton kernels share: reading a block of the execution layout (layout.py) plane by plane.

A plane is 32 consecutive rows of the weight. The words of a block hold them in pairs, one code in each half,
so that one `and` takes two codes, and the word is then already the pair of half-precision numbers that a
tensor core wants: nothing is converted and nothing moved between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(low, high, block, n, N, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Return the words of one block for the columns n: int32 [BLOCK_N, WORDS], and for 3 bits the high bits,
    those of a half in its bits 2 to 9 (otherwise the same words again). Columns from N on read as 0.
    """
    columns = tl.cast(block, tl.int64) * N + n
    offsets = columns[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    here = (n < N)[:, None]
    words = tl.load(low + offsets, mask=here, other=0)
    if BITS == 3:
        both = tl.load(high + offsets, mask=here, other=0).to(tl.int32) & 0xFFFF
        return words, (both << 2) | (both << 10)
    else:
        return words, words


@triton.jit
def shifted_pairs(words, high, p: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of plane p, one at the bottom of each half of an int32 [BLOCK_N, WORDS]."""
    if BITS == 2:
        return (words >> (2 * p)) & 0x00030003
    elif BITS == 3:
        # layout.HIGH_BIT
        return ((words >> (2 * p)) & 0x00030003) | ((high >> (2 * p if p < 4 else 2 * p - 7)) & 0x00040004)
    elif BITS == 4:
        return (words >> (4 * p)) & 0x000F000F
    else:
        return (words >> (8 * p)) & 0x00FF00FF


@triton.jit
def spread(pairs):
    """Return int16 [BLOCK_N, 2 * WORDS] from int32 [BLOCK_N, WORDS]: low half, high half, low half, ..."""
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def plane_codes(words, high, p: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of plane p as float32 [BLOCK_N, 2 * WORDS]."""
    codes = spread(shifted_pairs(words, high, p, BITS)).to(tl.int32)
    # 0x4B000000 is 2 ** 23, whose last place counts ones: cheaper than a conversion.
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def plane_weights(words, high, zero, p: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return (code - zero) / UNIT of plane p, exactly, in DTYPE [BLOCK_N, 2 * WORDS].

    UNIT is 1024 for float16 and 1 otherwise (`unit`). In float16 a code at bit s of a half reads as the
    subnormal number code * 2 ** (s - 24): one multiplication brings it to code / 1024, and fused with the
    subtraction of zero / 1024 it costs one instruction for two codes. A subnormal has ten bits, so that one
    shift serves several planes: two of 4 bits, four of 3 bits, five of 2 bits.
    """
    if tl.float16 == DTYPE:
        if BITS == 2:
            if p < 5:
                pairs = words & (0x00030003 << (2 * p))
                codes = spread(pairs).to(tl.float16, bitcast=True) * (2.0 ** (14 - 2 * p))
            else:
                pairs = (words >> 10) & (0x00030003 << (2 * p - 10))
                codes = spread(pairs).to(tl.float16, bitcast=True) * (2.0 ** (24 - 2 * p))
        elif BITS == 3:
            if p < 4:
                pairs = (words & (0x00030003 << (2 * p))) | (high & (0x00040004 << (2 * p)))
                codes = spread(pairs).to(tl.float16, bitcast=True) * (2.0 ** (14 - 2 * p))
            else:
                pairs = ((words >> 8) & (0x00030003 << (2 * p - 8))) | ((high >> 1) & (0x00040004 << (2 * p - 8)))
                codes = spread(pairs).to(tl.float16, bitcast=True) * (2.0 ** (22 - 2 * p))
        elif BITS == 4:
            if p % 2 == 0:
                codes = spread((words >> (4 * p)) & 0x000F000F).to(tl.float16, bitcast=True) * 16384.0
            else:
                codes = spread((words >> (4 * p - 4)) & 0x00F000F0).to(tl.float16, bitcast=True) * 1024.0
        else:
            codes = spread((words >> (8 * p)) & 0x00FF00FF).to(tl.float16, bitcast=True) * 16384.0
        return codes - (zero.to(tl.float16) * 0.0009765625)[:, None]
    elif tl.bfloat16 == DTYPE and BITS < 8:
        # 0x4300 is 128, whose last place counts ones.
        codes = spread(shifted_pairs(words, high, p, BITS) | 0x43004300).to(tl.bfloat16, bitcast=True)
        return codes - (zero + 128).to(tl.bfloat16)[:, None]
    else:
        return (plane_codes(words, high, p, BITS) - zero.to(tl.float32)[:, None]).to(DTYPE)


@triton.jit
def group_row(table, k, n, N, GROUP: tl.constexpr):
    """Return where the scales (or zero points) of sorted row k stand, for the columns n."""
    if GROUP == 0:
        return table + n
    else:
        return table + k // GROUP * N + n


@triton.jit
def load_zero(zeros, k, n, N, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Return the zero points of sorted row k, int32 [BLOCK_N]; a constant where all are the same."""
    if HAS_ZEROS:
        return tl.load(group_row(zeros, k, n, N, GROUP), mask=n < N, other=0).to(tl.int32)
    else:
        return tl.full([n.shape[0]], 1 << (BITS - 1), tl.int32)


@triton.jit
def source_rows(order, k, K, HAS_ORDER: tl.constexpr):
    """Return which channel of the activation meets sorted row k."""
    if HAS_ORDER:
        return tl.load(order + k, mask=k < K, other=0)
    else:
        return k
