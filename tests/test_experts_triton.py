"""The Triton kernels of packed experts, on a GPU or through Triton's interpreter."""

import itertools

import pytest
import torch

import ropewalk.gptq.ops_experts  # noqa: F401
from ropewalk.gptq import reference
from ropewalk.gptq.experts import both_halves
from ropewalk.gptq.format import BITS, pack, unpack
from ropewalk.gptq.layout import PLANE, row_order, rows_per_block, to_execution
from ropewalk.gptq.plans import Plan, device_plans, read_plans
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.gptq.triton_align import align, most_blocks
from ropewalk.gptq.triton_grouped import packed_experts, plan_for

# 5 planes are no whole number of blocks at any width, and with groups of 128 the last one is ragged.
EXPERTS, K, N = 4, 5 * PLANE, 32
MATMUL = Plan(None, "matmul", block_m=16, block_n=64)
GATHER = Plan(None, "matmul", block_m=8, block_n=16, gather=True)
DECODE = Plan(None, "decode", block_n=16)
DENSE = Plan(None, "dense")
TOKENS = (1, 3, 17, 40)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def seeded():
    """The rule compares two largest errors; of few numbers drawn anew each time, one run in many would break it."""
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill what the launchers allocate with NaN or nonsense, so that an element nobody writes shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", filled)


def stack(device, bits, group_size, *, act_order, sym, bias=False, seed=0):
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
        zeros = unpack(packed["qzeros"], bits, dim=1)
        parts.append((to_execution(packed["qweight"], bits, order), packed["scales"], zeros, order))
        weights.append(
            reference.dequantize(
                packed["qweight"], packed["scales"], packed["qzeros"], packed["g_idx"], bits=bits, group_size=group_size
            )
        )
    words, scales, zeros, order = (torch.stack(part).to(device) for part in zip(*parts, strict=True))
    biases = torch.randn(EXPERTS, N, generator=generator).half().to(device) if bias else None
    arguments = (words, scales, None if sym else zeros, order if act_order else None, biases)
    return arguments, torch.stack(weights).to(device)


def routing(device, kind, tokens, top_k, seed=0):
    """Return expert_ids [tokens, top_k], a token's experts all different."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :top_k]
    if kind == "one":  # all tokens to one expert, the other place is padding
        ids = torch.full_like(ids, EXPERTS)
        ids[:, 0] = 2
    elif kind == "idle":  # an expert without tokens
        ids = torch.where(ids == 1, EXPERTS - 1, ids)
    elif kind == "padded":  # experts of another rank, on both sides
        ids = torch.where(ids == 1, -1, torch.where(ids == 3, EXPERTS + 5, ids))
    return ids.to(device)


def expected(x, weights, bias, ids, routing_weights, dtype):
    """Return the result in `dtype`'s arithmetic, by a loop over assignments that reads like the definition."""
    tokens, top_k = ids.shape
    y = torch.zeros(tokens, top_k, N, dtype=dtype, device=x.device)
    for t, j in itertools.product(range(tokens), range(top_k)):
        if 0 <= (e := int(ids[t, j])) < EXPERTS:
            row = (x[t] if x.ndim == 2 else x[t, j]).to(dtype)
            y[t, j] = row @ weights[e].to(dtype) + (0 if bias is None else bias[e].to(dtype))
    if routing_weights is None:
        return y
    return sum(y[:, j] * torch.where(ids[:, j] < 0, 0, routing_weights[:, j]).to(dtype)[:, None] for j in range(top_k))


def check(y, x, weights, bias, ids, routing_weights):
    """The rule: the largest error is at most twice that of torch in the same dtype."""
    exact = expected(x, weights, bias, ids, routing_weights, torch.float64)
    torchs = expected(x, weights, bias, ids, routing_weights, x.dtype)
    assert y.shape == exact.shape and y.dtype == x.dtype
    # As for a single layer (test_gptq_triton.check).
    floor = 2**-23 * expected(x.abs(), weights.abs(), None, ids, routing_weights, torch.float64).max()
    allowed = 2 * (torchs.double() - exact).abs().max() + floor
    error = (y.double() - exact).abs().max()
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"


# Every width with every group size, with and without act-order, symmetric and not; over these the rest is dealt out.
CASES = [
    (*case, TOKENS[(i + i // 4) % 4], 1 + (i // 2 + i // 8) % 2, DTYPES[(i + i // 3) % 3], KINDS[(i + i // 16) % 4])
    for KINDS in [("any", "one", "idle", "padded")]
    for i, case in enumerate(itertools.product(BITS, (32, 128, -1), (False, True), (True, False)))
]


@pytest.mark.parametrize(("bits", "group_size", "act_order", "sym", "tokens", "top_k", "dtype", "kind"), CASES)
def test_every_kind_of_stack_and_routing(device, bits, group_size, act_order, sym, tokens, top_k, dtype, kind):
    bias = (bits + tokens) % 2 == 0
    arguments, weights = stack(device, bits, group_size, act_order=act_order, sym=sym, bias=bias)
    ids = routing(device, kind, tokens, top_k)
    shared = torch.randn(tokens, K, device=device).to(dtype)
    own = torch.randn(tokens, top_k, K, device=device).to(dtype)
    by = torch.rand(tokens, top_k, device=device).to(dtype)
    before = [None if t is None else t.clone() for t in (shared, own, ids, by, *arguments)]
    settings = {"bits": bits, "group_size": group_size}
    plan = GATHER if tokens == 17 else MATMUL
    check(
        packed_experts(shared, *arguments, ids, None, plan=plan, split=1, **settings),
        shared,
        weights,
        arguments[4],
        ids,
        None,
    )
    y = packed_experts(own, *arguments, ids, by, plan=plan, split=2 if sym else None, **settings)
    check(y, own, weights, arguments[4], ids, by)
    check(packed_experts(own, *arguments, ids, by, plan=DENSE, **settings), own, weights, arguments[4], ids, by)
    for old, new in zip(before, (shared, own, ids, by, *arguments), strict=True):
        assert old is None or torch.equal(old, new)


def gate_and_up(device, bits, group_size, **kind):
    """Return the tensors of a stack of gate and up, in one order, and the weights of both."""
    (gate, gates), (up, ups) = (stack(device, bits, group_size, seed=seed, **kind) for seed in (0, 1))
    words, scales, zeros, _, bias = (
        None if g is None else torch.stack((g, u), dim=1) for g, u in zip(gate, up, strict=True)
    )
    order = gate[3]
    if order is not None:
        # The rows of up's codes, scales and zero points in gate's order are some other weight: its own.
        for e in range(EXPERTS):
            settings = {"bits": bits, "group_size": group_size, "in_features": K}
            zero = None if zeros is None else zeros[e, 1]
            ups[e] = reference.packed_weight(words[e, 1], scales[e, 1], zero, order[e], **settings)
    return (words, scales, zeros, order, bias), gates, ups


@pytest.mark.parametrize(
    ("bits", "act_order", "sym", "tokens", "dtype"),
    [
        (2, True, False, 17, torch.float16),
        (3, True, True, 3, torch.float16),
        (3, False, False, 17, torch.float32),
        (4, True, False, 40, torch.bfloat16),
        (8, False, True, 1, torch.float16),
    ],
)
def test_gate_and_up_in_one(device, bits, act_order, sym, tokens, dtype):
    arguments, gates, ups = gate_and_up(device, bits, 32, act_order=act_order, sym=sym, bias=not sym)
    bias = (None, None) if arguments[4] is None else arguments[4].unbind(1)
    ids = routing(device, "padded", tokens, 2)
    x = torch.randn(tokens, K, device=device).to(dtype) / 8

    def gated(dtype):
        gate, up = (expected(x, w, b, ids, None, dtype) for w, b in zip((gates, ups), bias, strict=True))
        return torch.nn.functional.silu(gate) * up

    exact = gated(torch.float64)
    allowed = 2 * (gated(dtype).double() - exact).abs().max() + 1e-6 * exact.abs().max()
    settings = {"bits": bits, "group_size": 32, "gate_up": True}
    for plan, split, aligned in (
        (MATMUL, 1, None),
        (GATHER, 1, True),
        (MATMUL, 2, False),
        (DECODE, 1, None),
        (DENSE, 1, None),
    ):
        y = packed_experts(x, *arguments, ids, None, plan=plan, split=split, aligned=aligned, **settings)
        assert y.shape == exact.shape and y.dtype == dtype
        # Gate and up are rounded by themselves there.
        more = 2 * torch.finfo(dtype).eps * exact.abs().max() if plan is DENSE else 0
        assert (y.double() - exact).abs().max() <= allowed + more, plan
    # Each by itself, as views of the stack.
    for half, w, b in zip(both_halves(*arguments[:3], arguments[4]), (gates, ups), bias, strict=True):
        words, scales, zeros, own = half
        y = packed_experts(x, words, scales, zeros, arguments[3], own, ids, None, plan=MATMUL, bits=bits, group_size=32)
        check(y, x, w, b, ids, None)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("plan", [MATMUL, GATHER, DECODE], ids=["matmul", "gather", "decode"])
def test_sorted_and_unsorted_assignments_give_the_same_bits(device, bits, plan):
    arguments, weights = stack(device, bits, 32, act_order=True, sym=False, bias=True)
    ids = routing(device, "padded", 3, 2).to(torch.int32)
    x, by = torch.randn(3, 2, K, device=device).half(), torch.rand(3, 2, device=device)
    settings = {"bits": bits, "group_size": 32, "plan": plan}
    found = [
        packed_experts(x, *arguments, ids, by, aligned=aligned, split=2, **settings) for aligned in (False, True, True)
    ]
    check(found[0], x, weights, arguments[4], ids, by)
    assert torch.equal(found[1], found[2])  # from run to run
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("tokens", TOKENS)
def test_by_the_plan_of_the_device(device, tokens):
    """As many tokens as one likes, whatever their experts; a view of x; weights that do not count may be NaN."""
    arguments, weights = stack(device, 4, 32, act_order=True, sym=True)
    ids = routing(device, "padded", tokens, 2)
    wide = torch.full((tokens, K + 16), float("nan"), device=device, dtype=torch.float16)
    x = wide[:, 8:-8]
    x.copy_(torch.randn(tokens, K))
    by = torch.rand(tokens, 2, device=device)
    real = torch.where((ids >= 0) & (ids < EXPERTS), by, float("nan"))
    y = packed_experts(x, *arguments, ids, real, bits=4, group_size=32)
    check(y, x, weights, None, ids, torch.where(real.isnan(), 0, by))
    assert torch.equal(y, packed_experts(x, *arguments, ids, real, bits=4, group_size=32))
    strided = torch.randn(K, tokens, device=device).half().t()
    check(packed_experts(strided, *arguments, ids, None, bits=4, group_size=32), strided, weights, None, ids, None)
    assert packed_experts(x[:0], *arguments, ids[:0], None, bits=4, group_size=32).shape == (0, 2, N)
    assert packed_experts(x[:0], *arguments, ids[:0], by[:0], bits=4, group_size=32).shape == (0, N)


@pytest.mark.parametrize("block_m", [8, 16])
@pytest.mark.parametrize(("assignments", "experts"), [(2, 1), (5, 8), (64, 8), (1500, 3), (1030, 30)])
def test_assignments_sorted_into_blocks(device, assignments, experts, block_m):
    generator = torch.Generator().manual_seed(assignments)
    ids = torch.randint(-1, experts + 1, (assignments,), generator=generator)
    slots, of_block = (t.cpu() for t in align(ids.to(device), experts, block_m))
    groups = torch.where((ids >= 0) & (ids < experts), ids, experts)
    blocks = []
    for group in range(experts + 1):
        own = (groups == group).nonzero().flatten().tolist()
        blocks += [(group, own[i : i + block_m]) for i in range(0, len(own), block_m)]
    assert len(blocks) <= most_blocks(assignments, experts, block_m) == len(of_block)
    for i, (group, own) in enumerate(blocks):
        assert int(of_block[i]) == group
        assert slots[i].tolist() == own + [assignments] * (block_m - len(own))
    assert (of_block[len(blocks) :] == -1).all()


def test_most_blocks_is_reached_and_never_passed():
    for counts in itertools.product(range(10), repeat=3):  # two experts, and assignments to none
        needed = sum(-(-count // 4) for count in counts)
        assert needed <= most_blocks(sum(counts), 2, 4)
    assert most_blocks(3, 2, 4) == 3
    assert most_blocks(1, 8, 16) == 1


@pytest.mark.parametrize("bits", [3, 4])
def test_experts_past_two_to_the_31(device, bits):
    """The last expert of so many that its words begin beyond 2 ** 31 elements."""
    rows, columns = rows_per_block(bits), 512  # or there were millions of experts to go through
    per_expert = rows * bits // 32 * columns
    experts = (1 << 31) // per_expert + 2
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    base = torch.zeros(1, dtype=torch.int32, device=device)
    # Pages that nobody touches cost nothing on the CPU.
    words = base.new_empty(experts, rows * bits // 32, columns)
    scales = base.new_empty(experts, 1, columns, dtype=torch.float16)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(0))
    words[0], scales[0] = 0, 0
    words[-1], scales[-1] = to_execution(pack(codes, bits), bits).to(device), 1
    x = torch.randn(1, rows, device=device)
    ids = torch.tensor([[0, experts - 1]], device=device)
    y = packed_experts(x, words, scales, None, None, None, ids, None, bits=bits, group_size=-1, plan=MATMUL, split=1)
    exact = x.double().cpu() @ (codes.double() - (1 << (bits - 1)))
    assert (y[0, 0] == 0).all()
    assert (y[0, 1].double().cpu() - exact[0]).abs().max() <= 1e-3


def test_plans():
    plans, _ = device_plans(torch.device("cpu"))
    for bits in BITS:
        assert plan_for(plans, 1, bits) == plans.choose(1, bits)
        assert plan_for(plans, 100_000, bits).kernel == "matmul"
    # Without tensor cores.
    assert plan_for(read_plans("sm_75"), 1, 4).kernel == "decode"
    assert plan_for(read_plans("sm_75"), 100_000, 4).kernel == "dense"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    """What only a GPU can show."""

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("tokens", [1, 16, 300])
    def test_graph_follows_the_routing(self, device, bits, tokens):
        arguments, weights = stack(device, bits, 32, act_order=True, sym=False)
        x = torch.randn(tokens, K, device=device, dtype=torch.float16)
        ids, by = routing(device, "padded", tokens, 2), torch.rand(tokens, 2, device=device)
        torch.ops.ropewalk.packed_experts(x, *arguments, ids, by, bits, 32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # anything that waits for the device fails here
            y = torch.ops.ropewalk.packed_experts(x, *arguments, ids, by, bits, 32)
        for kind in ("any", "one", "padded"):
            x.copy_(torch.randn_like(x))
            ids.copy_(routing(device, kind, tokens, 2, seed=1))
            graph.replay()
            check(y, x, weights, None, ids, torch.where(ids < EXPERTS, by, 0))

    def test_opcheck_gradient_and_compilation(self, device):
        arguments, weights = stack(device, 3, 32, act_order=True, sym=False)
        x = torch.randn(5, K, device=device, dtype=torch.float16, requires_grad=True)
        ids, by = routing(device, "any", 5, 2), torch.rand(5, 2, device=device, requires_grad=True)
        op = torch.ops.ropewalk.packed_experts
        torch.library.opcheck(op.default, (x, *arguments, ids, by, 3, 32))
        y = torch.compile(lambda x, by: op(x, *arguments, ids, by, 3, 32), fullgraph=True)(x, by)
        check(y.detach(), x.detach(), weights, None, ids, by.detach())
        y.sum().backward()
        exact = (weights[ids].sum(-1) * by[..., None].detach()).sum(1)
        assert (x.grad.float() - exact).abs().max() <= 0.02 * exact.abs().max()
