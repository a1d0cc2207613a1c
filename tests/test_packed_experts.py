"""PackedExperts: gate and up as one stack where each expert has them in one order, and as two where not."""

import pytest
import torch
from torch import nn

from ropewalk import cpu
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.experts import PackedExperts
from ropewalk.loader.quant_linear import QuantLinear

EXPERTS, HIDDEN, INNER, TOKENS = 3, 64, 96, 5


def layer(rows, columns, order, bias, seed, bits=4):
    generator = torch.Generator().manual_seed(seed)
    packed = quantize_rtn(
        torch.randn(columns, rows, generator=generator) / 8,
        bits=bits,
        group_size=32,
        sym=seed % 2 == 0,
        order=order,
        checkpoint_format="gptq",
    )
    made = QuantLinear(bits, 32, rows, columns, bias)
    if bias:
        packed["bias"] = torch.randn(columns, generator=generator).half()
    made.load_state_dict(packed)
    return made


def experts(orders, act_fn, bias=False, inner=INNER):
    """Return experts whose rows are in "no" order, the "same" for gate and up, or each in "another"."""
    made = []
    for e in range(EXPERTS):
        generator = torch.Generator().manual_seed(e)
        first, second, third = (torch.randperm(n, generator=generator) for n in (HIDDEN, HIDDEN, inner))
        gate, up, down = {
            "no": (None, None, None),
            "same": (first, first, third),
            "another": (first, second, third),
            "some": (first, first if e else None, third),
        }[orders]
        made.append(
            {
                "w1": layer(HIDDEN, inner, gate, bias and e == 1, 3 * e),
                "w3": layer(HIDDEN, inner, up, False, 3 * e + 1),
                "w2": layer(inner, HIDDEN, down, bias, 3 * e + 2),
            }
        )
    return PackedExperts(made, act_fn)


@pytest.mark.parametrize("layout", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("orders", "act_fn", "inner", "stacks"),
    [
        ("no", nn.SiLU(), INNER, 2),
        ("same", nn.SiLU(), INNER, 2),
        ("another", nn.SiLU(), INNER, 3),
        ("some", nn.SiLU(), INNER, 3),
        ("same", nn.GELU(), INNER, 3),
        ("same", nn.SiLU(), 80, None),  # on the CPU a tile is 32 columns
    ],
)
def test_gate_and_up(monkeypatch, layout, orders, act_fn, inner, stacks):
    if layout == "cpu" and not cpu.load():
        pytest.skip("needs the C++ kernels")
    monkeypatch.setattr(QuantLinear, "_best_layout", lambda self: layout)
    together, apart = (experts(orders, act_fn, bias=inner == INNER, inner=inner) for _ in range(2))
    saved = {name: tensor.clone() for name, tensor in together.state_dict().items()}
    for module in together.modules():
        if isinstance(module, QuantLinear):
            module.post_init()
    assert together.stack()
    assert len(together._stacks) == (stacks or (3 if layout == "cpu" else 2))
    apart._stackable = False
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :2]
    weights = torch.rand(TOKENS, 2, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(together(x, ids, weights), apart(x, ids, weights), rtol=1e-4, atol=1e-4)
    # Nothing is held twice, and each layer goes on as itself.
    first = together._stacks[0].words.untyped_storage().data_ptr()
    assert all(own.qweight.untyped_storage().data_ptr() == first for own in together.layers("w1"))
    if len(together._stacks) == 2:
        assert all(own.qweight.untyped_storage().data_ptr() == first for own in together.layers("w3"))
    for name, tensor in together.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    torch.testing.assert_close(together.layers("w3")[1](x), apart.layers("w3")[1](x), rtol=1e-4, atol=1e-4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    together(ours, ids, weights).square().sum().backward()
    apart(theirs, ids, weights).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
