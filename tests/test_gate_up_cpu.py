"""`ropewalk::cpu_gate_up`, and experts' gates and ups: the product of `cpu_linear`, gated."""

import pytest
import torch

from ropewalk import cpu
from ropewalk.bench.peers.weight import random_weight
from ropewalk.gptq import cpu_layout, cpu_ops
from ropewalk.gptq.format import BITS
from ropewalk.gptq.layout import row_order

K, N = 256, 96  # of gate, and of up


@pytest.fixture(autouse=True)
def kernels(two_threads):
    if not cpu.load():
        pytest.skip(f"no kernels for the CPU: {cpu.status()['why']}")
    yield
    torch.ops.ropewalk.cpu_cap_level(torch.ops.ropewalk.cpu_levels()[0])


def both(bits, group_size, *, desc_act=True, sym=False, seed=0):
    """Return the arguments of gate and up side by side after x, up to group_size."""
    w = random_weight(K, 2 * N, bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, seed=seed)
    rows = cpu_layout.row_map(row_order(w.g_idx, group_size) if w.act_order else None, K, group_size)
    words = torch.ops.ropewalk.cpu_repack(w.qweight, rows, bits, cpu_layout.block_count(K, group_size))
    zeros = None if sym else cpu_layout.tile_columns(w.zeros())
    bias = torch.randn(2 * N, generator=torch.Generator().manual_seed(seed))
    return words, cpu_layout.scales_for_tiles(w.scales), zeros, rows, bias, bits, group_size


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_it_is_the_product_gated(bits, group_size, exact):
    arguments = both(bits, group_size, desc_act=group_size != 128, sym=group_size == 32)
    for m in (1, 2, 7, 29):
        x = torch.randn(m, K)
        product = cpu_ops.linear(x, *arguments, 2 * N, exact).double()
        expected = torch.nn.functional.silu(product[:, :N]) * product[:, N:]
        found = cpu_ops.gate_up(x, *arguments, 2 * N, exact)
        assert found.shape == (m, N)
        # The product is the same; silu, the multiplication and the rounding are within a few units of the last place.
        assert ((found.double() - expected).abs() <= 6e-7 * expected.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_of_16_bits_are_rounded_once(dtype):
    arguments = both(4, 32)
    x = torch.randn(5, K).to(dtype)
    exact = cpu_ops.gate_up(x.float(), *arguments, 2 * N, True)
    found = cpu_ops.gate_up(x, *arguments, 2 * N, True)
    assert found.dtype == dtype
    # 16 bits of activations are exact in two parts; what is left is the last rounding, which a tie may turn.
    assert (found.float() - exact.to(dtype).float()).abs().max() <= torch.finfo(dtype).eps * float(exact.abs().max())


def test_every_level_and_number_of_threads_computes_the_same_bits():
    arguments = both(4, 32)
    x = torch.randn(13, K)
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for level in torch.ops.ropewalk.cpu_levels():
            torch.ops.ropewalk.cpu_cap_level(level)
            found.append(cpu_ops.gate_up(x, *arguments, 2 * N, True))
    assert all(torch.equal(other, found[0]) for other in found[1:])
    rows = torch.cat([cpu_ops.gate_up(row[None], *arguments, 2 * N, True) for row in x])
    assert torch.equal(rows, found[0])


def test_extreme_values():
    arguments = both(4, 32)
    x = torch.randn(3, K)
    x[0] *= 1e4  # e^-x leaves what float32 holds on either side
    x[1, 7] = torch.inf
    x[2] = 0
    found = cpu_ops.gate_up(x, *arguments, 2 * N, True)
    product = cpu_ops.linear(x, *arguments, 2 * N, True)
    expected = torch.nn.functional.silu(product[:, :N].double()) * product[:, N:]
    assert ((found[0] - expected[0]).abs() <= 1e-6 * expected[0].abs() + 1e-25).all()
    assert found[1].isnan().all()
    torch.testing.assert_close(found[2].double(), expected[2])


def test_experts():
    """Gate and up of every expert in one stack, tiles of up after those of gate."""
    weights = [both(4, 32, seed=seed) for seed in range(3)]
    words, scales, zeros, rows, bias = (torch.stack([w[i] for w in weights]) for i in range(5))
    x = torch.randn(6, K)
    ids = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [0, 1], [3, 2]])  # 3 is nobody
    found = torch.ops.ropewalk.cpu_experts(
        x, words, scales, zeros, rows, bias, ids, None, 4, 32, 2 * N, True, gate_up=True
    )
    assert found.shape == (6, 2, N)
    for t, chosen in enumerate(ids.tolist()):
        for k, expert in enumerate(chosen):
            alone = cpu_ops.gate_up(x[t : t + 1], *weights[expert], 2 * N, True)[0] if expert < 3 else torch.zeros(N)
            assert torch.equal(found[t, k], alone)


def test_halves_that_are_no_whole_tiles():
    w = random_weight(K, 80, bits=4, group_size=32, desc_act=False)
    words = torch.ops.ropewalk.cpu_repack(w.qweight, None, 4, K // 32)
    scales = cpu_layout.scales_for_tiles(w.scales)
    with pytest.raises(RuntimeError, match="out_features: expected a multiple of 64 for gate and up, found 80"):
        cpu_ops.gate_up(torch.randn(1, K), words, scales, None, None, None, 4, 32, 80, True)


def test_opcheck():
    x = torch.randn(2, 3, K)
    torch.library.opcheck(
        torch.ops.ropewalk.cpu_gate_up.default,
        (x, *both(3, 32), 2 * N, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
