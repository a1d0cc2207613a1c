"""Packed matmul for few tokens in CUDA C++ (few_tokens.cu), compiled when it is first needed.

NVRTC compiles it, which needs no toolkit: it comes with CUDA builds of torch, as do the bindings by which it is called
(the package cuda-bindings, from torch 2.10 on). Where they are not, or a layer is not of the kind that this kernel
takes, Triton serves (`plans.Plan`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.gptq.layout import bit_planes, rows_per_block

log = logging.getLogger("ropewalk")

_HALVES = (torch.float16, torch.bfloat16)
MOST_TOKENS = 32
# With more of them, picking their activations in the weight's order costs more than bringing them into it before; and
# what is picked from, tokens times K, has to leave shared memory for the rings.
MOST_IN_ORDER = 4
MOST_PICKED_FROM = 1 << 15


@dataclass(frozen=True)
class Variant:
    """What one compilation of the kernel is for: the names that few_tokens.cu wants defined."""

    bits: int
    group: int
    has_zeros: bool
    has_order: bool
    x_bf16: bool
    scale_bf16: bool
    has_bias: bool
    bias_bf16: bool
    tiles: int
    tokens: int
    warps: int
    stages: int
    gate_up: bool

    def defines(self) -> list[str]:
        """Return them as arguments of a compiler."""
        return [f"-D{name.upper()}={int(value)}" for name, value in vars(self).items()]

    @property
    def rows(self) -> int:
        """The rows of a block."""
        return rows_per_block(self.bits)

    def shared_bytes(self, m: int, in_features: int) -> int:
        """Return the shared memory of one program for m tokens."""
        groups = max(1, self.rows // self.group) if self.group else 0
        tile = 1024 + (512 if self.bits == 3 else 0) + 32 * groups + (16 * max(1, groups) if self.has_zeros else 0)
        token = self.rows * 2 + 64
        stage = self.tiles * tile + (self.rows * 4 if self.has_order else m * token)
        rings = self.warps * (self.stages * stage + (m * token if self.has_order else 0))
        sums = self.warps * self.tokens * 8 * self.tiles * 16 * 4
        return max(rings + (m * in_features * 2 if self.has_order else 0), sums)


def takes(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, *, bits: int, group_size: int, tiles: int
) -> bool:
    """Tell whether the kernel can compute a layer on this device; the arguments are those of `packed_linear`."""
    k, n = x.shape[-1], words.shape[1]
    group, rows = _group(group_size, k), rows_per_block(bits)
    return (
        x.dtype in _HALVES
        and scales.dtype in _HALVES
        and (bias is None or bias.dtype in _HALVES)
        and n % (16 * tiles) == 0
        and k % 8 == 0
        and (group == 0 or rows % group == 0 or group % rows == 0)
        and available()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _group(group_size: int, in_features: int) -> int:
    return 0 if group_size == -1 or group_size >= in_features else group_size


def few_tokens(
    rows: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    tiles: int,
    warps: int,
    stages: int,
    split: int,
    gate_up: bool = False,
) -> Tensor:
    """Return rows @ W + bias, [M, N] in x's dtype; with more than one part their sums, float32 [split, M, N].

    Args:
        rows: [M, K], M at most MOST_TOKENS, its rows contiguous; `takes` has said yes.
        tiles: of 16 columns, for each program; fewer where there are not columns enough for half of the device.
        warps: of a program, which share K; more where there are fewer tiles, fewer where shared memory is short.
        stages: of a warp's ring: blocks that are in shared memory or on their way there; fewer where it is short.
        split: into how many parts K is split besides.
        gate_up: W is as `layout.interleave_words` puts it: return silu(x @ gate) * (x @ up), [M, N / 2]; of more
            than one part the sums as without.
    """
    m, k = rows.shape
    n = words.shape[1]
    index = rows.device.index or 0
    while tiles > 1 and 2 * (n // (16 * tiles)) < _multiprocessors(index):
        tiles, warps = tiles // 2, min(2 * warps, 16)
    if bits == 3 and m > 16:
        tiles = min(tiles, 2)  # or registers spill
    if order is not None and (m > MOST_IN_ORDER or m * k > MOST_PICKED_FROM):
        rows, order = rows.index_select(1, order), None
    variant = Variant(
        bits=bits,
        group=_group(group_size, k),
        has_zeros=zeros is not None,
        has_order=order is not None,
        x_bf16=rows.dtype == torch.bfloat16,
        scale_bf16=scales.dtype == torch.bfloat16,
        has_bias=bias is not None,
        bias_bf16=bias is not None and bias.dtype == torch.bfloat16,
        tiles=tiles,
        tokens=-(-m // 8),
        warps=warps,
        stages=stages,
        gate_up=gate_up,
    )
    if rows.stride(0) % 8 or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    while variant.shared_bytes(m, k) > _most_shared(index):
        if variant.stages > 2:
            variant = replace(variant, stages=variant.stages - 1)
        else:
            variant = replace(variant, warps=variant.warps // 2)
    kernel = _load(variant, index)
    blocks = -(-k // variant.rows)
    each = -(-blocks // split)
    parts = -(-blocks // each)
    kept = n // 2 if gate_up else n
    shape, dtype = ((m, kept), rows.dtype) if parts == 1 else ((parts, m, n), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=rows.device)
    low, high = bit_planes(words, bits)
    tensors = (rows, low, low if high is None else high, scales, zeros, order, bias, out)
    _launch(
        kernel,
        (n // (16 * tiles), parts),
        32 * variant.warps,
        variant.shared_bytes(m, k),
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        [m, n, k],
        rows.stride(0),
        each,
    )
    return out


def _bindings() -> tuple[Any, Any]:
    """Return CUDA's driver and NVRTC.

    Raises:
        ImportError: no bindings.
    """
    from cuda.bindings import driver, nvrtc

    return driver, nvrtc


@functools.cache
def available() -> bool:
    """Tell whether the kernel can be compiled and called here; the architecture aside."""
    if not torch.version.cuda:
        return False
    try:
        _checked(_bindings()[1].nvrtcVersion())  # finds the library
    except Exception as error:  # the bindings raise RuntimeError and others for a library that is not there
        log.info("few tokens: Triton instead of CUDA C++, since cuda.bindings does not work here: %s", error)
        return False
    return True


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a call of the bindings gives besides its status.

    Raises:
        RopewalkError: the call failed.
    """
    status, *values = result
    if int(status):
        raise RopewalkError(f"CUDA: expected success, found {status!r}")
    return values[0] if len(values) == 1 else values


def compile_kernel(variant: Variant, arch: str) -> bytes:
    """Return the cubin for an architecture, such as "sm_90".

    Raises:
        RopewalkError: NVRTC refuses it; the message has its log.
    """
    nvrtc = _bindings()[1]
    source = (files("ropewalk.gptq") / "few_tokens.cu").read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"few_tokens.cu", 0, [], []))
    options = [option.encode() for option in (f"--gpu-architecture={arch}", "-std=c++17", *variant.defines())]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(status):
        text = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, text)
        raise RopewalkError(f"few_tokens.cu: expected it to compile for {arch}, found {text.decode()[:2000]}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


@functools.cache
def _most_shared(index: int) -> int:
    """Return how much shared memory a program may ask for on a device."""
    driver = _bindings()[0]
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_checked(driver.cuDeviceGetAttribute(attribute, _checked(driver.cuDeviceGet(index)))))


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _load(variant: Variant, index: int) -> Any:
    """Return the kernel on the current device, of that index."""
    driver = _bindings()[0]
    major, minor = torch.cuda.get_device_capability(index)
    module = _checked(driver.cuModuleLoadData(compile_kernel(variant, f"sm_{major}{minor}")))
    kernel = _checked(driver.cuModuleGetFunction(module, b"few_tokens"))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(kernel, attribute, _most_shared(index)))
    return kernel


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    threads: int,
    shared: int,
    pointers: list[int],
    sizes: list[int],
    stride: int,
    each: int,
) -> None:
    values = (*pointers, *sizes, stride, each)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    types = (*[pointer] * len(pointers), *[integer] * len(sizes), ctypes.c_longlong, integer)
    stream = torch.cuda.current_stream().cuda_stream
    _checked(_bindings()[0].cuLaunchKernel(kernel, *grid, 1, threads, 1, 1, shared, stream, (values, types), 0))
