"""The execution layout: exactly invertible, as small as promised, and as its docstring says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.errors import FormatError
from ropewalk.gptq.format import BITS, pack, unpack
from ropewalk.gptq.layout import (
    HIGH_BIT,
    PLANE,
    WORDS,
    bit_planes,
    gate_and_up,
    gate_and_up_words,
    interleave,
    interleave_words,
    row_order,
    rows_per_block,
    side_by_side,
    supports,
    take_columns,
    to_checkpoint,
    to_execution,
    unpack_execution,
    word_rows,
)


def random_words(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randint(0, 1 << bits, (rows, columns), generator=generator), bits)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_back_to_the_checkpoint_bit_for_bit(bits, rows, columns, shuffled, seed):
    rows, columns = rows * 32, columns * 8
    qweight = random_words(rows, columns, bits, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator).to(torch.int32) if shuffled else None
    words = to_execution(qweight, bits, order)
    assert words.shape == (word_rows(rows, bits), columns)
    assert torch.equal(to_checkpoint(words, bits, order, rows), qweight)


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_where_the_docstring_says(bits):
    rows, columns = 2 * rows_per_block(bits), 8
    qweight = random_words(rows, columns, bits)
    codes = unpack(qweight, bits)
    low, high = bit_planes(to_execution(qweight, bits), bits)
    assert low.shape == (2, columns, WORDS)
    width = 2 if bits == 3 else bits
    for row in (0, 1, 2, PLANE - 1, PLANE, 5 * PLANE // 4 + 1, rows // 2, rows - 1):
        block, within = divmod(row, rows_per_block(bits))
        p, place = divmod(within, PLANE)
        c, h = divmod(place, 2)
        code = (low[block, :, c] >> (width * p + 16 * h)) & ((1 << width) - 1)
        if high is not None:
            code = code | (((high[block, :, c].int() >> (HIGH_BIT[p] + 8 * h)) & 1) << 2)
        assert torch.equal(code.to(torch.uint8), codes[row])


def test_three_bits_cost_three_bits():
    words = to_execution(random_words(1024, 64, 3), 3)
    assert words.numel() * 32 == 1024 * 64 * 3
    low, high = bit_planes(words, 3)
    assert low.data_ptr() == words.data_ptr()
    assert high.data_ptr() == words.data_ptr() + low.numel() * 4
    assert (low.dtype, high.dtype) == (torch.int32, torch.int16)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_code_zero(bits):
    codes = unpack_execution(to_execution(random_words(32, 32, bits), bits), bits)
    assert codes.shape[0] == rows_per_block(bits)
    assert not codes[32:].any()


def test_row_order():
    assert row_order(None, 32) is None
    assert row_order(torch.arange(100) // 32, 32) is None
    assert row_order(torch.zeros(64, dtype=torch.int32), -1) is None
    shuffle = torch.randperm(100)
    g_idx = (torch.arange(100) // 32)[shuffle].to(torch.int32)
    order = row_order(g_idx, 32)
    assert order.dtype == torch.int32
    assert torch.equal(g_idx[order.long()], (torch.arange(100) // 32).to(torch.int32))
    # Stable: within a group the checkpoint's order stays.
    assert all(torch.equal(part.sort().values, part) for part in order.split(32))
    with pytest.raises(FormatError, match="2 rows in every group but the last"):
        row_order(torch.tensor([0, 1, 1, 1], dtype=torch.int32), 2)


def test_which_group_sizes_a_plane_never_straddles():
    assert all(supports(group_size, 256) for group_size in (-1, 32, 64, 96, 128, 256, 1000))
    assert not any(supports(group_size, 256) for group_size in (1, 8, 16, 48, 100))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [32, 36, 4])
def test_gate_and_up_take_turns(bits, columns):
    gate, up = (torch.randint(0, 1 << bits, (96, columns)) for _ in range(2))
    scales = torch.rand(2, 3, columns)
    both = interleave(*scales)
    # Column c is in run c // 8; the last run is as wide as what remains.
    for c in range(columns):
        first, width = 2 * (c // 8 * 8), min(8, columns - c // 8 * 8)
        assert torch.equal(both[:, first + c % 8], scales[0, :, c])
        assert torch.equal(both[:, first + width + c % 8], scales[1, :, c])
    for found, expected in zip(gate_and_up(both), scales, strict=True):
        assert torch.equal(found, expected)
    words = [to_execution(pack(codes, bits), bits) for codes in (gate, up)]
    together = interleave_words(*words, bits)
    assert torch.equal(unpack_execution(together, bits)[:96], interleave(gate, up).to(torch.uint8))
    for found, expected in zip(gate_and_up_words(together, bits), words, strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(FormatError, match="up as gate"):
        interleave_words(words[0], to_execution(pack(up[:, : columns // 2], bits), bits), bits)


@pytest.mark.parametrize("bits", BITS)
def test_columns_taken(bits):
    qweight = random_words(288, 64, bits)
    columns = torch.randperm(64)[:48]
    assert torch.equal(
        take_columns(to_execution(qweight, bits), columns, bits), to_execution(qweight[:, columns], bits)
    )


@pytest.mark.parametrize("bits", BITS)
def test_weights_side_by_side(bits):
    parts = [random_words(288, columns, bits, seed) for seed, columns in enumerate((32, 64, 96))]
    order = torch.randperm(288).to(torch.int32)
    together = side_by_side([to_execution(part, bits, order) for part in parts], bits)
    assert torch.equal(together, to_execution(torch.cat(parts, dim=1), bits, order))
    with pytest.raises(FormatError, match="weights of the same K"):
        side_by_side([to_execution(random_words(rows, 32, bits), bits) for rows in (32, 512)], bits)
