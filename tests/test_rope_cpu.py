"""The C++ kernel of the rotary embedding: bit for bit the reference, in every layout, and never beyond its tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ropewalk import cpu
from ropewalk.errors import RopeError
from ropewalk.loader import apply_rotary
from ropewalk.rope import inverse_frequencies, reference
from ropewalk.rope.ops import rope_on_cpu

ops = torch.ops.ropewalk
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SENTINEL = -77.0


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _kernels():
    if not cpu.load():
        status = cpu.status()
        assert status["state"] in ("no compiler", "off"), status
        pytest.skip(f"no C++ kernels: {status['why']}")


@pytest.fixture
def _poisoned():
    """Fill new tensors with NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def same(found, expected):
    """Whether bits are equal, NaN being NaN."""
    return found.dtype == expected.dtype and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def tables(kind, half, batch=2, seq=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shape = (batch, seq, 2, half) if kind == "pairs" else (batch, seq, half)
    return {name: torch.randn(shape, generator=g).to(dtype) for name in ("cos", "sin")}


def heads(n, head_dim, dtype, batch=2, seq=5, seed=0):
    """Return [batch, n, seq, head_dim], laid out as the projections of transformers write it."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq, n, head_dim, generator=g).to(dtype).transpose(1, 2)


def by_reference(x, how, **more):
    how = dict(how)
    scaling = how.pop("attention_scaling", 1.0)
    if "inv_freq" in how:
        cos, sin = reference.cos_sin(how["inv_freq"], how["position_ids"], scaling)
    else:
        cos, sin = how["cos"].float() * scaling, how["sin"].float() * scaling
    return reference.rotate_by_tables(x, cos, sin, **more)


def test_it_is_what_runs():
    for name in ("rope", "rope_", "rope_and_cache_", "rope_cpu"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ropewalk::{name}", "CPU")


def test_the_first_call_loads_it():
    code = """
import torch, ropewalk.rope.ops
there = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("ropewalk::rope_", "CPU")
assert not there()
x = torch.ones(1, 1, 3, 4)
torch.ops.ropewalk.rope_(x, x.clone(), torch.ones(2), torch.zeros(1, 3, dtype=torch.int64))
assert there() and (x == 1).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("head_dim", [2, 5, 7, 64, 80, 129])
def test_bit_for_bit_the_reference(dtype, interleaved, inverse, head_dim):
    q, k = heads(4, head_dim, dtype), heads(1, head_dim, dtype, seed=3)
    kept = q.clone(), k.clone()
    positions = torch.tensor([[0, 1, 2, 3, 16383], [9, 3, 70000, 5, 100]])
    for half in {1, head_dim // 3, head_dim // 2} - {0}:
        inv_freq, _ = inverse_frequencies("default", dim=2 * half)
        hows = [{"inv_freq": inv_freq, "position_ids": ids} for ids in (positions, positions[:1].int())]
        hows += [tables(kind, half, dtype=t) for kind in ("halves", "pairs") for t in (dtype, torch.float64)]
        hows += [{"cos": tables("pairs", half, batch=1)["cos"], "sin": tables("halves", half)["sin"]}]
        for how in hows:
            how["attention_scaling"] = 1.3
            found = ops.rope(q, k, **how, interleaved=interleaved, inverse=inverse)
            for x, turned in zip((q, k), found, strict=True):
                assert turned.stride() == x.stride()
                assert same(turned, by_reference(x, how, interleaved=interleaved, inverse=inverse))
    assert torch.equal(q, kept[0])
    assert torch.equal(k, kept[1])


LAYOUTS = {
    "in a row": lambda n, d: (slice(1, 3), slice(1, 1 + n), slice(2, 7), slice(3, 3 + d)),
    "every second channel": lambda n, d: (slice(1, 3), slice(1, 1 + n), slice(2, 7), slice(3, 3 + 2 * d, 2)),
    "every second head and token": lambda n, d: (slice(1, 3), slice(1, 1 + 2 * n, 2), slice(2, 12, 2), slice(3, 3 + d)),
}


def inside(n, dim, dtype, layout, transposed):
    """Return a tensor of sentinels, and a view [2, n, 5, dim] in it."""
    around = torch.full((4, 2 * n + 2, 14, 2 * dim + 6), SENTINEL).to(dtype)
    around = around.transpose(1, 2).contiguous().transpose(1, 2) if transposed else around
    return around, around[LAYOUTS[layout](n, dim)]


def untouched(around, view):
    """Whether all but the view still is the sentinel; the view is set to it on the way."""
    view.fill_(SENTINEL)
    return bool((around == SENTINEL).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_views_and_what_lies_around_them(dtype, interleaved, layout, transposed):
    head_dim, half = 37, 17
    how = tables("pairs", half)
    values = heads(3, head_dim, dtype), heads(2, head_dim, dtype, seed=3), heads(2, 21, torch.float64, seed=4)
    expected = [by_reference(x, how, interleaved=interleaved) for x in values[:2]]
    (big_q, q), (big_k, k), (big_v, v) = (inside(x.shape[1], x.shape[3], x.dtype, layout, transposed) for x in values)
    for view, x in zip((q, k, v), values, strict=True):
        view.copy_(x)
    for turned, wanted in zip(ops.rope(q, k, **how, interleaved=interleaved), expected, strict=True):
        assert same(turned, wanted)
    assert torch.equal(q, values[0])

    # Into caches that are views, too: [2, 2, 5 slots, dim].
    (big_kc, k_cache), (big_vc, v_cache) = (inside(2, x.shape[3], x.dtype, layout, transposed) for x in (k, v))
    slots = torch.tensor([[-1, 4, 0, 5, 2**40], [3, -(2**40), 1, 0, 9]])
    ops.rope_and_cache_(q, k, v, k_cache, v_cache, slots, **how, interleaved=interleaved)
    assert same(q, expected[0])
    assert same(k, expected[1])
    for cache, x in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[0][:, [4, 0]], x[0][:, [1, 2]])
        assert torch.equal(cache[1][:, [3, 1, 0]], x[1][:, [0, 2, 3]])
        assert (cache[0][:, [1, 2, 3]] == SENTINEL).all()
        assert (cache[1][:, [2, 4]] == SENTINEL).all()

    q.copy_(values[0]), k.copy_(values[1])
    ops.rope_(q, k, **how, interleaved=interleaved)
    assert same(q, expected[0])
    assert same(k, expected[1])
    for around, view in ((big_q, q), (big_k, k), (big_v, v), (big_kc, k_cache), (big_vc, v_cache)):
        assert untouched(around, view)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_one_cache_for_the_whole_batch(cache_dtype):
    """Also of another dtype than k, which C++ leaves to torch."""
    q, k, v = heads(4, 16, torch.bfloat16), heads(2, 16, torch.bfloat16), heads(2, 8, torch.bfloat16)
    k_cache, v_cache = torch.zeros(1, 2, 12, 16, dtype=cache_dtype), torch.zeros(1, 2, 12, 8, dtype=cache_dtype)
    slots = torch.tensor([[11, 9, 7, 5, 3], [0, 2, 4, 6, 8]])
    ops.rope_and_cache_(q, k, v, k_cache, v_cache, slots, **tables("halves", 8))
    for cache, x in ((k_cache, k), (v_cache, v)):
        for row in range(2):
            assert torch.equal(cache[0][:, slots[row]].float(), x[row].to(cache_dtype).float())
        assert not cache[0][:, 10].float().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number(dtype):
    """Converted and rounded as torch does it: also subnormal, infinite, NaN, and what overflows."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, 512, 128)
    q = torch.cat([x, x.flip(-1)], dim=-1)
    for factor in (1.0, 1 / 3, 1e-5, 3e4):
        cos, sin = torch.full((1, 512, 128), factor), torch.rand(1, 512, 128)
        found, _ = ops.rope(q, q, cos=cos, sin=sin)
        assert same(found, reference.rotate_by_tables(q, cos, sin))
        found, _ = ops.rope(q, q, cos=cos, sin=torch.zeros_like(sin))
        assert same(found, reference.rotate_by_tables(q, cos, torch.zeros_like(sin)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_many_threads_as_one_likes(dtype):
    q, k = heads(8, 64, dtype, seq=301), heads(2, 64, dtype, seq=301)
    inv_freq, _ = inverse_frequencies("default", dim=64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(torch.cat(ops.rope(q, k, inv_freq, torch.arange(301)[None]), dim=1))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize(("batch", "n", "seq"), [(2, 3, 0), (0, 3, 5), (2, 0, 5)])
def test_nothing_to_rotate(batch, n, seq):
    q, k = heads(n, 16, torch.float32, batch, seq), heads(2, 16, torch.float32, batch, seq)
    inv_freq, _ = inverse_frequencies("default", dim=16)
    how = {"inv_freq": inv_freq, "position_ids": torch.arange(seq)[None]}
    assert [x.shape for x in ops.rope(q, k, **how)] == [q.shape, k.shape]
    ops.rope_(q, k, **how)
    caches = torch.zeros(2, batch, 2, 0, 16).unbind()
    ops.rope_and_cache_(q, k, k, *caches, torch.zeros(1, seq, dtype=torch.int64), **how)


def test_what_it_leaves_to_torch():
    q, k = heads(4, 16, torch.float64), heads(2, 16, torch.float64)
    how = tables("halves", 8)
    for turned, x in zip(ops.rope(q, k, **how), (q, k), strict=True):
        assert turned.dtype == torch.float64
        torch.testing.assert_close(turned, by_reference(x, how))
    with pytest.raises(RopeError, match=r"k: expected \[2, kv_heads, 5, 16\]"):
        rope_on_cpu(q.float(), k.float()[:, :, 1:], None, None, **how)
    with pytest.raises(RopeError, match="cos: expected"):
        rope_on_cpu(q.float(), k.float(), None, None, how["cos"][:, 1:], how["sin"])


def test_without_autograd():
    q, k = heads(4, 16, torch.float32), heads(2, 16, torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(rope_on_cpu, (q, k), tables("halves", 8), test_utils=tests)


def test_transformers_tables_and_views_are_not_copied():
    q, k = heads(4, 64, torch.bfloat16), heads(2, 64, torch.bfloat16)
    how = tables("halves", 64, dtype=torch.bfloat16)
    assert apply_rotary.has_kernel(q)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        found = apply_rotary.rotate(q, k, **how)
    names = {event.name for event in profile.events()}
    assert "ropewalk::rope_cpu" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::mul"}
    pairs = {name: table.unflatten(-1, (2, -1)) for name, table in how.items()}
    for turned, x in zip(found, (q, k), strict=True):
        assert same(turned, by_reference(x, pairs))


def test_under_vmap_and_forward_gradients():
    """apply_rotary gives them to functions that know how, or they come out right anyhow."""
    from transformers.models.llama import modeling_llama

    apply_rotary.replace(modeling_llama.__name__)
    try:
        ours = modeling_llama.apply_rotary_pos_emb
        theirs = ours.replaced
        q, k = heads(4, 16, torch.float32), heads(2, 16, torch.float32)
        cos, sin = tables("halves", 16).values()
        for x, y in zip(
            torch.func.jvp(lambda q: ours(q, k, cos, sin)[0], (q,), (q.cos(),)),
            torch.func.jvp(lambda q: theirs(q, k, cos, sin)[0], (q,), (q.cos(),)),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
        many = torch.stack([q, q.sin()])
        found = torch.vmap(lambda q: ours(q, k, cos, sin)[0])(many)
        torch.testing.assert_close(found, torch.vmap(lambda q: theirs(q, k, cos, sin)[0])(many))
    finally:
        apply_rotary.restore()


def test_the_operators_without_it():
    """The tests of the operators again, in a process that does without C++."""
    file = Path(__file__).with_name("test_rope_ops.py")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not compiles", str(file)]
    env = {**os.environ, "ROPEWALK_CPU_KERNELS": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=file.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
