"""The execution layout of the CPU kernels (kernels/cpu/packed.h), made from a checkpoint's tensors and back.

Columns lie in tiles of 32, rows in blocks of 32. Rows are sorted by group and every group begins a block, so that a
block has one scale for each column whatever the group size is: a group that is not whole blocks is filled up with
rows that meet activations of 0. Four neighbouring rows of a column are the bytes of an int32, as integer dot products
take them, and 16 columns lie together. With Q = 8 / b, for codes of b = 2, 4 or 8 bits,

    words   int32 [tiles, blocks, 32 b]
    row 32 block + 4 q + i of column 32 tile + 16 v + n
        =  words.view(uint8)[tile, block, 64 b v + 64 (q // Q) + 4 n + i] >> (b (q % Q))

and 3 bits are two vectors of low bits (b = 2 in this formula, but for the stride 64 * 3 of v) followed by one of high
bits, bit q of each byte. Scales and zero points follow the tiles: [tiles, groups, 32].

The functions that touch every weight run in C++ and need `ropewalk.cpu.load()`; `pack_reference` is the first of them
in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ropewalk.errors import FormatError
from ropewalk.gptq.format import unpack

COLUMNS = 32
BLOCK = 32
LAYOUT = 1  # to count up when any of this changes: files keep it (ropewalk.loader.packed_cache)


def block_count(in_features: int, group_size: int) -> int:
    """Return how many blocks the rows of a layer fill."""
    if group_size == -1 or group_size >= in_features:
        return math.ceil(in_features / BLOCK)
    groups, rest = divmod(in_features, group_size)
    return groups * math.ceil(group_size / BLOCK) + math.ceil(rest / BLOCK)


def row_map(order: Tensor | None, in_features: int, group_size: int) -> Tensor | None:
    """Return which row of the checkpoint each row of the blocks is.

    Args:
        order: int32 [K] as `layout.row_order` returns it, or None.

    Returns:
        int32 [block_count * 32], -1 where a group is filled up; None where every row is its own.
    """
    one_group = group_size == -1 or group_size >= in_features
    size = in_features if one_group else group_size
    if order is None and in_features % BLOCK == 0 and (one_group or size % BLOCK == 0):
        return None
    rows = torch.full((block_count(in_features, group_size) * BLOCK,), -1, dtype=torch.int32)
    place = torch.arange(in_features)
    stride = math.ceil(size / BLOCK) * BLOCK
    rows[place // size * stride + place % size] = place.to(torch.int32) if order is None else order.cpu()
    return rows


def tile_columns(values: Tensor) -> Tensor:
    """Return [G, N] as [tiles, G, 32], the last tile filled up with zeros."""
    return _by_tiles(values).contiguous()


def _by_tiles(values: Tensor) -> Tensor:
    groups, columns = values.shape
    tiles = math.ceil(columns / COLUMNS)
    if columns % COLUMNS:
        values = torch.nn.functional.pad(values, (0, tiles * COLUMNS - columns))
    return values.reshape(groups, tiles, COLUMNS).transpose(0, 1)


def untile_columns(values: Tensor, columns: int) -> Tensor:
    """Invert `tile_columns`."""
    return values.transpose(0, 1).reshape(values.shape[1], -1)[:, :columns].contiguous()


def scales_for_tiles(scales: Tensor, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
    """Return scales [G, N] as the kernels read them, in memory of their own: float16 as they are, others in float32."""
    tiles = _by_tiles(scales if scales.dtype == torch.float16 else scales.float())
    return empty(tiles.shape, dtype=tiles.dtype).copy_(tiles)


def words_for(
    qweight: Tensor, rows: Tensor | None, bits: int, blocks: int, empty: Callable[..., Tensor] = torch.empty
) -> Tensor:
    """Return the words of a checkpoint as the kernels read them.

    Args:
        qweight: int32 [K * bits / 32, N].
        rows: as `row_map` returns them.
        blocks: as `block_count` returns them.
        empty: gives the memory, called as torch.empty is.
    """
    if empty is torch.empty:
        words: Tensor = torch.ops.ropewalk.cpu_repack(qweight, rows, bits, blocks)  # this asks for large pages
        return words
    words = empty((math.ceil(qweight.shape[1] / COLUMNS), blocks, BLOCK * bits), dtype=torch.int32)
    torch.ops.ropewalk.cpu_repack_into(words, qweight, rows, bits)
    return words


def pack_reference(qweight: Tensor, rows: Tensor | None, bits: int, blocks: int) -> Tensor:
    """Compute `ropewalk::cpu_repack` in plain torch.

    Args:
        qweight: int32 [K * bits / 32, N] of a checkpoint.
        rows: as `row_map` returns them.
        blocks: as `block_count` returns them.

    Returns:
        words as above.

    Raises:
        FormatError: rows that are missing.
    """
    codes = unpack(qweight, bits)
    if rows is not None:
        codes = torch.where((rows >= 0)[:, None], codes[rows.clamp(min=0).long()], 0)
    if codes.shape[0] != blocks * BLOCK:
        raise FormatError("qweight", f"{blocks * BLOCK} rows", codes.shape[0])
    tiles = math.ceil(codes.shape[1] / COLUMNS)
    codes = torch.nn.functional.pad(codes, (0, tiles * COLUMNS - codes.shape[1]))
    # block, quad, i, tile, v, n -> tile, block, v, quad, n, i
    codes = codes.reshape(blocks, 8, 4, tiles, 2, 16).permute(3, 0, 4, 1, 5, 2)
    if bits == 3:
        packed = torch.cat((_pack_bytes(codes & 3, 2), _pack_bytes(codes >> 2, 1)), dim=3)
    else:
        packed = _pack_bytes(codes, bits)
    return packed.reshape(tiles, blocks, -1).contiguous().view(torch.int32)


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Put the quads of codes [tile, block, v, quad, n, i] that share a byte into it."""
    tiles, blocks, vectors = codes.shape[:3]
    shared = codes.reshape(tiles, blocks, vectors, bits, 8 // bits, 16, 4)
    packed = torch.zeros_like(shared[:, :, :, :, 0])
    for place in range(8 // bits):
        packed |= shared[:, :, :, :, place] << (bits * place)
    return packed
