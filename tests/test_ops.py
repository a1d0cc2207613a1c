"""The operator ropewalk::gptq_linear: its result, gradient, fake implementation and compilation."""

import pytest
import torch

import ropewalk.gptq.ops  # noqa: F401
from ropewalk.gptq.format import BITS, dequantize, unpack
from ropewalk.gptq.layout import gate_and_up, row_order, to_execution
from ropewalk.gptq.rtn import quantize_rtn

K, N = 96, 64


def arguments(bits=4, group_size=32, sym=True, act_order=True, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(K, generator=generator) if act_order else None
    packed = quantize_rtn(
        torch.randn(N, K, generator=generator),
        bits=bits,
        group_size=group_size,
        sym=sym,
        order=order,
        checkpoint_format="gptq_v2",
    )
    return (
        torch.randn(2, 3, K, generator=generator).to(dtype),
        packed["qweight"],
        packed["scales"],
        None if sym else packed["qzeros"],
        packed["g_idx"] if act_order else None,
        torch.randn(N, generator=generator).half() if bias else None,
        bits,
        group_size,
    )


def exact(args):
    x, qweight, scales, qzeros, g_idx, bias, bits, group_size = args
    weight = dequantize(qweight, scales, qzeros, g_idx, bits=bits, group_size=group_size)
    y = x.double() @ weight.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_is_within_twice_torchs_own_error(bits, group_size, sym, dtype):
    args = arguments(bits, group_size, sym, dtype=dtype)
    x, qweight, scales, qzeros, g_idx, bias, *_ = args
    kept = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
    y = torch.ops.ropewalk.gptq_linear(*args)
    assert y.shape == (2, 3, N)
    assert y.dtype == dtype
    weight = dequantize(qweight, scales, qzeros, g_idx, bits=bits, group_size=group_size)
    torchs = torch.nn.functional.linear(x, weight.t().to(dtype), bias.to(dtype))
    expected = exact(args)
    allowed = 2 * (torchs.double() - expected).abs().max() + 1e-6
    assert (y.double() - expected).abs().max() <= allowed
    for before, after in zip(kept, args, strict=True):
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after)
    assert torch.equal(y, torch.ops.ropewalk.gptq_linear(*args))


def test_shapes_and_views():
    args = arguments(bias=False)
    whole = torch.ops.ropewalk.gptq_linear(*args)
    x = args[0]
    torch.testing.assert_close(torch.ops.ropewalk.gptq_linear(x[0, 0], *args[1:]), whole[0, 0], rtol=0, atol=1e-5)
    padded = torch.full((2, 3, K + 10), float("nan"))
    padded[..., 5:-5] = x
    torch.testing.assert_close(torch.ops.ropewalk.gptq_linear(padded[..., 5:-5], *args[1:]), whole, rtol=0, atol=1e-5)
    turned = x.transpose(0, 1)
    found = torch.ops.ropewalk.gptq_linear(turned, *args[1:]).transpose(0, 1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    assert torch.ops.ropewalk.gptq_linear(x[:0], *args[1:]).shape == (0, 3, N)


@pytest.mark.parametrize("sym", [True, False])
def test_opcheck(sym):
    args = arguments(sym=sym, bits=3)
    torch.library.opcheck(torch.ops.ropewalk.gptq_linear.default, args)
    torch.library.opcheck(torch.ops.ropewalk.gptq_linear.default, (args[0].requires_grad_(), *args[1:]))
    grad = torch.randn(2, 3, N)
    torch.library.opcheck(torch.ops.ropewalk.gptq_linear_grad.default, (grad, *args[1:5], *args[6:]))


@pytest.mark.parametrize("bits", BITS)
def test_gradient_is_that_of_the_dequantized_layer(bits):
    args = arguments(bits, sym=False)
    x, qweight, scales, qzeros, g_idx, bias, bits, group_size = args
    weight = dequantize(qweight, scales, qzeros, g_idx, bits=bits, group_size=group_size)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(2, 3, N)
    torch.ops.ropewalk.gptq_linear(ours, *args[1:]).backward(grad)
    (theirs @ weight + bias).backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


def test_compiles_whole_with_its_gradient():
    args = arguments()

    def step(x):
        return torch.ops.ropewalk.gptq_linear(torch.relu(x), *args[1:]).sum()

    plain, compiled = args[0].clone().requires_grad_(), args[0].clone().requires_grad_()
    step(plain).backward()
    torch.compile(step, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("act_order", [False, True])
def test_packed_linear_computes_what_gptq_linear_does(bits, act_order):
    args = arguments(bits, sym=False, act_order=act_order)
    x, qweight, scales, qzeros, g_idx, bias, bits, group_size = args
    order = row_order(g_idx, group_size)
    packed = (to_execution(qweight, bits, order), scales, unpack(qzeros, bits, dim=1), order, bias, bits, group_size)
    y = torch.ops.ropewalk.packed_linear(x, *packed)
    torch.testing.assert_close(y, torch.ops.ropewalk.gptq_linear(*args), rtol=0, atol=1e-6)
    torch.library.opcheck(torch.ops.ropewalk.packed_linear.default, (x.requires_grad_(), *packed))
    grad = torch.randn(2, 3, N)
    torch.library.opcheck(
        torch.ops.ropewalk.packed_linear_grad.default, (grad, *packed[:4], bits, group_size, x.shape[-1])
    )


@pytest.mark.parametrize("bits", BITS)
def test_gate_and_up_in_one(bits):
    x, qweight, scales, qzeros, g_idx, bias, bits, group_size = arguments(bits, sym=False)
    order = row_order(g_idx, group_size)
    packed = (to_execution(qweight, bits, order), scales, unpack(qzeros, bits, dim=1), order, bias, bits, group_size)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = torch.ops.ropewalk.packed_gate_up(ours, *packed)
    gate, up = gate_and_up(torch.ops.ropewalk.packed_linear(theirs, *packed))
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4)
    torch.library.opcheck(torch.ops.ropewalk.packed_gate_up.default, (x, *packed))
    torch.library.opcheck(torch.ops.ropewalk.packed_gate_up.default, (x.requires_grad_(), *packed))
