"""The operators of RMS normalization: transformers' own numbers, orders, gradients, compilation, refusals."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ropewalk.errors import UsageError
from ropewalk.norm.ops import add_rms_norm, check, rms_norm

ops = torch.ops.ropewalk
EPS = 1e-5


def arguments(dtype=torch.float32, k=48, order=False, shape=(2, 5)):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, k, generator=g).to(dtype) for _ in range(2))
    weight = (1 + 0.1 * torch.randn(k, generator=g)).to(dtype)
    return x, y, weight, torch.randperm(k, generator=g).int() if order else None


def llama(x, weight, order=None):
    """Return what transformers computes, then the channels that `order` names."""
    norm = LlamaRMSNorm(len(weight), eps=EPS).to(weight.dtype)
    norm.weight = torch.nn.Parameter(weight) if not isinstance(weight, torch.nn.Parameter) else weight
    normed = norm(x)
    return normed if order is None else normed[..., order.long()]


def assert_within_a_rounding(found, expected):
    """The mean may be summed in another order: by that a value may fall on the other side of a rounding, twice."""
    step = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6, torch.float32: 1e-6}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=step, atol=1e-6)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)])
def test_both_compute_llamas(dtype, order, shape):
    x, y, weight, order = arguments(dtype, order=order, shape=shape)
    kept = [t.clone() for t in (x, y, weight)]
    with torch.no_grad():
        normed, (total, normed_total) = rms_norm(x, weight, EPS, order), add_rms_norm(x, y, weight, EPS, order)
        assert torch.equal(total, x + y)
        for found, expected in ((normed, llama(x, weight, order)), (normed_total, llama(x + y, weight, order))):
            assert found.dtype == dtype
            assert_within_a_rounding(found, expected)
    for now, before in zip((x, y, weight), kept, strict=True):
        assert torch.equal(now, before)


def test_any_strides_give_the_same_bits_in_contiguous_results():
    x, y, weight, order = arguments(torch.bfloat16, order=True)
    expected = rms_norm(x, weight, EPS, order), *add_rms_norm(x, y, weight, EPS, order)
    wide = torch.full((2, 5, 2, 100), float("nan"), dtype=torch.bfloat16)
    wide[:, :, 1, 7:55] = x
    for strided in (wide[:, :, 1, 7:55], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert not strided.is_contiguous()
        found = rms_norm(strided, weight, EPS, order), *add_rms_norm(strided, y, weight, EPS, order)
        for a, b in zip(found, expected, strict=True):
            assert a.is_contiguous()
            assert torch.equal(a, b)


def test_numbers_too_large_and_no_numbers_stay_in_their_rows():
    x, y, weight, _ = arguments(torch.float16)
    x[0, 0, 3], y[0, 0, 3], x[1, 2, 0] = 60000, 60000, float("nan")
    total, normed = add_rms_norm(x, y, weight, EPS)
    assert total[0, 0, 3] == float("inf")
    expected = llama(x + y, weight).detach()
    assert torch.equal(normed.isnan(), expected.isnan())
    assert normed.isnan().any(-1).sum() == 2


@pytest.mark.parametrize("order", [False, True])
def test_the_functions_differentiate(order):
    x, y, weight, order = arguments(order=order)
    ours = [t.clone().requires_grad_() for t in (x, y, weight)]
    total, normed = add_rms_norm(*ours, EPS, order)
    theirs = [t.clone().requires_grad_() for t in (x, y)]
    parameter = torch.nn.Parameter(weight.clone())
    expected = llama(theirs[0] + theirs[1], parameter, order)
    (normed.sin().sum() + rms_norm(total, ours[2], EPS).cos().sum()).backward()
    (expected.sin().sum() + llama(theirs[0] + theirs[1], parameter).cos().sum()).backward()
    for a, b in zip(ours, (*theirs, parameter), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_operators_do_not():
    x, y, weight, _ = arguments()
    for trained in ((x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_())):
        with pytest.raises(UsageError, match="expected none that needs a gradient"):
            ops.rms_norm(*trained, EPS, None)
        with pytest.raises(UsageError, match="expected none that needs a gradient"):
            ops.add_rms_norm(trained[0], y, trained[1], EPS, None)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                assert torch.equal(ops.rms_norm(*trained, EPS, None), rms_norm(x, weight, EPS))
    # A frozen weight among layers that train, and the reverse.
    assert rms_norm(x.clone().requires_grad_(), weight, EPS).requires_grad


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(order, strided):
    x, y, weight, order = arguments(torch.float16, order=order)
    if strided:
        x = x.transpose(0, 1)
        y = y.transpose(0, 1)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS, order))
    torch.library.opcheck(ops.add_rms_norm.default, (x, y, weight, EPS, order))


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_whole(trained):
    x, y, weight, order = arguments(order=True)

    def step(x, y, weight):
        total, normed = add_rms_norm(x * 2, y, weight, EPS, order)
        return rms_norm(total + normed, weight, EPS).relu()

    plain, compiled = ([t.clone().requires_grad_(trained) for t in (x, y, weight)] for _ in range(2))
    expected = step(*plain)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    torch.testing.assert_close(found, expected)
    if trained:
        expected.sum().backward()
        found.sum().backward()
        for a, b in zip(plain, compiled, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_a_kernel_registered_for_the_cpu_takes_over():
    x, y, weight, order = arguments(order=True)
    expected = ops.rms_norm_in_torch(x, weight, EPS, order)
    with torch.library._scoped_library("ropewalk", "IMPL", "CPU") as library:
        # As C++ does: what it does not take goes on to plain torch.
        library.impl("rms_norm", lambda *args: ops.rms_norm_in_torch(*args) + 1, allow_override=True)
        library.impl("add_rms_norm", lambda *args: ops.add_rms_norm_in_torch(*args)[::-1], allow_override=True)
        assert torch.equal(rms_norm(x, weight, EPS, order), expected + 1)
        assert torch.equal(add_rms_norm(x, y, weight, EPS, order)[1], x + y)


REFUSED = {
    "x: expected float16, bfloat16 or float32, found torch.float64": {"x": torch.zeros(2, 5, 48).double()},
    r"x: expected \[..., K\]": {"x": torch.zeros(2, 0)},
    r"y: expected torch.float32 \[2, 5, 48\], found torch.float32 \[5, 48\]": {"y": torch.zeros(5, 48)},
    "y: expected torch.float32": {"y": torch.zeros(2, 5, 48).half()},
    r"weight: .* found torch.float32 \[47\]": {"weight": torch.zeros(47)},
    "weight: expected torch.float32": {"weight": torch.zeros(48).bfloat16()},
    "weight: expected one value after another in memory, found stride 2": {"weight": torch.zeros(96)[::2]},
    "order: expected torch.int32": {"order": torch.arange(48)},
    r"order: expected torch.int32 \[48\]": {"order": torch.arange(47).int()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    x, y, weight, order = arguments(order=True)
    with pytest.raises(UsageError, match=message):
        ops.add_rms_norm(**({"x": x, "y": y, "weight": weight, "eps": EPS, "order": order} | REFUSED[message]))


def test_refuses_another_device():
    # Through the dispatcher a meta tensor would choose the fake implementation.
    given = dict(zip(("x", "y", "weight", "order"), arguments(order=True), strict=True))
    for name in ("y", "weight", "order"):
        with pytest.raises(UsageError, match=f"{name}: expected on cpu as x, found on meta"):
            check(**(given | {name: given[name].to("meta")}))
