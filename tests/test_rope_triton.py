"""The Triton kernel of the rotary embedding, interpreted on the CPU or on a GPU, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from ropewalk.errors import RopeError
from ropewalk.rope import inverse_frequencies, ops, triton_rope
from ropewalk.rope.reference import cos_sin, rotate, rotate_by_tables
from ropewalk.rope.triton_rope import launch

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NAN = float("nan")


def inputs(device, dtype=torch.float32, batch=2, heads=4, kv_heads=2, seq=5, head_dim=16):
    """Return q, k and v as attention has them, transposed views of [batch, seq, heads, dim], and positions."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, seq, n, head_dim, generator=g).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    # Left padding, repeats, any order, and positions far out.
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [9, 3, 16383, 5, 5, 0, 100]]).repeat(batch, 3)[:batch, :seq]
    return *(x.transpose(1, 2) for x in (q, k, v)), positions.to(device)


def frequencies(dim, device):
    return inverse_frequencies("partial-ntk", dim=dim, factor=4, original_max_position_embeddings=4096)[0].to(device)


def poisoned(x):
    return torch.empty_like(x).fill_(NAN)


def turned(q, k, **arguments):
    """Return what the kernel writes into tensors full of NaN, having seen that it changes nothing else.

    The interpreter cuts float32 off to bfloat16 where hardware rounds; there torch rounds the result.
    """
    kept = q.clone(), k.clone()
    by_torch = q.device.type == "cpu" and q.dtype == torch.bfloat16
    out = tuple(poisoned(x.float() if by_torch else x) for x in (q, k))
    launch(q, k, *out, **arguments)
    assert torch.equal(q, kept[0])
    assert torch.equal(k, kept[1])
    return tuple(x.to(q.dtype) for x in out)


def exact(x, inv_freq, positions, scaling=1.0, **layout):
    angles = (positions[..., None].float() * inv_freq).double()[:, None]
    return rotate(x.double(), angles.cos() * scaling, angles.sin() * scaling, **layout)


def torchs(x, inv_freq, positions, scaling=1.0, *, interleaved=False):
    """What transformers does: everything in x's dtype."""
    cos, sin = (t[:, None].to(x.dtype) for t in cos_sin(inv_freq, positions, scaling))
    dim = 2 * inv_freq.shape[0]
    a, b = (x[..., 0:dim:2], x[..., 1:dim:2]) if interleaved else x[..., :dim].chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), x[..., dim:]), -1)


def assert_within_twice_torchs_error(found, expected, in_dtype):
    allowed = 2 * (in_dtype.double() - expected).abs().max() + 1e-6
    assert found.dtype == in_dtype.dtype
    assert not found.isnan().any()
    assert (found.double() - expected).abs().max() <= allowed


def assert_same(found, expected):
    """Equal but for the last place of the dtype: a GPU fuses a multiply-add, the interpreter cuts bfloat16 off."""
    step = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 5e-7}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=step, atol=step)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "dim"), [(16, 16), (16, 8), (20, 12)])
def test_rotates_within_twice_torchs_own_error(device, interleaved, dtype, head_dim, dim):
    q, k, _, positions = inputs(device, dtype, head_dim=head_dim)
    inv_freq = frequencies(dim, device)
    layout = {"interleaved": interleaved}
    out = turned(q, k, inv_freq=inv_freq, position_ids=positions, attention_scaling=1.25, **layout)
    for x, found in zip((q, k), out, strict=True):
        expected = exact(x, inv_freq, positions, 1.25, **layout)
        assert_within_twice_torchs_error(found, expected, torchs(x, inv_freq, positions, 1.25, **layout))
        assert torch.equal(found[..., dim:], x[..., dim:])
    launch(q, k, q, k, inv_freq, positions, attention_scaling=1.25, **layout)
    assert_same(q, out[0])
    assert_same(k, out[1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_the_gradient(device, interleaved, dtype):
    grad_q, grad_k, _, positions = inputs(device, dtype)
    inv_freq = frequencies(8, device)
    layout = {"interleaved": interleaved}
    found = turned(grad_q, grad_k, inv_freq=inv_freq, position_ids=positions, inverse=True, **layout)
    for grad, ours in zip((grad_q, grad_k), found, strict=True):
        x = torch.zeros_like(grad, dtype=torch.float64).requires_grad_()
        exact(x, inv_freq, positions, **layout).backward(grad.double())
        assert_within_twice_torchs_error(ours, x.grad, torchs(grad, -inv_freq, positions, **layout))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tables(device, interleaved, inverse):
    q, k, _, positions = inputs(device)
    inv_freq = frequencies(12, device)
    cos, sin = cos_sin(inv_freq, positions)
    how = {"interleaved": interleaved, "inverse": inverse}
    by_angle = turned(q, k, inv_freq=inv_freq, position_ids=positions, **how)
    by_table = turned(q, k, cos=cos, sin=sin, **how)
    for found, expected in zip(by_table, by_angle, strict=True):
        assert_same(found, expected)
    # Both channels of a pair with entries of their own, in views of something larger, for a batch of one.
    cos, sin = torch.randn(2, 1, 5, 24, device=device).half()[..., 3:15].unflatten(-1, (2, 6))
    for x, found in zip((q, k), turned(q, k, cos=cos, sin=sin, attention_scaling=0.5, **how), strict=True):
        assert_same(found, rotate_by_tables(x, cos.float() / 2, sin.float() / 2, **how))


@pytest.mark.parametrize(("tile", "programs"), [(64, 1), (16, 3), (8, 1000)])
def test_every_way_of_sharing_out_the_work(device, monkeypatch, tile, programs):
    q, k, v, positions = inputs(device, heads=5, kv_heads=3)
    inv_freq = frequencies(16, device)
    expected = turned(q, k, inv_freq=inv_freq, position_ids=positions)
    monkeypatch.setattr(triton_rope, "TILE", tile)
    monkeypatch.setattr(triton_rope, "PROGRAMS", programs)
    out = poisoned(q), poisoned(k)
    caches = torch.full((2, 2, 3, 9, 16), NAN, device=device)
    slots = torch.tensor([[4, 0, 8, 2, 1]], device=device)
    launch(q, k, *out, inv_freq, positions, v=v, k_cache=caches[0], v_cache=caches[1], slots=slots)
    for found, wanted in zip(out, expected, strict=True):
        assert_same(found, wanted)
    assert torch.equal(caches[0][:, :, slots[0]], out[1])
    assert torch.equal(caches[1][:, :, slots[0]], v)
    assert caches[:, :, :, [3, 5, 6, 7]].isnan().all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2), (1, 1, 1, 1, 8), (3, 1, 1, 1, 16), (1, 7, 7, 3, 6), (2, 8, 1, 1, 80)]
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_odd_shapes(device, shape, interleaved):
    batch, heads, kv_heads, seq, head_dim = shape
    q, k, _, positions = inputs(device, torch.float16, batch, heads, kv_heads, seq, head_dim)
    inv_freq = frequencies(head_dim, device) if head_dim > 2 else torch.ones(1, device=device)
    out = turned(q, k, inv_freq=inv_freq, position_ids=positions, interleaved=interleaved)
    for x, found in zip((q, k), out, strict=True):
        assert_same(found, exact(x, inv_freq, positions, interleaved=interleaved).to(x.dtype))
    launch(q, k, q, k, inv_freq, positions, interleaved=interleaved)
    assert_same(q, out[0])
    nothing = q[:, :, :0]
    launch(nothing, k[:, :, :0], nothing, k[:, :, :0], inv_freq, positions[:, :0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_strides_and_nothing_around_them(device, interleaved):
    """Slices of one fused projection, channels apart and backwards in memory, into views of poisoned tensors."""
    q, k, _, positions = inputs(device)
    inv_freq = frequencies(12, device)
    expected = turned(q, k, inv_freq=inv_freq, position_ids=positions, interleaved=interleaved)
    fused = torch.full((5, 2, 3, 2 * 16, 7), NAN, device=device)
    apart_q = fused[:, :, 1, 1::2, 1:5].permute(1, 3, 0, 2)
    apart_k = fused[:, :, 2, 0::2, 5:7].permute(1, 3, 0, 2)
    apart_q.copy_(q)
    apart_k.copy_(k)
    around = fused.clone()
    out = poisoned(q), poisoned(k)
    launch(apart_q, apart_k, *out, inv_freq, positions[:, :], interleaved=interleaved)
    for found, wanted in zip(out, expected, strict=True):
        assert_same(found, wanted)
    torch.testing.assert_close(fused, around, rtol=0, atol=0, equal_nan=True)
    launch(apart_q, apart_k, apart_q, apart_k, inv_freq, positions, interleaved=interleaved)
    assert_same(apart_q, out[0])
    assert_same(apart_k, out[1])
    apart_q.copy_(q)
    apart_k.copy_(k)
    torch.testing.assert_close(fused, around, rtol=0, atol=0, equal_nan=True)
    # Position ids and slots with strides of their own, and one row of positions for all of the batch.
    strided = torch.stack((positions, positions + 7), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    launch(q, k, *out, inv_freq, strided, interleaved=interleaved)
    assert_same(out[0], expected[0])
    launch(q, k, *out, inv_freq, positions[1:], interleaved=interleaved)
    assert_same(out[0][1], expected[0][1])
    assert_same(out[0][0], exact(q, inv_freq, positions[1:], interleaved=interleaved)[0].float())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache(device, interleaved, dtype):
    """A static cache with a row for each of the batch; keys rotated in part; values of another size."""
    q, k, _, positions = inputs(device, dtype)
    v = torch.randn(2, 5, 2, 11, device=device).to(dtype).transpose(1, 2)
    inv_freq = frequencies(8, device)
    arguments = {"inv_freq": inv_freq, "position_ids": positions, "interleaved": interleaved}
    expected_q, expected_k = turned(q, k, **arguments)
    k_cache = torch.full((2, 2, 12, 16), NAN, dtype=dtype, device=device)
    v_cache = torch.full((2, 12, 2, 11), NAN, dtype=dtype, device=device).transpose(1, 2)
    # Padding, out of range on both sides, and any order.
    slots = torch.tensor([[-1, -1, 3, 11, 0], [12, 7, 6, 2**40, 5]], device=device)
    launch(q, k, q, k, **arguments, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    assert_same(q, expected_q)
    assert_same(k, expected_k)
    for cache, x in ((k_cache, k), (v_cache, v)):
        wanted = torch.full_like(cache, NAN)
        for row, slot in enumerate(slots.tolist()):
            for token, place in enumerate(slot):
                if 0 <= place < 12:
                    wanted[row, :, place] = x[row, :, token]
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


def test_paged_cache_of_another_dtype(device):
    """A cache [slots, heads, dim] that all of the batch writes into."""
    q, k, v, positions = inputs(device)
    inv_freq = frequencies(16, device)
    pages = torch.full((2, 20, 2, 16), NAN, dtype=torch.float16, device=device)
    k_cache, v_cache = (t.transpose(0, 1)[None] for t in pages)
    slots = torch.tensor([[19, 3, -1, 0, 7], [1, 2, 4, 12, 11]], device=device)
    launch(q, k, q, k, inv_freq, positions, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    for page, x in zip(pages, (k, v), strict=True):
        wanted = torch.full_like(page, NAN)
        kept = slots >= 0
        wanted[slots[kept]] = x.transpose(1, 2)[kept].half()
        torch.testing.assert_close(page, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_operators_launch_it(device):
    """What the operators run on a GPU; the interpreter's tensors lie on the CPU, so there it is called directly."""
    q, k, v, positions = inputs(device, torch.float16)
    how = {"inv_freq": frequencies(8, device), "position_ids": positions, "interleaved": True}
    expected = turned(q, k, **how)
    on_gpu = device == "cuda"
    rope = torch.ops.ropewalk.rope if on_gpu else ops.rope_on_gpu
    rope_ = torch.ops.ropewalk.rope_ if on_gpu else ops.rope_on_gpu_
    rope_and_cache_ = torch.ops.ropewalk.rope_and_cache_ if on_gpu else ops.rope_and_cache_on_gpu_
    for found, wanted in zip(rope(q, k, **how), expected, strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()
    in_place, cached = (q.clone(), k.clone()), (q.clone(), k.clone())
    rope_(*in_place, **how)
    k_cache, v_cache = torch.full((2, 1, 2, 5, 16), NAN, dtype=q.dtype, device=device)
    slots = torch.tensor([[0, 1, 2, 3, 4], [-1] * 5], device=device)
    rope_and_cache_(*cached, v, k_cache, v_cache, slots, **how)
    for results in (in_place, cached):
        for found, wanted in zip(results, expected, strict=True):
            assert_same(found, wanted)
    assert torch.equal(k_cache[0], cached[1][0])
    assert torch.equal(v_cache[0], v[0])
    with pytest.raises(RopeError, match=r"one dtype of .* found torch\.float64"):
        rope(q.double(), k.double(), **how)


def test_gradient_compilation_and_graphs_on_a_gpu(device):
    if device != "cuda":
        pytest.skip("the dispatcher chooses by device")
    q, k, v, positions = inputs(device, torch.float16)
    how = {"inv_freq": frequencies(16, device), "position_ids": positions}

    def step(q, k):
        a, b = torch.ops.ropewalk.rope(q * 2, k * 2, **how)
        return a.square().float().sum() + b.float().sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x, y = q.clone().requires_grad_(), k.clone().requires_grad_()
        function(x, y).backward()
        grads.append((x.grad, y.grad))
    for plain, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grads[0][0].float(), 8 * q.float(), rtol=1e-2, atol=1e-2)

    static_q, static_k = q.clone(), k.clone()
    caches = torch.zeros(2, 2, 2, 9, 16, dtype=q.dtype, device=device)
    slots = torch.tensor([[8, 0, 1, 5, 2]], device=device)
    torch.ops.ropewalk.rope_and_cache_(static_q, static_k, v, *caches, slots, **how)
    expected = static_q.clone(), static_k.clone(), caches.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.ropewalk.rope_and_cache_(static_q, static_k, v, *caches, slots, **how)
    static_q.copy_(q)
    static_k.copy_(k)
    caches.zero_()
    graph.replay()
    for found, wanted in zip((static_q, static_k, caches), expected, strict=True):
        assert torch.equal(found, wanted)


@triton.jit
def cos_sin_kernel(angles, cos, sin, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, s = triton_rope.cos_sin(tl.load(angles + i))
    tl.store(cos + i, c)
    tl.store(sin + i, s)


def test_cosine_and_sine_of_every_size_of_angle(device):
    # The interpreter does not fuse a multiply-add, so it is accurate over the shorter range alone.
    largest = 1e5 if device == "cpu" else 1e6
    g = torch.Generator().manual_seed(0)
    angles = torch.cat(
        (
            torch.logspace(-8, torch.tensor(largest).log10().item(), 8192 - 300),
            torch.arange(100) * torch.pi / 4,
            torch.arange(10, 110) * -torch.pi / 2,
            torch.rand(100, generator=g) * largest,
        )
    ).to(device)
    cos, sin = poisoned(angles), poisoned(angles)
    cos_sin_kernel[(1,)](angles, cos, sin, BLOCK=8192)
    assert (cos.double() - angles.double().cos()).abs().max() < 1.3e-7
    assert (sin.double() - angles.double().sin()).abs().max() < 1.3e-7


def test_offsets_past_2_to_the_31(device, monkeypatch):
    """The third row of a batch begins past 2 ** 31 elements while its stride fits into 32 bits. On the CPU the
    memory between is reserved but never touched.
    """
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 2**33:
        pytest.skip("needs 8 GiB of GPU memory")
    # The interpreter ends by copying every storage onto itself, all 4 GiB of it.
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, *_: self)
    apart = 2**30 + 8
    far = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    q = far.as_strided((3, 1, 1, 16), (apart, 16, 16, 1))
    near_q, k, v, positions = inputs(device, torch.float16, batch=3, heads=1, kv_heads=1, seq=1)
    q.copy_(near_q)
    cache = far[32:].as_strided((3, 1, 1, 16), (apart, 16, 16, 1))
    slots = torch.zeros(1, 1, dtype=torch.int64, device=device)
    inv_freq = frequencies(16, device)
    expected = turned(near_q, k, inv_freq=inv_freq, position_ids=positions)
    launch(q, k, q, k, inv_freq, positions, v=v, k_cache=torch.empty_like(k), v_cache=cache, slots=slots)
    assert_same(q, expected[0])
    assert torch.equal(cache, v)


def test_twice_gives_the_same_bits(device):
    q, k, _, positions = inputs(device, torch.float16)
    inv_freq = frequencies(16, device)
    once, again = (turned(q, k, inv_freq=inv_freq, position_ids=positions) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
