"""The execution layout: what the GPU kernels read.

Rows are sorted by group, once, so that a scale is read once for a whole plane of rows and never gathered.
A plane is 32 consecutive rows; a block is as many planes as 16 words of a column hold. A word holds two
neighbouring rows of each plane, one in its low and one in its high half, so that one `and` takes both as a
pair that tensor cores can use; the words of a column lie together, 64 bytes, and the columns of a block
follow each other. For codes of b bits (2, 4 or 8):

    words   int32 [blocks, N, 16]
    row block * rows_per_block(b) + p * 32 + 2 * c + h of column n  =  words[block, n, c] >> (b * p + 16 * h)

3 bits are two planes of bits, one after the other in the same storage, so that they cost 3 bits: the low
two bits of every code as above for b = 2, then the high bits as int16 [blocks, N, 16], at p + 8 * h.

K is padded with rows of code 0 to whole blocks, which the kernels meet with activations of 0. Everything
here runs on the device of its arguments, and `to_checkpoint` inverts `to_execution` bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ropewalk.errors import FormatError
from ropewalk.gptq.format import is_sequential, pack, unpack

WORDS = 16  # of a column in a block
PLANE = 2 * WORDS  # rows
RUN = 8  # columns of gate, and then the same of up, in a weight that holds both
HIGH_BIT = (0, 2, 4, 6, 1, 3, 5, 7)
_LOW_BITS = {2: 2, 3: 2, 4: 4, 8: 8}


def rows_per_block(bits: int) -> int:
    """Return how many rows of the weight a block holds: 256, 256, 128 or 64."""
    return WORDS * 32 // _LOW_BITS[bits]


def padded_rows(in_features: int, bits: int) -> int:
    """Return K rounded up to whole blocks."""
    block = rows_per_block(bits)
    return math.ceil(in_features / block) * block


def word_rows(in_features: int, bits: int) -> int:
    """Return the first dimension of the words of a layer: padded K * bits / 32."""
    return padded_rows(in_features, bits) * bits // 32


def row_order(g_idx: Tensor | None, group_size: int) -> Tensor | None:
    """Return the order in which the rows of a layer are sorted by group, or None where they are already.

    Args:
        g_idx: int32 [K] or None.
        group_size: rows to a group; -1 for one group.

    Returns:
        int32 [K] on g_idx's device: sorted row j is row order[j] of the checkpoint.

    Raises:
        FormatError: groups that do not all have group_size rows (but for the last): no GPTQ writes them,
            and sorted rows would not tell their group.
    """
    if g_idx is None or is_sequential(g_idx, group_size):
        return None
    if not has_even_groups(g_idx, group_size):
        raise FormatError("g_idx", f"{group_size} rows in every group but the last", "groups of other sizes")
    if g_idx.is_cuda or int(g_idx.max()) > 0x7FFF:
        return torch.argsort(g_idx.long(), stable=True).to(torch.int32)
    # numpy sorts 16-bit integers by their digits, ten times as fast; a model has hundreds of layers.
    return torch.from_numpy(np.argsort(g_idx.numpy().astype(np.int16), kind="stable").astype(np.int32))


def has_even_groups(g_idx: Tensor | None, group_size: int) -> bool:
    """Tell whether every group but the last has group_size rows, in whatever order they stand."""
    if g_idx is None:
        return True
    rows = g_idx.shape[0]
    size = rows if group_size == -1 else min(group_size, rows)
    counts = torch.bincount(g_idx)
    return len(counts) == math.ceil(rows / size) and bool((counts[:-1] == size).all())


def supports(group_size: int, in_features: int) -> bool:
    """Tell whether a plane of rows never straddles two groups, which the kernels rely on."""
    return group_size == -1 or group_size >= in_features or group_size % PLANE == 0


def to_execution(qweight: Tensor, bits: int, order: Tensor | None = None) -> Tensor:
    """Rearrange checkpoint words for execution.

    Args:
        qweight: int32 [K * bits / 32, N].
        order: as `row_order` returns it.

    Returns:
        int32 [word_rows(K, bits), N]; the planes of 3 bits follow each other in its storage.
    """
    codes = unpack(qweight, bits)
    if order is not None:
        codes = codes[order.long()]
    rows, columns = codes.shape
    if bits == 3 and columns % 2:
        raise FormatError("qweight", "an even number of columns for 3 bits", columns)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padded_rows(rows, bits) - rows))
    if bits != 3:
        return _pack_planes(codes, bits, torch.int32).reshape(-1, columns)
    low = _pack_planes(codes & 3, 2, torch.int32)
    high = _pack_planes(codes >> 2, 1, torch.int16)
    return torch.cat((low.flatten(), high.flatten().view(torch.int32))).reshape(-1, columns)


def to_checkpoint(words: Tensor, bits: int, order: Tensor | None, in_features: int) -> Tensor:
    """Invert `to_execution`: return int32 [K * bits / 32, N]."""
    codes = unpack_execution(words, bits)[:in_features]
    if order is not None:
        sorted_codes, codes = codes, torch.empty_like(codes)
        codes[order.long()] = sorted_codes
    return pack(codes, bits)


def unpack_execution(words: Tensor, bits: int) -> Tensor:
    """Return the codes of execution words as uint8 [padded K, N], rows sorted by group."""
    low, high = bit_planes(words, bits)
    codes = _unpack_planes(low, _LOW_BITS[bits])
    return codes if high is None else codes | (_unpack_planes(high, 1) << 2)


def bit_planes(words: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Return the words as the kernels address them, sharing storage: int32 [blocks, N, 16] and None, or for
    3 bits the low two bits and, as int16 [blocks, N, 16], the high ones.
    """
    rows, columns = words.shape
    if bits != 3:
        return words.reshape(-1, columns, WORDS), None
    low = rows // 3 * 2
    return (
        words[:low].reshape(-1, columns, WORDS),
        words[low:].reshape(-1).view(torch.int16).reshape(-1, columns, WORDS),
    )


def side_by_side(weights: Sequence[Tensor], bits: int) -> Tensor:
    """Return one weight that has the columns of several, which agree in K, bits and the order of their rows.

    Args:
        weights: words as `to_execution` returns them.

    Returns:
        int32 [word_rows(K, bits), the sum of N]. Scales and zero points are concatenated along dim 1.

    Raises:
        FormatError: weights of different K.
    """
    rows = {words.shape[0] for words in weights}
    if len(rows) != 1:
        raise FormatError("words", "weights of the same K", f"{sorted(rows)} rows of words")
    columns = sum(words.shape[1] for words in weights)
    lows, highs = zip(*(bit_planes(words, bits) for words in weights), strict=True)
    flat = torch.cat(lows, dim=1).flatten()
    if bits == 3:
        flat = torch.cat((flat, torch.cat(highs, dim=1).flatten().view(torch.int32)))
    return flat.reshape(-1, columns)


def take_columns(words: Tensor, columns: Tensor, bits: int) -> Tensor:
    """Return the weight that has some columns of another, int64 [n], in that order; for 3 bits an even number."""
    low, high = bit_planes(words, bits)
    flat = low.index_select(1, columns).flatten()
    if high is not None:
        flat = torch.cat((flat, high.index_select(1, columns).flatten().view(torch.int32)))
    return flat.reshape(-1, len(columns))


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Return what a gated MLP's two projections have for each column, [..., N / 2] each, as one [..., N].

    Eight columns of gate, the same eight of up, and so on; the last two runs are as wide as what remains. Rows g and
    g + 8 of a tensor core's tile are then both halves of one result, and one thread has them. For scales, zero
    points, biases and results; for words `interleave_words`.
    """
    half = gate.shape[-1]
    whole = half // RUN * RUN
    runs = [t[..., :whole].unflatten(-1, (whole // RUN, RUN)) for t in (gate, up)]
    both = torch.stack(runs, dim=-2).flatten(-3)
    return both if whole == half else torch.cat((both, gate[..., whole:], up[..., whole:]), dim=-1)


def gate_and_up(both: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `interleave`."""
    half = both.shape[-1] // 2
    whole = half // RUN * RUN
    gate, up = both[..., : 2 * whole].unflatten(-1, (whole // RUN, 2, RUN)).unbind(-2)
    if whole == half:
        return gate.flatten(-2), up.flatten(-2)
    more_gate, more_up = both[..., 2 * whole :].chunk(2, dim=-1)
    return torch.cat((gate.flatten(-2), more_gate), dim=-1), torch.cat((up.flatten(-2), more_up), dim=-1)


def interleave_words(gate: Tensor, up: Tensor, bits: int) -> Tensor:
    """Return one weight that has the columns of two, as `interleave` puts them.

    Args:
        gate, up: words as `to_execution` returns them, of one shape, whose rows are in one order.

    Raises:
        FormatError: words of different shapes.
    """
    if gate.shape != up.shape:
        raise FormatError("words", f"up as gate, {list(gate.shape)}", list(up.shape))
    columns = torch.arange(2 * gate.shape[1], device=gate.device)
    return take_columns(side_by_side((gate, up), bits), interleave(*columns.chunk(2)), bits)


def gate_and_up_words(both: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Invert `interleave_words`."""
    gate, up = gate_and_up(torch.arange(both.shape[1], device=both.device))
    return take_columns(both, gate, bits), take_columns(both, up, bits)


def _pack_planes(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Pack codes [K, N] into words of `dtype`, [blocks, N, 16]; one shift and one or for each plane and half."""
    half = dtype.itemsize * 4
    columns = codes.shape[1]
    blocks = codes.reshape(-1, half // bits, WORDS, 2, columns)  # block, plane, word, half, column
    words = torch.zeros(blocks.shape[0], WORDS, columns, dtype=dtype, device=codes.device)
    for p in range(half // bits):
        for h in range(2):
            words |= blocks[:, p, :, h].to(dtype) << (_bit(p, bits) + half * h)
    return words.transpose(1, 2).contiguous()


def _unpack_planes(words: Tensor, bits: int) -> Tensor:
    half = words.dtype.itemsize * 4
    words = words.transpose(1, 2)
    blocks, _, columns = words.shape
    codes = torch.empty(blocks, half // bits, WORDS, 2, columns, dtype=torch.uint8, device=words.device)
    for p in range(half // bits):
        for h in range(2):
            codes[:, p, :, h] = (words >> (_bit(p, bits) + half * h)) & ((1 << bits) - 1)
    return codes.reshape(-1, columns)


def _bit(p: int, bits: int) -> int:
    """Return where in its half a word holds the codes of plane p; of 1 bit are the high ones of 3."""
    return HIGH_BIT[p] if bits == 1 else bits * p
