"""`ropewalk::cpu_attention` against plain torch in float64: rotation, cache and attention of a few tokens."""

import pytest
import torch

from ropewalk import cpu
from ropewalk.cpu.attention import attention

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no kernels for the CPU")

# batch, new tokens, heads, heads of k, channels, of them rotated, tokens before
SHAPES = [
    (1, 1, 32, 4, 64, 64, 160),
    (2, 3, 8, 8, 128, 128, 700),
    (1, 8, 4, 2, 80, 80, 5),
    (3, 1, 6, 3, 20, 16, 0),
    (1, 1, 2, 1, 96, 96, 1500),
    (16, 1, 4, 4, 16, 8, 63),
    (2, 16, 5, 5, 8, 8, 49),
]


def case(shape, dtype=torch.float32, masked=False, seed=0):
    """Return the arguments, and what has to come out in float64."""
    batch, tokens, heads, kv_heads, dim, rotary, past = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    angles = 3 * torch.randn(1 if batch == 1 else batch, tokens, rotary // 2, generator=generator)
    cos, sin = (torch.cat([table] * 2, -1) for table in (angles.cos(), angles.sin()))
    room = past + tokens + 7
    k_cache, v_cache = (torch.randn(batch, kv_heads, room, dim, generator=generator).to(dtype) for _ in range(2))
    seen = torch.arange(room)[None] <= past + torch.arange(tokens)[:, None]
    mask = seen.expand(batch, 1, tokens, room).clone()
    if masked:
        mask &= torch.rand(mask.shape, generator=generator) < 0.7
        mask[..., past : past + 1] = True  # somebody is seen

    q, k, v = qkv.double().view(batch, tokens, -1, dim).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)

    def turned(x):
        x, rest = x[..., :rotary], x[..., rotary:]
        half = torch.cat([-x[..., rotary // 2 :], x[..., : rotary // 2]], -1)
        return torch.cat([x * cos[:, None].double() + half * sin[:, None].double(), rest], -1)

    keys, values = k_cache.double(), v_cache.double()
    keys[:, :, past : past + tokens] = turned(k).to(dtype).double()
    values[:, :, past : past + tokens] = v
    each = heads // kv_heads
    scores = 0.3 * turned(q) @ keys.repeat_interleave(each, 1).transpose(2, 3)
    out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values.repeat_interleave(each, 1)
    arguments = (qkv, cos, sin, k_cache, v_cache, torch.tensor(past), mask if masked else None, heads, kv_heads, 0.3)
    return arguments, out.transpose(1, 2).flatten(2), keys, values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_as_torch(shape, masked, dtype):
    arguments, expected, keys, values = case(shape, dtype, masked)
    before = [a.clone() for a in arguments[:3]]
    found = attention(*arguments)
    # What is not float32 is rounded once, at the end, and the keys as they enter the cache.
    bound = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < bound
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=False))
    _, _, _, k_cache, v_cache, length, *_ = arguments
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (k_cache.double() - keys).abs().max() < rounding * float(keys.abs().max())
    assert torch.equal(v_cache.double(), values)
    assert int(length) == shape[-1] + shape[1]


def test_the_same_bits_whatever_the_threads_and_the_batch(two_threads):
    arguments, *_ = case((2, 2, 8, 4, 64, 64, 1300))
    found = attention(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    torch.set_num_threads(1)
    alone = attention(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    assert torch.equal(found, alone)
    qkv, cos, sin, k_cache, v_cache, length, *rest = arguments
    for b in range(2):
        one = [t[b : b + 1].clone() for t in (qkv, cos, sin, k_cache, v_cache)]
        assert torch.equal(attention(*one, length.clone(), *rest)[0], found[b])


def test_a_cache_with_strides_of_its_own():
    arguments, expected, keys, _ = case((2, 1, 4, 2, 32, 32, 20))
    qkv, cos, sin, k_cache, v_cache, *rest = arguments
    k_view, v_view = (torch.full((2, 40, 2, 32), torch.nan).transpose(1, 2) for _ in range(2))
    k_view[:, :, : k_cache.shape[2]], v_view[:, :, : v_cache.shape[2]] = k_cache, v_cache
    found = attention(qkv, cos, sin, k_view, v_view, *rest)
    assert (found.double() - expected).abs().max() < 3e-6
    assert (k_view[:, :, : keys.shape[2]].double() - keys).abs().max() < 1e-5
    assert k_view[:, :, keys.shape[2] :].isnan().all()


def test_what_is_not_a_number_is_not_lost():
    arguments, *_ = case((1, 1, 4, 2, 32, 32, 70))
    arguments[3][0, 0, 3, 5] = torch.nan
    found = attention(*arguments).view(4, 32)
    assert found[:2].isnan().all()
    assert not found[2:].isnan().any()


def test_a_token_that_sees_nothing():
    arguments, *_ = case((2, 1, 4, 2, 32, 32, 70), masked=True)
    arguments[6][1] = False
    found = attention(*arguments)
    assert (found[1] == 0).all()
    assert not found.isnan().any()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(1, 1, 8 * 32, dtype=torch.float64), "qkv: expected float32"),
        (0, torch.zeros(1, 1, 8 * 32 + 1), "qkv: expected .* a multiple of 8"),
        (1, torch.zeros(1, 2, 32), "cos: expected floating"),
        (3, torch.zeros(1, 2, 70, 32), "k_cache: expected room for 71 tokens, found 70"),
        (3, torch.zeros(1, 2, 80, 32, dtype=torch.float16), "k_cache: expected Float"),
        (4, torch.zeros(1, 4, 80, 32), "v_cache: expected"),
        (5, torch.tensor(70.0), "length: expected one int64"),
        (6, torch.ones(1, 1, 1, 70, dtype=torch.bool), "mask: expected bool"),
        (6, torch.zeros(1, 1, 1, 80), "mask: expected bool"),
        (7, 3, "heads: expected a multiple of 2, found 3"),
    ],
)
def test_arguments_that_do_not_fit(place, value, message):
    arguments = list(case((1, 1, 4, 2, 32, 32, 70))[0])
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        attention(*arguments)


def test_opcheck():
    arguments, *_ = case((1, 2, 4, 2, 32, 32, 9))
    torch.library.opcheck(
        torch.ops.ropewalk.cpu_attention.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
