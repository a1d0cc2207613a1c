"""The Triton kernels of packed linear layers, on a GPU or through Triton's interpreter."""

import itertools

import pytest
import torch
import triton.language as tl

import ropewalk.gptq.ops  # noqa: F401
from ropewalk.gptq import few_tokens, reference
from ropewalk.gptq.format import BITS, pack, unpack
from ropewalk.gptq.layout import PLANE, WORDS, gate_and_up, rows_per_block, to_execution
from ropewalk.gptq.layout import row_order as order_of
from ropewalk.gptq.plans import Plan, device_plans, read_plans, split_k
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.gptq.triton_dequantize import dequantize
from ropewalk.gptq.triton_linear import packed_linear
from ropewalk.gptq.triton_matmul import matmul_kernel

# 11 planes are no whole number of blocks at any width, and with groups of 64 and 128 the last one is ragged.
K, N = 11 * PLANE, 96
TOKENS = (1, 2, 3, 5, 8, 16, 17, 33)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DECODE = Plan(None, "decode", block_n=64)
MATMUL = Plan(None, "matmul", block_m=16, block_n=64)
PLANS = (DECODE, MATMUL, Plan(None, "matmul", block_m=16, block_n=64, gather=True), Plan(None, "dense"))


@pytest.fixture(autouse=True)
def seeded():
    """The rule compares two largest errors; of few numbers drawn anew each time, one run in many would break it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill what the launchers allocate with NaN, so that an element nobody writes shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)


def layer(device, bits, group_size, *, act_order, sym, bias=False, seed=0, rows=K, columns=N):
    """Return (words, scales, zeros, order, bias) and the weight in float32."""
    generator = torch.Generator().manual_seed(seed)
    packed = quantize_rtn(
        torch.randn(columns, rows, generator=generator),
        bits=bits,
        group_size=group_size,
        sym=sym,
        order=torch.randperm(rows, generator=generator) if act_order else None,
        checkpoint_format="gptq_v2",
    )
    order = order_of(packed["g_idx"], group_size)
    arguments = (
        to_execution(packed["qweight"], bits, order),
        packed["scales"],
        None if sym else unpack(packed["qzeros"], bits, dim=1),
        order,
        torch.randn(columns, generator=generator).half() if bias else None,
    )
    weight = reference.dequantize(
        packed["qweight"], packed["scales"], packed["qzeros"], packed["g_idx"], bits=bits, group_size=group_size
    )
    return tuple(None if t is None else t.to(device) for t in arguments), weight.to(device)


def check(y, x, weight, bias):
    """The rule: the largest error is at most twice that of torch in the same dtype."""
    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
    torchs = torch.nn.functional.linear(x, weight.t().to(x.dtype), None if bias is None else bias.to(x.dtype))
    # In float32 torch may be exact to the last place by luck; that of the sum of magnitudes is always allowed.
    floor = 2**-23 * (x.double().abs() @ weight.double().abs()).max()
    allowed = 2 * (torchs.double() - exact).abs().max() + floor
    error = (y.double() - exact).abs().max()
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"


# Every width with every group size, with and without act-order, symmetric and not; over these the numbers of
# tokens and the dtypes are dealt out so that each meets each plan and each width.
CASES = [
    (*case, TOKENS[(3 * i + i // 8) % len(TOKENS)], DTYPES[(i + i // 3) % 3])
    for i, case in enumerate(itertools.product(BITS, (-1, 32, 64, 128, 512), (False, True), (True, False)))
]


@pytest.mark.parametrize(("bits", "group_size", "act_order", "sym", "tokens", "dtype"), CASES)
def test_every_kind_of_layer_on_every_plan(device, bits, group_size, act_order, sym, tokens, dtype):
    bias = (bits + tokens) % 2 == 0
    arguments, weight = layer(device, bits, group_size, act_order=act_order, sym=sym, bias=bias)
    x = torch.randn(tokens, K, device=device).to(dtype)
    before = [x.clone(), *(None if t is None else t.clone() for t in arguments)]
    for plan in PLANS:
        if plan.kernel == "decode" and tokens > 8:
            continue
        for split in (1, 2) if plan in (DECODE, MATMUL) else (1,):
            y = packed_linear(x, *arguments, bits=bits, group_size=group_size, plan=plan, split=split)
            assert y.dtype == dtype
            check(y, x, weight, arguments[4])
    for old, new in zip(before, (x, *arguments), strict=True):
        assert old is None or torch.equal(old, new)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_tokens_by_the_plan_of_the_device(device, bits, tokens):
    arguments, weight = layer(device, bits, 32, act_order=True, sym=False)
    x = torch.randn(tokens, K, device=device, dtype=torch.float16)
    y = packed_linear(x, *arguments, bits=bits, group_size=32)
    check(y, x, weight, None)
    assert torch.equal(y, packed_linear(x, *arguments, bits=bits, group_size=32))  # bit-equal from run to run
    check(packed_linear(x.float(), *arguments, bits=bits, group_size=32), x.float(), weight, None)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("plan", [DECODE, MATMUL], ids=lambda plan: plan.kernel)
def test_one_plane_one_column_word(device, bits, plan):
    """The smallest layers: all but a corner of the only block is padding."""
    rows, columns = 32, 32
    arguments, weight = layer(device, bits, 32, act_order=False, sym=False, rows=rows, columns=columns)
    x = torch.randn(1, rows, device=device)
    check(packed_linear(x, *arguments, bits=bits, group_size=32, plan=plan, split=1), x, weight, None)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kernel}-{plan.gather}")
def test_views_leading_dimensions_and_none_at_all(device, plan):
    arguments, weight = layer(device, 4, 32, act_order=True, sym=True)
    wide = torch.full((2, 3, K + 16), float("nan"), device=device)
    wide[..., 8:-8] = torch.randn(2, 3, K, device=device)
    x = wide[..., 8:-8]
    y = packed_linear(x, *arguments, bits=4, group_size=32, plan=plan)
    assert y.shape == (2, 3, N)
    check(y, x, weight, None)
    turned = x.transpose(0, 1)
    check(packed_linear(turned, *arguments, bits=4, group_size=32, plan=plan), turned, weight, None)
    strided = torch.randn(K, 5, device=device).t()
    check(packed_linear(strided, *arguments, bits=4, group_size=32, plan=plan), strided, weight, None)
    assert packed_linear(x[:0], *arguments, bits=4, group_size=32, plan=plan).shape == (0, 3, N)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("tokens", "dtype", "columns"),
    [(1, torch.float16, 72), (5, torch.float32, 68), (17, torch.bfloat16, 72)],
)
def test_gate_and_up_in_one(device, bits, tokens, dtype, columns):
    """72 columns each are no whole number of programs; 68 end in runs of 4."""
    if bits in (2, 3):  # whose zero points come by 16 and by 32
        columns = 80
    (words, scales, zeros, order, bias), weight = layer(
        device, bits, 64, act_order=True, sym=False, bias=True, columns=2 * columns
    )
    x = torch.randn(tokens, K, device=device).to(dtype) / 8
    gate, up = gate_and_up(x.double() @ weight.double() + bias.double())
    exact = torch.nn.functional.silu(gate) * up
    torchs = reference.gated(torch.nn.functional.linear(x, weight.t().to(dtype), bias.to(dtype)))
    allowed = 2 * (torchs.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    settings = {"bits": bits, "group_size": 64, "gate_up": True}
    for plan in PLANS:
        if plan.kernel == "decode" and tokens > 8:
            continue
        for split in (1, 2):
            y = packed_linear(x, words, scales, zeros, order, bias, plan=plan, split=split, **settings)
            assert y.shape == (tokens, words.shape[1] // 2)
            assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("gate_up", [False, True])
def test_what_the_kernel_in_cuda_returns_is_added_and_gated(device, monkeypatch, split, gate_up):
    """Its place is taken by plain torch here: test_few_tokens.py has the kernel itself."""
    arguments, weight = layer(device, 4, 64, act_order=True, sym=False, bias=True)
    x = torch.randn(2, 3, K, device=device).half() / 8

    def stand_in(rows, words, scales, zeros, order, bias, *, split, gate_up, tiles, warps, stages, **packing):
        assert (tiles, warps, stages) == (2, 8, 4)
        y = rows.float() @ weight
        if split > 1:
            return torch.stack((0.25 * y, 0.75 * y))
        y += bias.float()
        return (reference.gated(y) if gate_up else y).to(rows.dtype)

    monkeypatch.setattr(few_tokens, "few_tokens", stand_in)
    plan = Plan(32, "cuda", block_n=32, num_warps=8, num_stages=4)
    settings = {"bits": 4, "group_size": 64, "plan": plan, "split": split, "gate_up": gate_up}
    y = packed_linear(x, *arguments, **settings)
    expected = x.float() @ weight + arguments[4].float()
    expected = reference.gated(expected) if gate_up else expected
    torch.testing.assert_close(y, expected.half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_dequantized_weight_is_exact(device, bits, group_size):
    (words, scales, zeros, order, _), weight = layer(device, bits, group_size, act_order=True, sym=False)
    settings = {"bits": bits, "group_size": group_size, "in_features": K}
    assert torch.equal(dequantize(words, scales, zeros, order, dtype=torch.float32, **settings), weight)
    half = dequantize(words, scales, zeros, order, dtype=torch.float16, **settings)
    assert torch.equal(half, weight.half())
    assert torch.equal(reference.packed_weight(words, scales, zeros, order, **settings), weight)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_with_every_zero_point(device, bits):
    """Unpacking is exact: each code less each zero point, met by a single activation of 1."""
    values = 1 << bits
    columns = max(values, 32)
    codes = (torch.arange(PLANE)[:, None] + torch.arange(columns)) % values
    zero = torch.arange(columns) % values
    for shift in range(1, values, max(values // 16, 1)):
        shifted = (zero + shift) % values
        words = to_execution(pack(codes, bits), bits).to(device)
        scales = torch.ones(1, columns, dtype=torch.float16, device=device)
        zeros = shifted.to(torch.uint8)[None].to(device)
        x = torch.eye(PLANE, device=device, dtype=torch.float16)[:8]
        expected = (codes - shifted)[:8].to(device).half()
        for plan in (DECODE, Plan(None, "matmul", block_m=8, block_n=64)):
            y = packed_linear(x, words, scales, zeros, None, None, bits=bits, group_size=-1, plan=plan, split=1)
            assert torch.equal(y, expected)


def test_offsets_past_two_to_the_31(device):
    """A block of words, a row of activations and a row of results, each beyond 2 ** 31 elements from its base."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    far = 1 << 31
    columns, block_n = far // WORDS, 32  # the second block of words begins at 2 ** 31
    rows = 2 * rows_per_block(4)
    # Untouched pages of these cost nothing on the CPU.
    words = torch.zeros(far + block_n * WORDS, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, block_n), generator=generator)
    blocks = to_execution(pack(codes, 4), 4).reshape(2, -1)
    words[: blocks.shape[1]] = blocks[0].to(device)
    words[far:] = blocks[1].to(device)
    x = torch.zeros(far + rows, dtype=torch.float16, device=device)
    row = torch.randn(2, rows, generator=generator).half()
    x[:rows], x[far:] = row[0].to(device), row[1].to(device)
    scales = torch.ones(1, block_n, dtype=torch.float16, device=device)
    out = torch.zeros(columns + block_n, dtype=torch.float16, device=device)  # row 1 begins after `columns`
    constants = {"BITS": 4, "GROUP": 0, "HAS_ZEROS": False, "HAS_ORDER": False, "HAS_BIAS": False}
    matmul_kernel[(1, 1, 1)](
        x,
        words,
        words,
        scales,
        scales,
        scales,
        scales,
        out,
        2,
        columns,
        rows,
        far,
        **constants,
        BLOCK_M=16,
        BLOCK_N=block_n,
        WORDS=WORDS,
        PLANES=rows_per_block(4) // PLANE,
        SPLIT_K=1,
        DTYPE=tl.float16,
    )
    exact = row.double() @ (codes.double() - 8)
    found = torch.stack((out[:block_n], out[columns:])).double().cpu()
    assert (found - exact).abs().max() <= 2 * (exact.half().double() - exact).abs().max()


def test_plans():
    plans, _ = device_plans(torch.device("cpu"))
    assert plans.choose(1, 4).kernel == "matmul"
    assert plans.choose(100_000, 3).kernel == "dense"
    assert read_plans("sm_75").choose(1, 4).kernel == "decode"
    assert read_plans("no such device") is None
    assert split_k(1, 4096, 4, 100) == 16
    assert split_k(1, 256, 4, 100) == 2
    assert split_k(100, 4096, 4, 100) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    """What only a GPU can show."""

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("tokens", [1, 16, 64, 600])
    def test_graph(self, device, bits, tokens):
        arguments, weight = layer(device, bits, 32, act_order=True, sym=False)
        x = torch.randn(tokens, K, device=device, dtype=torch.float16)
        eager = torch.ops.ropewalk.packed_linear(x, *arguments, bits, 32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.ops.ropewalk.packed_linear(x, *arguments, bits, 32)
        x.copy_(torch.randn_like(x))
        graph.replay()
        check(y, x, weight, None)
        assert not torch.equal(y, eager)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_another_gpu_than_the_current_one(self):
        arguments, weight = layer("cuda:1", 4, 32, act_order=True, sym=False)
        x = torch.randn(1, K, device="cuda:1", dtype=torch.float16)
        check(torch.ops.ropewalk.packed_linear(x, *arguments, 4, 32), x, weight, None)

    def test_opcheck_gradient_and_compilation(self, device):
        arguments, weight = layer(device, 3, 64, act_order=True, sym=False)
        x = torch.randn(4, K, device=device, dtype=torch.float16, requires_grad=True)
        torch.library.opcheck(torch.ops.ropewalk.packed_linear.default, (x, *arguments, 3, 64))
        y = torch.compile(lambda x: torch.ops.ropewalk.packed_linear(x, *arguments, 3, 64), fullgraph=True)(x)
        y.sum().backward()
        check(x.grad, torch.ones_like(y), weight.t(), None)

    def test_layer_round_trip(self, device):
        from ropewalk.loader.quant_linear import QuantLinear

        packed = quantize_rtn(torch.randn(N, K), bits=4, group_size=32, order=torch.randperm(K))
        module = QuantLinear(4, 32, K, N, False)
        module.load_state_dict(packed)
        x = torch.randn(3, K)
        on_cpu = module(x)
        module.to(device)
        on_gpu = module(x.to(device).half())
        assert torch.allclose(on_gpu.float().cpu(), on_cpu, atol=0.05)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor.cpu(), packed[name])
        assert torch.equal(module.cpu()(x), on_cpu)


def test_groups_in_the_last_block_are_those_of_the_checkpoint(device):
    """Rows of padding have no group of their own: with groups of 32 the last block reads no scale past the end."""
    arguments, weight = layer(device, 8, 32, act_order=False, sym=False, rows=32 * 3)
    words, scales, zeros, order, bias = arguments
    guarded = torch.full((scales.shape[0] + 1, N), float("nan"), dtype=torch.float16, device=device)
    guarded[:-1] = scales
    x = torch.randn(2, 96, device=device)
    y = packed_linear(x, words, guarded[:-1], zeros, order, bias, bits=8, group_size=32, plan=MATMUL, split=1)
    check(y, x, weight, None)
