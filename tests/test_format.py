"""The checkpoint layout, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.errors import FormatError
from ropewalk.gptq import format as f
from ropewalk.gptq.rtn import quantize_rtn

BITS = st.sampled_from(f.BITS)


def stream_of(codes, bits):
    """Pack a column by the definition alone: one little-endian stream of bits."""
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return np.frombuffer(stream.to_bytes(len(codes) * bits // 8, "little"), dtype="<i4")


@given(BITS, st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_pack_is_one_little_endian_stream_and_unpack_its_inverse(bits, runs, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (32 * runs, columns))
    packed = f.pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (runs * bits, columns)
    for column in range(columns):
        assert np.array_equal(packed[:, column].numpy(), stream_of(codes[:, column], bits))
    assert torch.equal(f.unpack(packed, bits), torch.from_numpy(codes).to(torch.uint8))


@given(BITS, st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_any_words_survive_unpack_and_pack(bits, runs, columns, seed):
    words = torch.from_numpy(
        np.random.default_rng(seed).integers(-(2**31), 2**31, (runs * bits, columns), dtype=np.int64).astype(np.int32)
    )
    assert torch.equal(f.pack(f.unpack(words, bits), bits), words)
    assert torch.equal(f.pack(f.unpack(words.t(), bits, dim=1), bits, dim=1), words.t())


@pytest.mark.parametrize(("bits", "smallest"), [(2, 16), (4, 8), (8, 4)])
def test_sizes_that_fill_one_word(bits, smallest):
    codes = torch.arange(smallest)[:, None] % (1 << bits)
    packed = f.pack(codes, bits)
    assert packed.shape == (1, 1)
    assert torch.equal(f.unpack(packed, bits).long(), codes)


@given(BITS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_zeros_v1_and_v2_are_inverses(bits, groups, runs, seed):
    words = torch.from_numpy(
        np.random.default_rng(seed).integers(-(2**31), 2**31, (groups, runs * bits), dtype=np.int64).astype(np.int32)
    )
    assert torch.equal(f.zeros_v1_to_v2(f.zeros_v2_to_v1(words, bits), bits), words)
    assert torch.equal(f.zeros_v2_to_v1(f.zeros_v1_to_v2(words, bits), bits), words)


@given(BITS, st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_v1_stores_every_zero_point_less_one(bits, groups, seed):
    zeros = torch.from_numpy(np.random.default_rng(seed).integers(1, 1 << bits, (groups, 32)))
    stored = f.zeros_v2_to_v1(f.pack(zeros, bits, dim=1), bits)
    assert torch.equal(f.unpack(stored, bits, dim=1).long(), zeros - 1)


def test_a_zero_point_of_0_borrows_as_gptqmodel_does():
    """It subtracts from whole words, so the code after a 0 is one less; reading gives both back."""
    zeros = torch.tensor([[0, 5, 7, 7, 7, 7, 7, 7]])
    v1 = f.zeros_v2_to_v1(f.pack(zeros, 4, dim=1), 4)
    assert f.unpack(v1, 4, dim=1).tolist()[0][:3] == [15, 3, 6]
    assert torch.equal(f.unpack(f.zeros_v1_to_v2(v1, 4), 4, dim=1).long(), zeros)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0x55555555]),
        (4, [0x77777777]),
        (8, [0x7F7F7F7F]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
    ],
)
def test_symmetric_zeros_are_the_known_words(bits, words):
    columns = 32
    stored = f.symmetric_zeros(2, columns, bits)
    expected = torch.tensor([words * (columns * bits // 32 // len(words))] * 2).to(torch.int32)
    assert torch.equal(stored, expected)
    assert f.is_symmetric(stored, bits)
    assert not f.is_symmetric(stored, bits, "gptq_v2")
    assert f.is_symmetric(f.zeros_v1_to_v2(stored, bits), bits, "gptq_v2")
    stored[1, 0] ^= 1
    assert not f.is_symmetric(stored, bits)


@given(
    BITS,
    st.sampled_from([-1, 16, 32, 48, 64, 128]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(f.FORMATS),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_dequantize_is_the_formula(bits, group_size, sym, act_order, checkpoint_format, seed):
    """W[k, n] = (code - zero) * scale, each element alone; ragged last groups among them (K = 96, groups of 64)."""
    in_features, out_features = 96, 32
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    order = torch.randperm(in_features, generator=generator) if act_order else None
    packed = quantize_rtn(
        weight, bits=bits, group_size=group_size, sym=sym, order=order, checkpoint_format=checkpoint_format
    )
    qzeros = f.zeros_v1_to_v2(packed["qzeros"], bits) if checkpoint_format == "gptq" else packed["qzeros"]
    codes, zeros = f.unpack(packed["qweight"], bits), f.unpack(qzeros, bits, dim=1)
    expected = torch.empty(in_features, out_features)
    for k in range(in_features):
        g = int(packed["g_idx"][k])
        expected[k] = (codes[k].float() - zeros[g].float()) * packed["scales"][g].float()
    sequential = f.is_sequential(packed["g_idx"], group_size)
    arguments = {"bits": bits, "group_size": group_size}
    g_idx = None if sequential else packed["g_idx"]
    assert torch.equal(f.dequantize(packed["qweight"], packed["scales"], qzeros, g_idx, **arguments), expected)
    # The symmetric fast path and an explicit g_idx say the same.
    fast = None if sym else qzeros
    found = f.dequantize(packed["qweight"], packed["scales"], fast, packed["g_idx"], **arguments)
    assert torch.equal(found, expected)
    # And it is the weight that was packed, to half a step.
    step = packed["scales"].float()[packed["g_idx"].long()]
    assert bool(((expected - weight.t()).abs() <= step * (1.001 if sym else 1.501)).all())


@pytest.mark.parametrize("group_size", [-1, 32, 40])
def test_expected_tensors_are_what_rtn_writes(group_size):
    for bits in f.BITS:
        packed = quantize_rtn(torch.randn(64, 96), bits=bits, group_size=group_size)
        expected = f.expected_tensors(96, 64, bits, group_size)
        assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == expected
        assert f.infer_features(tuple(packed["qweight"].shape), bits) == (96, 64)
        entries = {n: (tuple(t.shape), t.dtype) for n, t in packed.items()}
        assert f.check_shapes(entries, bits=bits, group_size=group_size, desc_act=True) == (96, 64)


def test_g_idx():
    assert f.sequential_g_idx(6, 4).tolist() == [0, 0, 0, 0, 1, 1]
    assert f.sequential_g_idx(3, -1).tolist() == [0, 0, 0]
    assert f.group_count(96, 64) == 2
    assert f.is_sequential(torch.tensor([0, 0, 1, 1], dtype=torch.int32), 2)
    assert not f.is_sequential(torch.tensor([0, 1, 0, 1], dtype=torch.int32), 2)


def layer():
    packed = quantize_rtn(torch.randn(64, 96), bits=4, group_size=32)
    return {name: (tuple(t.shape), t.dtype) for name, t in packed.items()}


@pytest.mark.parametrize(
    ("change", "tensor", "expected", "found"),
    [
        ({"qweight": None}, "qweight", "a tensor of this name", "none"),
        ({"scales": None}, "scales", "a tensor of this name", "none"),
        ({"g_idx": None}, "g_idx", "desc_act is true", "none"),
        ({"qweight": ((12, 64), torch.int64)}, "qweight", "torch.int32", "torch.int64"),
        ({"qweight": ((12, 64), torch.float16)}, "qweight", "torch.int32", "torch.float16"),
        ({"qzeros": ((3, 9), torch.int32)}, "qzeros", "[3, 8]", "[3, 9]"),
        ({"scales": ((2, 64), torch.float16)}, "scales", "[3, 64]", "[2, 64]"),
        ({"scales": ((3, 64), torch.int32)}, "scales", "floating-point", "torch.int32"),
        ({"g_idx": ((95,), torch.int32)}, "g_idx", "[96]", "[95]"),
        ({"g_idx": ((96,), torch.float32)}, "g_idx", "torch.int32", "torch.float32"),
        ({"bias": ((63,), torch.float16)}, "bias", "[64]", "[63]"),
    ],
)
def test_shapes_that_disagree_are_named(change, tensor, expected, found):
    entries = {n: e for n, e in {**layer(), **change}.items() if e is not None}
    with pytest.raises(FormatError) as error:
        f.check_shapes(entries, bits=4, group_size=32, desc_act=True, prefix="model.layers.0.x.", file="w.safetensors")
    message = str(error.value)
    assert message.startswith(f"w.safetensors: model.layers.0.x.{tensor}: expected ")
    assert expected in message
    assert found in message


@pytest.mark.parametrize("bits", [1, 5, 16, True, "4", None])
def test_bits_that_do_not_exist(bits):
    with pytest.raises(FormatError, match="bits: expected 2 or 3 or 4 or 8"):
        f.pack(torch.zeros(32, 1, dtype=torch.int64), bits)


def test_codes_and_sizes_out_of_range():
    with pytest.raises(FormatError, match="values from 0 to 7, found 0 to 8"):
        f.pack(torch.arange(32)[:, None].clamp(max=8), 3)
    with pytest.raises(FormatError, match="multiple of 8 for 4 bits, found 9"):
        f.pack(torch.zeros(9, 1, dtype=torch.int64), 4)
    with pytest.raises(FormatError, match="multiple of 3 for 3 bits, found 4"):
        f.unpack(torch.zeros(4, 1, dtype=torch.int32), 3)
    with pytest.raises(FormatError, match=r"int32, found torch\.int64"):
        f.unpack(torch.zeros(3, 1, dtype=torch.int64), 3)
    with pytest.raises(FormatError, match="out_features: expected a multiple of 32"):
        f.expected_tensors(32, 48, 3, 32)
    for group_size in (0, -2, True, 1.5):
        with pytest.raises(FormatError, match="group_size"):
            f.expected_tensors(32, 32, 4, group_size)


def test_values_that_a_header_cannot_vouch_for():
    good = quantize_rtn(torch.randn(64, 96), bits=4, group_size=32)
    f.check_values(good)
    for bad, expected in ((float("nan"), "finite"), (float("inf"), "finite")):
        scales = good["scales"].clone()
        scales[1, 3] = bad
        with pytest.raises(FormatError, match=f"scales: expected {expected}"):
            f.check_values({**good, "scales": scales})
    with pytest.raises(FormatError, match="float16 can hold"):
        f.check_values({**good, "scales": good["scales"].float() * 1e9})
    for value in (-1, 3):
        g_idx = good["g_idx"].clone()
        g_idx[5] = value
        with pytest.raises(FormatError, match="g_idx: expected group numbers from 0 to 2"):
            f.check_values({**good, "g_idx": g_idx})
