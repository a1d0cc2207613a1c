"""The operators of the rotary embedding: results, gradients, fake implementations, compilation, refusals."""

import pytest
import torch

from ropewalk.errors import RopeError
from ropewalk.rope import inverse_frequencies, reference
from ropewalk.rope.ops import check

ops = torch.ops.ropewalk


def arguments(dtype=torch.float32, dim=16, tables=None):
    """Return q, k, v as transposed views, and how to rotate them: by angles or by tables."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, n, 16, generator=g).to(dtype).transpose(1, 2) for n in (4, 2, 2))
    positions = torch.tensor([[0, 0, 0, 1, 2], [9, 3, 16383, 5, 100]])
    inv_freq, _ = inverse_frequencies("partial-ntk", dim=dim, factor=4, original_max_position_embeddings=4096)
    if tables is None:
        return q, k, v, {"inv_freq": inv_freq, "position_ids": positions}
    cos, sin = reference.cos_sin(inv_freq, positions)
    if tables == "pairs":
        cos, sin = (torch.stack((t, t.flip(-1)), dim=2) for t in (cos, sin))
    return q, k, v, {"cos": cos, "sin": sin}


def caches(dtype=torch.float32):
    return torch.full((2, 2, 9, 16), -1.0, dtype=dtype), torch.full((2, 2, 9, 16), -1.0, dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [16, 6])
def test_all_three_compute_the_reference(interleaved, dtype, dim):
    q, k, v, how = arguments(dtype, dim)
    kept = q.clone(), k.clone()
    expected = reference.rope(q, k, **how, attention_scaling=1.5, interleaved=interleaved)
    how |= {"attention_scaling": 1.5, "interleaved": interleaved}
    found = ops.rope(q, k, **how)
    assert torch.equal(q, kept[0])
    assert torch.equal(k, kept[1])
    assert [x.stride() for x in found] == [q.stride(), k.stride()]
    k_cache, v_cache = caches(dtype)
    slots = torch.tensor([[-1, 3, 8, 9, 0]])
    cached_q, cached_k = q.clone(), k.clone()
    assert ops.rope_and_cache_(cached_q, cached_k, v, k_cache, v_cache, slots, **how) is None
    assert ops.rope_(q, k, **how) is None
    for name, results in {"rope": found, "rope_": (q, k), "rope_and_cache_": (cached_q, cached_k)}.items():
        for x, wanted in zip(results, expected, strict=True):
            assert torch.equal(x, wanted), name
    for cache, x in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[:, :, [3, 8, 0]], x[:, :, [1, 2, 4]])
        assert (cache[:, :, [1, 2, 4, 5, 6, 7]] == -1).all()


@pytest.mark.parametrize("tables", ["halves", "pairs"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tables(tables, interleaved):
    q, k, _, how = arguments(tables=tables)
    cos, sin = how["cos"], how["sin"]
    found, _ = ops.rope(q, k, **how, interleaved=interleaved)
    if tables == "halves":
        expected = reference.rotate(q, cos[:, None], sin[:, None], interleaved=interleaved)
    else:
        a, b = (q[..., 0::2], q[..., 1::2]) if interleaved else q.chunk(2, -1)
        (cos_a, cos_b), (sin_a, sin_b) = (t[:, None].unbind(3) for t in (cos, sin))
        pair = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
        expected = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tables", [None, "halves", "pairs"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(tables, interleaved):
    q, k, _, how = arguments(tables=tables, dim=12)
    q, k = q.double().requires_grad_(), k.double().requires_grad_()

    def step(q, k):
        return ops.rope(q, k, **how, attention_scaling=1.5, interleaved=interleaved)

    out = step(q, k)
    grads = [torch.randn_like(x) for x in out]
    found = torch.autograd.grad(out, (q, k), grads)
    # The rotation is linear: <grad, R x> = <R' grad, x> for every x.
    for x, grad, y in zip((q, k), found, grads, strict=True):
        other = torch.randn_like(x)
        turned = step(other, other[:, :2])[0] if x.shape[1] == 4 else step(other.repeat(1, 2, 1, 1), other)[1]
        torch.testing.assert_close((y * turned).sum(), (grad * other).sum(), rtol=1e-6, atol=1e-6)
    # Where only one of them is trained.
    (alone,) = torch.autograd.grad(step(q, k.detach())[1].sum() + step(q, k.detach())[0].mul(grads[0]).sum(), q)
    torch.testing.assert_close(alone, found[0])


@pytest.mark.parametrize("tables", [None, "pairs"])
def test_opcheck(tables):
    q, k, v, how = arguments(tables=tables)
    slots = torch.arange(5)[None]
    torch.library.opcheck(ops.rope.default, (q, k), how)
    trained = (q.detach().requires_grad_(), k.detach().requires_grad_())
    torch.library.opcheck(ops.rope.default, trained, {**how, "interleaved": True, "inverse": True})
    torch.library.opcheck(ops.rope_.default, (q.clone(), k.clone()), how)
    torch.library.opcheck(ops.rope_and_cache_.default, (q.clone(), k.clone(), v, *caches(), slots), how)


def test_compiles_whole_with_its_gradient():
    q, k, _, how = arguments()

    def step(q, k):
        turned_q, turned_k = ops.rope(torch.relu(q), k * 2, **how)
        return (turned_q.sum(1) * turned_k.sum(1)).sum()

    plain, compiled = ([x.detach().clone().requires_grad_() for x in (q, k)] for _ in range(2))
    step(*plain).backward()
    torch.compile(step, fullgraph=True)(*compiled).backward()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_in_place_compiles_whole():
    q, k, v, how = arguments()
    slots = torch.tensor([[4, 3, 2, 1, 0]])

    def step(q, k, k_cache, v_cache):
        q, k = q * 2, k + 1
        ops.rope_(q, k, **how)
        ops.rope_and_cache_(q, k, v, k_cache, v_cache, slots, **how)
        return q, k

    plain, compiled = caches(), caches()
    expected = step(q, k, *plain)
    found = torch.compile(step, fullgraph=True)(q, k, *compiled)
    for a, b in zip((*expected, *plain), (*found, *compiled), strict=True):
        torch.testing.assert_close(a, b)


def test_in_place_is_not_for_what_is_trained():
    q, k, _, how = arguments()
    trained = q.detach().clone().requires_grad_()
    for x in (trained, trained * 2):
        with pytest.raises(RopeError, match="q: expected a tensor that requires no gradient"):
            ops.rope_(x, k, **how)
    with pytest.raises(RuntimeError, match="q: expected a tensor that requires no gradient"):
        torch.compile(lambda x: ops.rope_(x * 2, k, **how), backend="aot_eager", fullgraph=True)(trained)
    with torch.no_grad():
        ops.rope_(trained * 2, k, **how)


REFUSED = {
    "q and k: expected 4 dimensions": {"q": torch.zeros(5, 4, 16)},
    "one dtype": {"k": torch.zeros(2, 2, 5, 16).half()},
    r"k: expected \[2, kv_heads, 5, 16\]": {"k": torch.zeros(2, 2, 6, 16)},
    "inv_freq: expected 1 to 8 values": {"inv_freq": torch.zeros(9)},
    "inv_freq: expected float32": {"inv_freq": torch.zeros(8).half()},
    r"position_ids: expected integers \[1 or 2, 5\], found torch.float32": {"position_ids": torch.zeros(2, 5)},
    r"position_ids: .*found torch.int64 \[5\]": {"position_ids": torch.arange(5)},
    "either inv_freq and position_ids, or cos and sin": {"cos": torch.zeros(2, 5, 8)},
    r"cos: expected \[1 or 2, 5, up to 8\]": {
        "inv_freq": None,
        "position_ids": None,
        "cos": torch.zeros(2, 5, 16),
        "sin": torch.zeros(2, 5, 16),
    },
    "sin: expected as many": {
        "inv_freq": None,
        "position_ids": None,
        "cos": torch.zeros(2, 5, 8),
        "sin": torch.zeros(2, 5, 4),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    q, k, _, how = arguments()
    with pytest.raises(RopeError, match=message):
        ops.rope(**({"q": q, "k": k, **how} | REFUSED[message]))


def test_refuses_another_device():
    # Through the dispatcher a meta tensor would choose the fake implementation.
    q, k, _, how = arguments()
    for name in ("inv_freq", "position_ids"):
        elsewhere = {"cos": None, "sin": None, **how, name: how[name].to("meta")}
        with pytest.raises(RopeError, match=f"{name}: expected on cpu as q, found on meta"):
            check(q, k, **elsewhere)


REFUSED_CACHES = {
    r"v: expected \[2, 2, 5, any\]": {"v": torch.zeros(2, 4, 5, 16)},
    "k_cache: expected": {"k_cache": torch.zeros(2, 2, 9, 8)},
    "v_cache: expected": {"v_cache": torch.zeros(2, 2, 8, 16)},
    "slots: expected int64": {"slots": torch.zeros(1, 5, dtype=torch.int32)},
    "found an expanded tensor": {"k_cache": torch.zeros(1, 2, 1, 16).expand(2, 2, 9, 16)},
}


@pytest.mark.parametrize("message", REFUSED_CACHES)
def test_refuses_caches(message):
    q, k, v, how = arguments()
    k_cache, v_cache = caches()
    given = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": torch.arange(5)[None], **how}
    with pytest.raises(RopeError, match=message):
        ops.rope_and_cache_(**(given | REFUSED_CACHES[message]))
