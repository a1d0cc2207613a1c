"""The Triton kernel of RMS normalization, interpreted on the CPU or on a GPU, against plain torch and float64."""

import pytest
import torch

from ropewalk.norm import ops, reference, triton_norm
from ropewalk.norm.triton_norm import launch

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = 1e-5
NAN = float("nan")
MORE = 64  # behind the results


def inputs(device, dtype, rows, k):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, k, generator=g).to(device, dtype) for _ in range(2))
    weight = (1 + 0.1 * torch.randn(k, generator=g)).to(device, dtype)
    return x, y, weight, torch.randperm(k, generator=g).int().to(device)


def computed(x, y, weight, order):
    """Return sum and norm as the kernel writes them over NaNs, having seen that it writes nothing else."""
    kept = [None if t is None else t.clone() for t in (x, y, weight, order)]
    outs = [torch.full((x.numel() + MORE,), NAN, dtype=x.dtype, device=x.device) for _ in range(2)]
    total, normed = (out[: x.numel()].view(x.shape) for out in outs)
    launch(x, y, weight, EPS, order, None if y is None else total, normed)
    for now, before in zip((x, y, weight, order), kept, strict=True):
        assert now is None or torch.equal(now, before)
    assert outs[1][x.numel() :].isnan().all()
    assert outs[0][0 if y is None else x.numel() :].isnan().all()
    return None if y is None else total, normed


def assert_within_a_rounding(found, expected, roundings=1):
    """The sum over a row has another order; the interpreter cuts bfloat16 off where hardware rounds."""
    if found.dtype == torch.bfloat16 and found.device.type == "cpu":
        roundings *= 2
    step = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-6}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=2 * roundings * step, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(3, 1), (2, 48), (3, 1000), (1, 5120), (2, 8192), (1, 8200), (2, 32768)])
def test_is_plain_torchs(device, dtype, rows, k):
    x, y, weight, order = inputs(device, dtype, rows, k)
    for added in (None, y):
        total, normed = computed(x, added, weight, None)
        if total is None:
            total = x
        else:
            assert_within_a_rounding(total, x + y)
        # Of the sum as it was written: in bfloat16 the interpreter's is another.
        assert_within_a_rounding(normed, reference.rms_norm(total, weight, EPS), roundings=2)
        ordered_total, ordered = computed(x, added, weight, order)
        assert torch.equal(ordered, normed[:, order.long()])
        assert ordered_total is None or torch.equal(ordered_total, total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("k", [96, 9000])
def test_within_twice_torchs_own_error(device, dtype, k):
    x, y, weight, order = inputs(device, dtype, 2, k)
    total, normed = computed(x, y, weight, order)
    exact = torch.nn.functional.rms_norm(total.double(), (k,), weight.double(), EPS)[:, order.long()]
    by_torch = reference.rms_norm(total, weight, EPS, order)
    assert (normed.double() - exact).abs().max() <= 2 * (by_torch.double() - exact).abs().max() + 1e-6


@pytest.mark.parametrize("one_tile", [8192, 64])
def test_strided_rows(device, monkeypatch, one_tile):
    monkeypatch.setattr(triton_norm, "ONE_TILE", one_tile)  # 64: the way of long rows
    monkeypatch.setattr(triton_norm, "LONG_TILE", 32)
    x, y, weight, order = inputs(device, torch.float16, 6, 72)
    expected = computed(x, y, weight, order)
    wide = torch.full((6, 200), NAN, dtype=torch.float16, device=device)
    wide[:, 5:77], wide[:, 100:172] = x, y
    views = [(wide[:, 5:77], wide[:, 100:172]), (x.t().contiguous().t(), y), (x, y.t().contiguous().t())]
    for a, b in views:
        for found, wanted in zip(computed(a, b, weight, order), expected, strict=True):
            assert torch.equal(found, wanted)
    batch = wide[:, 5:77].unflatten(0, (2, 3)).transpose(0, 1)  # no view of it is [rows, K]
    normed = torch.full((3, 2, 72), NAN, dtype=torch.float16, device=device)
    launch(batch, None, weight, EPS, order, None, normed)
    assert torch.equal(normed.transpose(0, 1).flatten(0, 1), computed(x, None, weight, order)[1])


def test_two_runs_and_the_way_of_long_rows(device, monkeypatch):
    x, y, weight, order = inputs(device, torch.float16, 3, 300)
    first, second = computed(x, y, weight, order), computed(x, y, weight, order)
    monkeypatch.setattr(triton_norm, "ONE_TILE", 256)
    monkeypatch.setattr(triton_norm, "LONG_TILE", 128)
    long = computed(x, y, weight, order)
    for a, b, c in zip(first, second, long, strict=True):
        assert torch.equal(a, b)
        assert_within_a_rounding(c, a)


def test_rows_past_two_to_the_31(device):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    far = 1 << 31
    memory = torch.empty(far + 64, dtype=torch.float16, device=device)  # untouched pages cost nothing on the CPU
    x, _, weight, order = inputs(device, torch.float16, 2, 64)
    memory[:64], memory[far:] = x[0], x[1]
    _, normed = computed(x, None, weight, order)
    out = torch.full_like(x, NAN)
    launch(memory.as_strided((2, 64), (far, 1)), None, weight, EPS, order, None, out)
    assert torch.equal(out, normed)


def test_no_rows(device):
    x, y, weight, order = inputs(device, torch.float16, 0, 64)
    total, normed = computed(x, y, weight, order)
    assert total.shape == normed.shape == (0, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on the CPU the operators are computed in plain torch")
class TestOperatorsOnAGpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_results(self, dtype):
        x, y, weight, order = inputs("cuda", dtype, 5, 5120)
        total, normed = ops.add_rms_norm(x, y, weight, EPS, order)
        assert torch.equal(total, x + y)
        assert_within_a_rounding(normed, reference.rms_norm(total, weight, EPS, order))
        assert torch.equal(ops.rms_norm(total, weight, EPS, order), normed)

    def test_opcheck_and_compilation(self):
        x, y, weight, order = inputs("cuda", torch.float16, 5, 96)
        torch.library.opcheck(torch.ops.ropewalk.rms_norm.default, (x, weight, EPS, order))
        torch.library.opcheck(torch.ops.ropewalk.add_rms_norm.default, (x, y, weight, EPS, order))

        def step(x, y):
            total, normed = ops.add_rms_norm(x, y, weight, EPS, order)
            return ops.rms_norm(total * normed, weight, EPS)

        torch.testing.assert_close(torch.compile(step, fullgraph=True)(x, y), step(x, y))
