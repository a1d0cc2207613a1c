"""The kernel in CUDA C++ for few tokens: emulated on the CPU, thread by thread, and on a GPU where there is one."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ropewalk.bench.peers.weight import random_weight
from ropewalk.gptq.few_tokens import Variant, available
from ropewalk.gptq.layout import bit_planes, gate_and_up, row_order, rows_per_block, to_execution
from ropewalk.gptq.plans import Plan
from ropewalk.gptq.triton_linear import packed_linear

HERE = Path(__file__).parent
SOURCE = HERE.parent / "kernels" / "gptq" / "few_tokens.cu"
ENTRY = """
extern "C" void run(const u16* x, const int* low, const u16* high, const u16* scales, const u8* zeros, const int* order,
                    const u16* bias, void* out, int M, int N, int K, i64 stride_x, int each, int columns, int parts,
                    int bytes) {
    run_grid(columns, parts, WARPS, bytes, [=] {
        few_tokens(x, low, high, scales, zeros, order, bias, out, M, N, K, stride_x, each);
    });
}
"""

# bits, group size, symmetric, act-order, tokens, dtype, scales' dtype, bias, tiles, warps, stages, parts, K
CASES = [
    (4, 128, True, False, 1, "float16", "float16", False, 1, 2, 3, 1, 512),
    (4, 128, True, True, 1, "float16", "float16", True, 1, 2, 3, 1, 640),
    (4, 32, False, False, 3, "float16", "float16", False, 2, 2, 4, 1, 384),
    (4, 32, False, True, 1, "bfloat16", "float16", True, 2, 2, 3, 2, 512),
    (4, -1, True, False, 8, "float16", "bfloat16", True, 1, 2, 3, 1, 384),
    (4, 64, False, False, 11, "bfloat16", "bfloat16", False, 1, 3, 3, 3, 448),
    (4, 256, False, False, 1, "float16", "float16", False, 1, 2, 3, 1, 1024),
    (3, 128, True, False, 1, "float16", "float16", False, 1, 2, 3, 1, 640),
    (3, 32, False, True, 1, "float16", "float16", False, 2, 2, 3, 1, 512),
    (3, -1, False, False, 2, "bfloat16", "float16", True, 1, 2, 3, 1, 544),
    (2, 64, False, False, 5, "float16", "float16", False, 1, 2, 3, 2, 768),
    (2, 256, True, False, 1, "bfloat16", "float16", False, 1, 2, 3, 1, 768),
    (4, 128, False, True, 3, "float16", "float16", False, 1, 2, 3, 1, 640),
    (8, 32, False, False, 1, "float16", "float16", False, 2, 2, 3, 1, 256),
    (8, 128, False, True, 1, "bfloat16", "bfloat16", True, 1, 2, 3, 1, 384),
    (8, -1, True, False, 17, "bfloat16", "float16", False, 1, 2, 3, 1, 192),
]
# Those that are computed as gate and up too: every width, groups in and over a block or none, orders, parts, biases.
GATED = [CASES[i] for i in (1, 3, 4, 8, 10, 14)]
CASES = [(case, False) for case in CASES] + [(case, True) for case in GATED]


def case_name(value):
    return "gate_up" if value is True else "" if value is False else "-".join(map(str, value))


def problem(case, gate_up=False, device="cpu"):
    bits, group_size, sym, act_order, m, dtype, scale_dtype, bias, tiles, *_, k = case
    n = 16 * tiles * 2
    weight = random_weight(k, n, bits=bits, group_size=group_size, desc_act=act_order, sym=sym, device=device)
    order = row_order(weight.g_idx, group_size) if weight.act_order else None
    words = to_execution(weight.qweight, bits, order)
    scales = weight.scales.to(getattr(torch, scale_dtype))
    zeros = None if sym else weight.zeros()
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(m, k, generator=generator, device=device).to(getattr(torch, dtype))
    b = torch.randn(n, generator=generator, device=device).to(torch.float16) if bias else None
    rows = weight.g_idx.long() if act_order else torch.arange(k, device=device) // weight.rows_per_group
    point = (weight.zeros() if zeros is not None else torch.full_like(weight.scales, 1 << (bits - 1)))[rows]
    dense = (weight.codes().double() - point.double()) * scales.double()[rows]
    expected = x.double() @ dense + (b.double() if bias else 0)
    if gate_up:
        expected = silu_times(expected)
    return (x, words, scales, zeros, order, b), expected


def silu_times(y):
    gate, up = gate_and_up(y)
    return torch.nn.functional.silu(gate) * up


def agree(found, expected, dtype):
    # The product itself is summed in float32; what is rounded is the result.
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert found.isfinite().all()
    assert ((found.double() - expected).abs() <= rounding * expected.abs() + 1e-5 * expected.abs().max()).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("case", "gate_up"), CASES, ids=case_name)
def test_emulated(case, gate_up, tmp_path):
    bits, group_size, sym, _, m, dtype, scale_dtype, bias, tiles, warps, stages, parts, k = case
    (x, words, scales, zeros, order, b), expected = problem(case, gate_up)
    n = words.shape[1]
    variant = Variant(
        bits=bits,
        group=0 if group_size == -1 else group_size,
        has_zeros=not sym,
        has_order=order is not None,
        x_bf16=dtype == "bfloat16",
        scale_bf16=scale_dtype == "bfloat16",
        has_bias=bias,
        bias_bf16=False,
        tiles=tiles,
        tokens=-(-m // 8),
        warps=warps,
        stages=stages,
        gate_up=gate_up,
    )
    (tmp_path / "run.cpp").write_text(f'#include "{SOURCE}"\n{ENTRY}')
    header = f'-DROPEWALK_EMULATED="{HERE / "emulated_cuda.h"}"'
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", header, *variant.defines()]
    subprocess.run([*command, str(tmp_path / "run.cpp"), "-o", str(tmp_path / "run.so")], check=True)
    run = ctypes.CDLL(str(tmp_path / "run.so")).run
    low, high = bit_planes(words, bits)
    each = math.ceil(math.ceil(k / rows_per_block(bits)) / parts)
    split = parts > 1
    shape = (parts, m, n) if split else (m, n // 2 if gate_up else n)
    out = torch.full(shape, float("nan"), dtype=torch.float32 if split else x.dtype)
    pointers = [
        None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x, low, high, scales, zeros, order, b, out)
    ]
    sizes = [m, n, k, ctypes.c_longlong(x.stride(0)), each, n // (16 * tiles), parts, variant.shared_bytes(m, k)]
    run(*pointers, *sizes)
    if split:
        out = out.sum(0) + (b.float() if bias else 0)
        out = (silu_times(out) if gate_up else out).to(x.dtype)
    agree(out, expected, dtype)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_compiles_without_spills(arch, tmp_path):
    # The settings of the plans that ship, and the widest that they lead to.
    settings = [(4, 128, 2, 1, False), (4, 128, 2, 1, True)]
    if arch == "sm_90":
        settings += [
            (4, 128, 4, 4, True),
            (4, 32, 4, 4, False),
            (3, 32, 4, 2, True),
            (3, 32, 2, 4, False),
            (8, 32, 4, 4, True),
        ]
    for bits, group, tiles, tokens, x_bf16 in settings:
        variant = Variant(
            bits=bits,
            group=group,
            has_zeros=bits == 3,
            has_order=tokens == 1,
            x_bf16=x_bf16,
            scale_bf16=False,
            has_bias=True,
            bias_bf16=False,
            tiles=tiles,
            tokens=tokens,
            warps=8,
            stages=4,
            gate_up=x_bf16,
        )
        command = ["nvcc", "-cubin", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", *variant.defines()]
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert " 0 bytes spill stores" in done.stderr and " 0 bytes spill loads" in done.stderr, done.stderr


@pytest.mark.skipif(not (torch.cuda.is_available() and available()), reason="needs a GPU, cuda-bindings and NVRTC")
@pytest.mark.parametrize(("case", "gate_up"), CASES, ids=case_name)
def test_on_a_gpu(case, gate_up):
    bits, group_size, *_, dtype, _, _, tiles, warps, stages, parts, _ = case
    (x, words, scales, zeros, order, b), expected = problem(case, gate_up, "cuda")
    plan = Plan(32, "cuda", block_n=16 * tiles, num_warps=warps, num_stages=stages)
    settings = {"bits": bits, "group_size": group_size, "plan": plan, "split": parts, "gate_up": gate_up}
    y = packed_linear(x, words, scales, zeros, order, b, **settings)
    agree(y, expected, dtype)
    assert torch.equal(y, packed_linear(x, words, scales, zeros, order, b, **settings))


@pytest.mark.skipif(not (torch.cuda.is_available() and available()), reason="needs a GPU, cuda-bindings and NVRTC")
@pytest.mark.parametrize("k", [4096, 28672])
@pytest.mark.parametrize("m", [1, 4, 8, 32])
def test_large_layers_on_a_gpu(m, k):
    case = (4, 128, True, True, m, "float16", "float16", False, 2, 8, 4, 1, k)
    (x, words, scales, zeros, order, b), expected = problem(case, device="cuda")
    plan = Plan(32, "cuda", block_n=32, num_warps=8, num_stages=4)
    agree(packed_linear(x, words, scales, zeros, order, b, bits=4, group_size=128, plan=plan), expected, "float16")
