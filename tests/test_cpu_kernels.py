"""The C++ kernels of packed layers: every instruction set of this machine, against float64."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear

from ropewalk import cpu
from ropewalk.bench.peers.weight import random_weight
from ropewalk.gptq import cpu_layout, cpu_ops
from ropewalk.gptq.format import BITS, dequantize, pack
from ropewalk.gptq.layout import row_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# K, N, group size: groups of one block, of several and of part of one, ragged ones, tiles that are not full, none.
SHAPES = [
    (256, 64, 32),
    (256, 96, 128),
    (320, 32, -1),
    (320, 32, 48),
    (224, 32, 64),
    (64, 32, 16),
    (256, 160, 1024),
]


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not cpu.load():
        pytest.skip(f"no kernels for the CPU: {cpu.status()['why']}")


@pytest.fixture(params=["avx512_vnni", "avx512", "avx_vnni", "avx2", "portable"])
def level(request):
    if request.param not in torch.ops.ropewalk.cpu_levels():
        pytest.skip(f"this processor has no {request.param}")
    torch.ops.ropewalk.cpu_cap_level(request.param)
    assert torch.ops.ropewalk.cpu_level() == request.param
    yield request.param
    torch.ops.ropewalk.cpu_cap_level(torch.ops.ropewalk.cpu_levels()[0])


def prepared(w):
    """Return (words, scales, zeros, rows) of a weight in the layout of the CPU."""
    order = row_order(w.g_idx, w.group_size) if w.act_order else None
    rows = cpu_layout.row_map(order, w.in_features, w.group_size)
    blocks = cpu_layout.block_count(w.in_features, w.group_size)
    words = torch.ops.ropewalk.cpu_repack(w.qweight, rows, w.bits, blocks)
    zeros = None if w.sym else cpu_layout.tile_columns(w.zeros())
    return words, cpu_layout.scales_for_tiles(w.scales), zeros, rows


def largest(t):
    return float(t.abs().max())


def check(y, x, dense, bias, *, exact):
    """Compare with float64, bounded by what torch makes of the same in x's dtype."""
    assert y.dtype == x.dtype
    expected = linear(x.double(), dense.double().t(), bias.double())
    torchs = linear(x, dense.to(x.dtype).t().contiguous(), bias.to(x.dtype))
    error, bound = largest(y.double() - expected), 2 * largest(torchs.double() - expected) + 1e-6 * largest(expected)
    if exact:
        assert error <= bound
    else:
        # Each of the K activations is off by up to half a step of its block.
        steps = largest(x) / 127 / 2
        assert error <= bound + steps * float(dense.abs().sum(0).max())
        assert error <= 0.02 * largest(expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
def test_repacking_is_the_reference_and_comes_back(bits, k, n, group_size):
    for desc_act in (False, True):
        w = random_weight(k, n, bits=bits, group_size=group_size, desc_act=desc_act, sym=False)
        words, scales, zeros, rows = prepared(w)
        blocks = cpu_layout.block_count(k, group_size)
        assert torch.equal(words, cpu_layout.pack_reference(w.qweight, rows, bits, blocks))
        assert torch.equal(torch.ops.ropewalk.cpu_unpack(words, rows, bits, k, n), w.qweight)
        assert torch.equal(cpu_layout.untile_columns(scales, n), w.scales)
        dense = torch.ops.ropewalk.cpu_dequantize(words, scales, zeros, rows, bits, group_size, k, n)
        qzeros, g_idx = w.qzeros_v2(), w.g_idx if w.act_order else None
        expected = dequantize(w.qweight, w.scales, qzeros, g_idx, bits=bits, group_size=group_size)
        assert torch.equal(dense, expected)
        assert torch.equal(w.dense(), expected)


def test_three_bits_cost_three_bits():
    w = random_weight(256, 64, bits=3, group_size=32)
    assert prepared(w)[0].nbytes == w.qweight.nbytes == 256 * 64 * 3 // 8


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
def test_every_level_computes_the_same_bits(bits, k, n, group_size, exact):
    """Every dtype, act-order and symmetry, one row to two strips and a half."""
    first = {}
    for level in reversed(torch.ops.ropewalk.cpu_levels()):
        torch.ops.ropewalk.cpu_cap_level(level)
        for i, m in enumerate((1, 2, 7, 29)):
            torch.manual_seed(m)
            w = random_weight(k, n, bits=bits, group_size=group_size, desc_act=i % 2 == 1, sym=i // 2 == 1, seed=m)
            packed, bias = prepared(w), torch.randn(n)
            for dtype in DTYPES if m != 29 else DTYPES[:1]:
                x = torch.randn(m, k).to(dtype)
                y = cpu_ops.linear(x, *packed, bias, bits, group_size, n, exact)
                if (m, dtype) in first:
                    assert torch.equal(y, first[m, dtype])
                else:
                    check(y, x, w.dense(), bias, exact=exact)
                    first[m, dtype] = y


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_company_with_any_number_of_threads(level, dtype):
    w = random_weight(1024, 544, group_size=64, desc_act=True)
    packed = prepared(w)
    x = torch.randn(27, 1024).to(dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(cpu_ops.linear(x, *packed, None, 4, 64, 544, True))
            found.append(torch.cat([cpu_ops.linear(row[None], *packed, None, 4, 64, 544, True) for row in x]))
            found.append(cpu_ops.linear(x, *packed, None, 4, 64, 544, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_activations_of_all_sizes(level):
    """Blocks that are zero, tiny, huge, or hold one value a million times the others."""
    w = random_weight(256, 32, group_size=32)
    x = torch.randn(1, 256)
    x[:, :32] = 0
    x[:, 32:64] *= 1e-35
    x[:, 64:96] *= 1e30
    x[:, 100] = 1e6
    packed = prepared(w)
    y = cpu_ops.linear(x, *packed, None, 4, 32, 32, True)
    check(y, x, w.dense(), torch.zeros(32), exact=True)
    x[:, 64:96] = 0
    y = cpu_ops.linear(x, *packed, None, 4, 32, 32, True)
    check(y, x, w.dense(), torch.zeros(32), exact=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_row_alone(level, value):
    w = random_weight(128, 64, group_size=32)
    x = torch.randn(3, 128)
    x[1, 77] = value
    for exact in (True, False):
        y = cpu_ops.linear(x, *prepared(w), None, 4, 32, 64, exact)
        assert y[1].isnan().all()
        assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_and_written_as_it_is(level, dtype):
    """A weight of ones on the diagonal returns x: every finite value of the dtype, but for the smallest."""
    codes = torch.full((32, 32), 8, dtype=torch.uint8)
    codes += torch.eye(32, dtype=torch.uint8)
    w = random_weight(32, 32, group_size=32)
    w.qweight.copy_(pack(codes, 4))
    w.scales.fill_(1)
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = bits[bits.isfinite() & ((bits == 0) | (bits.abs().float() > 1e-29))]
    x = torch.zeros(len(values), 32, dtype=dtype)
    x[:, 5] = values  # alone in its block: the largest of it
    y = cpu_ops.linear(x, *prepared(w), None, 4, 32, 32, True)
    assert torch.equal(y[:, 5], values)
    assert not y[:, 6].any()


def test_strided_rows_and_leading_dimensions(level):
    w = random_weight(128, 64, group_size=32, desc_act=True)
    packed = prepared(w)
    wide = torch.randn(2, 5, 3 * 128)
    for x in (wide[..., 128:256], wide[:, ::2, 7:135], torch.randn(2, 128, 5).transpose(1, 2), torch.randn(128)):
        before = x.clone()
        y = cpu_ops.linear(x, *packed, None, 4, 32, 64, True)
        assert y.shape == (*x.shape[:-1], 64)
        assert torch.equal(y, cpu_ops.linear(x.contiguous(), *packed, None, 4, 32, 64, True))
        assert torch.equal(x, before)
    for shape in ((0, 128), (2, 0, 128)):
        assert cpu_ops.linear(torch.empty(shape), *packed, None, 4, 32, 64, True).shape == (*shape[:-1], 64)


def test_prompts_longer_than_the_scratch_memory():
    w = random_weight(4096, 32, group_size=128)
    packed = prepared(w)
    x = torch.randn(1500, 4096)
    y = cpu_ops.linear(x, *packed, None, 4, 128, 32, True)
    assert torch.equal(y[[0, 700, 1499]], cpu_ops.linear(x[[0, 700, 1499]], *packed, None, 4, 128, 32, True))
    check(y, x, w.dense(), torch.zeros(32), exact=True)


def test_wrong_arguments_are_named():
    w = random_weight(128, 64, group_size=32, desc_act=True)
    words, scales, zeros, rows = prepared(w)
    x = torch.randn(1, 128)

    def run(x=x, words=words, scales=scales, rows=rows, bias=None, bits=4, group_size=32, n=64):
        return cpu_ops.linear(x, words, scales, zeros, rows, bias, bits, group_size, n, True)

    run()
    for name, arguments in {
        "x: expected float32": {"x": x.double()},
        "words: expected 2 blocks for 64 rows": {"x": x[:, :64]},
        "words: expected shape": {"n": 65},
        "words: expected Int": {"words": words.float()},
        "scales: expected shape": {"scales": scales[:, :2]},
        "scales: expected Float": {"scales": scales.double()},
        "rows: expected shape": {"rows": rows[:32]},
        "bias: expected 1 x 64": {"bias": torch.zeros(63)},
        "bits: expected 2, 3, 4 or 8": {"bits": 5},
        "group_size: expected": {"group_size": 0},
    }.items():
        with pytest.raises(RuntimeError, match=name):
            run(**arguments)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_experts_are_their_layers_one_by_one(bits, routed, level):
    experts, tokens, top_k, k, n = 5, 13, 2, 128, 64
    weights = [random_weight(k, n, bits=bits, group_size=32, desc_act=True, sym=False, seed=e) for e in range(experts)]
    stacked = [torch.stack(tensors) for tensors in zip(*(prepared(w) for w in weights), strict=True)]
    bias = torch.randn(experts, n)
    ids = torch.randint(0, experts, (tokens, top_k))
    ids[ids == 3] = 0  # one without tokens
    ids[4, 1] = experts  # another machine's
    routing = torch.rand(tokens, top_k) if routed else None
    for x in (torch.randn(tokens, k), torch.randn(tokens, top_k, k)):
        each = torch.zeros(tokens, top_k, n)
        for t in range(tokens):
            for place in range(top_k):
                e = int(ids[t, place])
                if e < experts:
                    row = x[t] if x.ndim == 2 else x[t, place]
                    packed = [s[e] for s in stacked]
                    each[t, place] = cpu_ops.linear(row, *packed, bias[e], bits, 32, n, True)
        y = torch.ops.ropewalk.cpu_experts(x, *stacked, bias, ids, routing, bits, 32, n, True)
        if routing is None:
            assert torch.equal(y, each)
        else:
            torch.testing.assert_close(y, (routing[..., None] * each).sum(1), rtol=0, atol=1e-5)


def test_gradients_flow_to_x():
    w = random_weight(64, 32, group_size=32, desc_act=True, sym=False)
    packed, bias = prepared(w), torch.randn(32)
    x = torch.randn(3, 64, requires_grad=True)
    y = cpu_ops.linear(x, *packed, bias, 4, 32, 32, False)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, w.dense().sum(1).expand(3, 64))
    check(y.detach(), x.detach(), w.dense(), bias, exact=True)


def test_the_operators_are_whole():
    w = random_weight(64, 32, group_size=32, desc_act=True)
    arguments = (*prepared(w), torch.randn(32), 4, 32, 32)
    x = torch.randn(3, 64)
    torch.library.opcheck(torch.ops.ropewalk.cpu_linear, (x, *arguments, False))
    torch.library.opcheck(torch.ops.ropewalk.cpu_linear_with_grad, (x.requires_grad_(), *arguments))
    stacked = tuple(None if a is None else a[None] for a in arguments[:5])
    ids, routing = torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2)
    for given in (None, routing):
        torch.library.opcheck(torch.ops.ropewalk.cpu_experts, (x.detach(), *stacked, ids, given, *arguments[5:], False))


def test_compiles_whole():
    w = random_weight(64, 32, group_size=32)
    packed = prepared(w)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x):
        return cpu_ops.linear(x.relu(), *packed, None, 4, 32, 32, False) + 1

    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), cpu_ops.linear(x.relu(), *packed, None, 4, 32, 32, False) + 1)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_the_environment_caps_the_level():
    code = """
import json, torch, ropewalk.gptq.cpu_ops
from ropewalk import cpu
assert cpu.load()
try:
    print(json.dumps(torch.ops.ropewalk.cpu_level()))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""

    def level(cap):
        env = {**os.environ, "ROPEWALK_CPU_LEVEL": cap}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        return json.loads(done.stdout)

    assert level("portable") == "portable"
    assert level("") == torch.ops.ropewalk.cpu_levels()[0]
    assert "expected one of avx512_vnni, avx512, avx_vnni, avx2, portable, found 'sse9'" in level("sse9")
