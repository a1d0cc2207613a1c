"""QuantLinear: AutoGPTQ's arguments, buffers and keys."""

import copy

import pytest
import torch
from torch import nn

from ropewalk import QuantLinear, cpu
from ropewalk.errors import FormatError, UsageError
from ropewalk.gptq.format import BITS
from ropewalk.gptq.rtn import quantize_rtn

K, N = 96, 64


def filled(bits=4, group_size=32, sym=True, act_order=True, bias=False, checkpoint_format="gptq"):
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    order = torch.randperm(K) if act_order else None
    packed = quantize_rtn(
        weight, bits=bits, group_size=group_size, sym=sym, order=order, checkpoint_format=checkpoint_format
    )
    if bias:
        packed["bias"] = torch.randn(N).half()
    layer = QuantLinear(bits, group_size, K, N, bias, checkpoint_format=checkpoint_format)
    layer.load_state_dict(packed)
    return layer, packed, weight


def test_arguments_and_state_dict_are_autogptqs():
    # Positional as AutoGPTQ calls it: bits, group_size, infeatures, outfeatures, bias, use_cuda_fp16,
    # kernel_switch_threshold, trainable, weight_dtype.
    layer = QuantLinear(4, 128, 256, 512, True, True, 128, False, torch.float16)
    assert (layer.infeatures, layer.outfeatures, layer.bits, layer.group_size, layer.maxq) == (256, 512, 4, 128, 15)
    state = {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()}
    assert state == {
        "qweight": ((32, 512), torch.int32),
        "qzeros": ((2, 64), torch.int32),
        "scales": ((2, 512), torch.float16),
        "g_idx": ((256,), torch.int32),
        "bias": ((512,), torch.float16),
    }
    assert not list(layer.parameters())
    assert QuantLinear(4, -1, 256, 512, False).group_size == 256
    assert "bias" not in QuantLinear(4, -1, 256, 512, False).state_dict()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [True, False])
def test_computes_what_the_layer_computed(bits, sym, checkpoint_format, act_order):
    layer, packed, weight = filled(bits, 32, sym, act_order, True, checkpoint_format)
    x = torch.randn(5, K)
    error = (layer(x) - nn.functional.linear(x, weight, layer.bias.float())).abs()
    # Every weight is off by half a step, or, where the largest was cut off, by one and a half.
    step = packed["scales"].float()[packed["g_idx"].long()]
    assert bool((error <= 1.51 * x.abs() @ step + 1e-3).all())
    assert bool((error <= x.abs() @ step).float().mean() > 0.99)


def test_state_dict_comes_back_bit_for_bit():
    layer, packed, _ = filled(3, 32, sym=False, bias=True)
    layer(torch.randn(1, K))
    layer.to(torch.bfloat16)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, packed[name]), name
        assert tensor.dtype == packed[name].dtype


def test_casts_leave_the_scales_and_moves_the_result():
    layer, _, _ = filled()
    x = torch.randn(2, K)
    before = layer(x)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.double()):
        cast(layer)
        assert layer.scales.dtype == torch.float16
        assert torch.equal(layer(x), before)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), before)
    assert layer.to("meta").qweight.is_meta


def test_new_buffers_are_noticed():
    layer, _, _ = filled()
    x = torch.randn(2, K)
    before = layer(x)
    other = quantize_rtn(torch.randn(N, K), bits=4, group_size=32, sym=False)
    layer.load_state_dict(other)
    fresh = QuantLinear(4, 32, K, N, False)
    fresh.load_state_dict(other)
    assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer(x), before)


def test_a_checkpoint_without_g_idx():
    layer, packed, _ = filled(act_order=False)
    x = torch.randn(2, K)
    old = {name: tensor for name, tensor in packed.items() if name != "g_idx"}
    again = QuantLinear(4, 32, K, N, False)
    again.load_state_dict(old)
    assert torch.equal(again(x), layer(x))
    without = QuantLinear(4, 32, K, N, False)
    without.drop_g_idx()
    without.load_state_dict(old)
    assert torch.equal(without(x), layer(x))
    assert "g_idx" not in without.state_dict()


def test_a_state_dict_without_the_layer_leaves_it_alone():
    layer, packed, _ = filled()
    layer.load_state_dict({}, strict=False)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_pack_fills_the_buffers(bits, checkpoint_format):
    """As AutoGPTQ's quantizer calls it: scales and zeros [N, G] beside a layer whose weight lies on the grid."""
    source, packed, _ = filled(bits, 32, sym=False, bias=True, checkpoint_format=checkpoint_format)
    source.post_init()
    on_grid = nn.Linear(K, N)
    from ropewalk.gptq.format import dequantize, unpack, zeros_v1_to_v2

    qzeros = zeros_v1_to_v2(packed["qzeros"], bits) if checkpoint_format == "gptq" else packed["qzeros"]
    weight = dequantize(packed["qweight"], packed["scales"], qzeros, packed["g_idx"], bits=bits, group_size=32)
    on_grid.weight.data, on_grid.bias.data = weight.t().contiguous(), packed["bias"].float()
    layer = QuantLinear(bits, 32, K, N, True, checkpoint_format=checkpoint_format)
    layer.pack(on_grid, packed["scales"].t(), unpack(qzeros, bits, dim=1).t(), packed["g_idx"])
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, packed[name]), name


def test_pack_refuses_other_sizes():
    layer = QuantLinear(4, 32, K, N, False)
    with pytest.raises(FormatError, match=r"weight: expected shape \[64, 96\], found \[96, 64\]"):
        layer.pack(nn.Linear(N, K), torch.ones(N, 3), torch.ones(N, 3))
    with pytest.raises(FormatError, match="scales"):
        layer.pack(nn.Linear(K, N), torch.ones(N, 2), torch.ones(N, 2))


def test_faulty_values_are_found_at_the_first_call():
    layer, _, _ = filled()
    layer.g_idx[3] = 99
    layer._forget()
    with pytest.raises(FormatError, match="g_idx: expected group numbers from 0 to 2, found 0 to 99"):
        layer(torch.randn(1, K))


def test_bad_arguments():
    with pytest.raises(FormatError, match="bits"):
        QuantLinear(5, 32, K, N, False)
    with pytest.raises(FormatError, match="group_size"):
        QuantLinear(4, 0, K, N, False)
    with pytest.raises(FormatError, match="in_features"):
        QuantLinear(4, 32, 100, N, False)
    with pytest.raises(FormatError, match="checkpoint_format"):
        QuantLinear(4, 32, K, N, False, checkpoint_format="marlin")


def test_compiles_whole_once_it_is_ready():
    layer, _, _ = filled(bits=3, sym=False, bias=True)
    layer.post_init()
    x = torch.randn(2, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.fixture(params=["gpu", "cpu"])
def layout(request, monkeypatch):
    """Have layers take an execution layout: that of a GPU here as well, as they do there."""
    if request.param == "gpu":
        monkeypatch.setattr(QuantLinear, "_has_gpu_kernels", lambda self: True)
    elif not cpu.load():
        pytest.skip(f"no kernels for the CPU: {cpu.status()['why']}")
    return request.param


@pytest.fixture
def without_kernels(monkeypatch):
    """Have layers keep the checkpoint's layout."""

    def remove():
        monkeypatch.setattr(QuantLinear, "_best_layout", lambda self: "checkpoint")

    return remove


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("act_order", [False, True])
def test_in_an_execution_layout_the_layer_stays_what_it_is(layout, without_kernels, bits, act_order):
    module, packed, _ = filled(bits, sym=False, act_order=act_order, bias=True)
    x = torch.randn(3, K, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert module._layout == layout
    assert set(module.state_dict()) == set(packed)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == packed[name].dtype
        assert torch.equal(tensor, packed[name])
    module.half()  # leaves the layout and takes it again
    assert module._layout == layout
    assert torch.equal(module(x), y)
    again = copy.deepcopy(module)
    other, others, _ = filled(bits, sym=False, act_order=not act_order, bias=True)
    again.load_state_dict(others)
    assert torch.equal(again(x), other(x))
    without_kernels()
    grad, x.grad = x.grad, None
    plain, *_ = filled(bits, sym=False, act_order=act_order, bias=True)
    plain(x).sum().backward()
    assert plain._layout == "checkpoint"
    torch.testing.assert_close(y, plain(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, x.grad, rtol=0, atol=1e-5)


def test_layers_that_the_execution_layout_cannot_hold_do_without(layout):
    module, packed, _ = filled(4, 16)
    module(torch.randn(1, K))
    # On a GPU a plane of 32 rows would hold two groups.
    assert module._layout == ("checkpoint" if layout == "gpu" else "cpu")
    module, packed, _ = filled(4, 32)
    packed["g_idx"][0] = 1 - packed["g_idx"][0].clamp(max=1)
    module.load_state_dict(packed)
    module(torch.randn(1, K))
    assert module._layout == "checkpoint"  # groups of 31 and 33 rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes_come_back_from_the_cpu_layout(dtype):
    if not cpu.load():
        pytest.skip(f"no kernels for the CPU: {cpu.status()['why']}")
    module, packed, _ = filled(4, 32)
    module.scales = packed["scales"].to(dtype)
    module(torch.randn(1, K))
    assert module._layout == "cpu"
    assert module.scales.dtype == torch.float32
    assert torch.equal(module.state_dict()["scales"], packed["scales"].to(dtype))


def test_the_mode_on_the_cpu_is_the_layers_or_the_processes(monkeypatch):
    if not cpu.load():
        pytest.skip(f"no kernels for the CPU: {cpu.status()['why']}")
    module, *_ = filled(4, 32)
    x = torch.randn(2, K)
    exact = module(x)
    module.cpu_mode = "int8"
    rounded = module(x)
    assert 0 < (exact - rounded).abs().max() < 0.02 * exact.abs().max()
    module.cpu_mode = None
    monkeypatch.setenv("ROPEWALK_CPU_MODE", "int8")
    module.post_init()
    assert torch.equal(module(x), rounded)
    # A gradient is that of the exact product.
    given = x.clone().requires_grad_()
    assert torch.equal(module(given), exact)
    monkeypatch.setenv("ROPEWALK_CPU_MODE", "int4")
    with pytest.raises(UsageError, match="ROPEWALK_CPU_MODE: expected exact or int8, found 'int4'"):
        module.post_init()
