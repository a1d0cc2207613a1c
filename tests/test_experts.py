"""The operator ropewalk::packed_experts on the CPU: result, gradients, fake implementation, compilation, errors."""

import pytest
import torch

import ropewalk.gptq.ops_experts  # noqa: F401
from ropewalk.errors import FormatError
from ropewalk.gptq.format import BITS, dequantize, unpack
from ropewalk.gptq.layout import row_order, to_execution
from ropewalk.gptq.rtn import quantize_rtn

EXPERTS, K, N, TOKENS, TOP_K = 4, 96, 32, 7, 2
op = torch.ops.ropewalk.packed_experts
grad_op = torch.ops.ropewalk.packed_experts_grad


def stack(bits=4, group_size=32, sym=False, act_order=True, bias=True, seed=0):
    """Return (words, scales, zeros, order, bias) of a stack and its weights, float32 [E, K, N]."""
    generator = torch.Generator().manual_seed(seed)
    parts, weights = [], []
    for _ in range(EXPERTS):
        packed = quantize_rtn(
            torch.randn(N, K, generator=generator),
            bits=bits,
            group_size=group_size,
            sym=sym,
            order=torch.randperm(K, generator=generator) if act_order else None,
            checkpoint_format="gptq_v2",
        )
        order = row_order(packed["g_idx"], group_size)
        if order is None:
            order = torch.arange(K, dtype=torch.int32)
        words = to_execution(packed["qweight"], bits, order)
        parts.append((words, packed["scales"], unpack(packed["qzeros"], bits, dim=1), order))
        settings = {"bits": bits, "group_size": group_size}
        weights.append(dequantize(packed["qweight"], packed["scales"], packed["qzeros"], packed["g_idx"], **settings))
    words, scales, zeros, order = (torch.stack(part) for part in zip(*parts, strict=True))
    biases = torch.randn(EXPERTS, N, generator=generator) if bias else None
    return (words, scales, None if sym else zeros, order if act_order else None, biases), torch.stack(weights)


def routing(seed=0):
    """Return ids with one of another rank on either side, and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    ids[1, 0], ids[2, 1] = -1, EXPERTS
    return ids, torch.rand(TOKENS, TOP_K, generator=generator)


def by_definition(x, weights, bias, ids, routing_weights):
    """Return the result differentiably, with every expert's weight whole."""
    here = (ids >= 0) & (ids < EXPERTS)
    known = ids.clamp(0, EXPERTS - 1)
    rows = x[:, None] if x.ndim == 2 else x
    y = (rows[:, :, None] @ weights[known].to(x.dtype))[:, :, 0]
    y = (y if bias is None else y + bias[known].to(x.dtype)) * here[..., None]
    return y if routing_weights is None else (y * routing_weights[..., None]).sum(1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_is_within_twice_torchs_own_error(bits, group_size, sym, dtype):
    arguments, weights = stack(bits, group_size, sym, act_order=not sym)
    ids, by = routing()
    for x in (torch.randn(TOKENS, K).to(dtype), torch.randn(TOKENS, TOP_K, K).to(dtype)):
        for routing_weights in (None, by.to(dtype)):
            kept = [None if t is None else t.clone() for t in (x, *arguments, ids, routing_weights)]
            y = op(x, *arguments, ids, routing_weights, bits, group_size)
            exact_weights = None if routing_weights is None else routing_weights.double()
            exact = by_definition(x.double(), weights, arguments[4], ids, exact_weights)
            torchs = by_definition(x, weights, arguments[4], ids, routing_weights)
            assert y.dtype == dtype and y.shape == exact.shape
            allowed = 2 * (torchs.double() - exact).abs().max() + 1e-5
            assert (y.double() - exact).abs().max() <= allowed
            assert torch.equal(y, op(x, *arguments, ids, routing_weights, bits, group_size))
            for before, after in zip(kept, (x, *arguments, ids, routing_weights), strict=True):
                assert before is None or torch.equal(before, after)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_are_those_of_the_dequantized_experts(bits, shared, weighted):
    arguments, weights = stack(bits)
    ids, by = routing()
    shape = (TOKENS, K) if shared else (TOKENS, TOP_K, K)
    ours, theirs = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    our_by, their_by = (by.clone().requires_grad_() if weighted else None for _ in range(2))
    y = op(ours, *arguments, ids, our_by, bits, 32)
    grad = torch.randn(y.shape)
    y.backward(grad)
    by_definition(theirs, weights, arguments[4], ids, their_by).backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4)
    if weighted:
        torch.testing.assert_close(our_by.grad, their_by.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck(sym, weighted):
    arguments, _ = stack(3, sym=sym, bias=not sym)
    ids, by = routing()
    x = torch.randn(TOKENS, K, requires_grad=True)
    routing_weights = by.requires_grad_() if weighted else None
    torch.library.opcheck(op.default, (x, *arguments, ids, routing_weights, 3, 32))
    torch.library.opcheck(op.default, (torch.randn(TOKENS, TOP_K, K), *arguments, ids, by.detach(), 3, 32))
    torch.library.opcheck(grad_op.default, (torch.randn(TOKENS, TOP_K, N), *arguments[:4], ids, 3, 32, K))


def test_a_layer_compiles_whole_with_its_gradient():
    """Gate and up for the token's experts, then down for each of them by the routing weights."""
    gate, _ = stack(4, seed=1)
    up, _ = stack(4, seed=2)
    down, _ = stack(4, seed=3)
    ids, by = routing()

    def layer(x, by):
        hidden = torch.nn.functional.silu(op(x, *gate, ids, None, 4, 32)) * op(x, *up, ids, None, 4, 32)
        wide = torch.cat((hidden, hidden, hidden), -1)  # down reads as many numbers as gate does
        return op(wide, *down, ids, by, 4, 32).sum()

    plain, compiled = (torch.ones(TOKENS, K).requires_grad_() for _ in range(2))
    plain_by, compiled_by = (by.clone().requires_grad_() for _ in range(2))
    layer(plain, plain_by).backward()
    torch.compile(layer, fullgraph=True)(compiled, compiled_by).backward()
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(compiled_by.grad, plain_by.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_gate_and_up_in_one(bits, shared):
    """The same as two products, with the same gradient; gate and up have one order, none here."""
    (gate, _), (up, _) = (stack(bits, act_order=False, seed=seed) for seed in (1, 2))
    both = [None if g is None else torch.stack((g, u), 1) for g, u in zip(gate, up, strict=True)]
    ids, _ = routing()
    ours, theirs = (torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    if not shared:
        ours, theirs = (x[:, None].repeat(1, TOP_K, 1) for x in (ours, theirs))
    ours.requires_grad_()
    theirs.requires_grad_()
    y = op(ours, *both, ids, None, bits, 32, gate_up=True)
    expected = torch.nn.functional.silu(op(theirs, *gate, ids, None, bits, 32)) * op(theirs, *up, ids, None, bits, 32)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4)
    torch.library.opcheck(op.default, (ours, *both, ids, None, bits, 32, True))
    with pytest.raises(FormatError, match="routing_weights: expected none with gate and up"):
        op(ours, *both, ids, torch.ones(TOKENS, TOP_K), bits, 32, gate_up=True)
    with pytest.raises(FormatError, match=r"words, expert_ids and x: expected 4, 2 and 2 or 3 dimensions"):
        op(ours, *gate, ids, None, bits, 32, gate_up=True)


def test_no_tokens_and_weights_that_do_not_count():
    arguments, _ = stack()
    ids, by = routing()
    x = torch.randn(TOKENS, K)
    assert op(x[:0], *arguments, ids[:0], None, 4, 32).shape == (0, TOP_K, N)
    assert op(x[:0], *arguments, ids[:0], by[:0], 4, 32).shape == (0, N)
    odd = torch.where((ids >= 0) & (ids < EXPERTS), by, float("nan"))
    assert torch.equal(op(x, *arguments, ids, odd, 4, 32), op(x, *arguments, ids, by, 4, 32))
    assert (op(x, *arguments, torch.full_like(ids, -1), None, 4, 32) == 0).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t[:, None].expand(-1, 3, -1)),
        ("words", lambda t: t[:, 1:]),
        ("words", lambda t: t.long()),
        ("scales", lambda t: t[:, :1]),
        ("scales", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        ("zeros", lambda t: t[:1]),
        ("zeros", lambda t: t.int()),
        ("order", lambda t: t[:, 1:]),
        ("order", lambda t: t.long()),
        ("bias", lambda t: t[0]),
        ("expert_ids", lambda t: t[1:]),
        ("expert_ids", lambda t: t.float()),
        ("routing_weights", lambda t: t[:, :1]),
        ("words", lambda t: t[0]),
    ],
)
def test_arguments_that_do_not_belong_together_are_named(name, change):
    arguments, _ = stack()
    ids, by = routing()
    names = ("x", "words", "scales", "zeros", "order", "bias", "expert_ids", "routing_weights")
    given = dict(zip(names, (torch.randn(TOKENS, K), *arguments, ids, by), strict=True))
    given[name] = change(given[name])
    with pytest.raises(FormatError, match=name):
        op(*given.values(), 4, 32)
