"""GemLite's kernel beside ours: the same row, with the block sizes that it ships for NVIDIA devices.

Read from GemLite 0.6. It asks for a GPU as it is imported; without one it is told of an H200, which only
decides between configurations that nothing here uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ropewalk.bench.aot import ARCHITECTURES, Variant
from ropewalk.errors import MissingPackageError


def gemlite_variants() -> list[Variant]:
    """Return GemLite's split-K matmul for up to 16 tokens, 4 bits with groups of 128 and zero points, float16.

    Raises:
        MissingPackageError: gemlite is not installed, or cannot be imported here.
    """
    import triton.language as tl

    try:
        with _a_gpu():
            kernels = importlib.import_module("gemlite.triton_kernels.gemm_splitK_kernels")
    except ImportError as error:
        raise MissingPackageError(f"gemlite: expected it installed for --gemlite, found: {error}") from None
    kernel = kernels.gemm_splitK_INT_kernel
    kernel = kernel.fn.fn  # within the autotuner and the heuristics
    pointers = ("a_ptr", "c_ptr", "scales_ptr", "zeros_ptr", "scales_a_ptr")
    strides = ("am", "bk", "cm", "meta_a_m", "meta_a_g", "meta_g")
    fixed: dict[str, Any] = {
        **dict.fromkeys(("N", "K"), 8192),
        "W_nbits": 4,
        "group_size": 128,
        "unpack_mask": 15,
        "elements_per_sample": 8,
        "type_id": 0,
        "a_sizeof": 2,
        "b_sizeof": 4,
        "load_scales_as_block": False,
        **dict.fromkeys(("input_dtype", "output_dtype", "meta_dtype"), tl.float16),
        "acc_dtype": tl.float32,
        "channel_scale_mode": 0,
        "W_group_mode": 3,  # (code - zero) * scale
        "zero_is_scalar": False,
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 128,
        "BLOCK_SIZE_K": 128,
        "GROUP_SIZE_M": 8,
        "SPLIT_K": 1,
        "NUM_STAGES": 2,
        "A_load_order": 0,
        "data_contiguous": True,
        "EVEN_M": False,
        "EVEN_K": True,
        "EVEN_N": True,
        "meta_evict_policy": "",
        "atomic_mode": "relaxed",
        "a_evict": "evict_last",
        "b_evict": "evict_first",
        "meta_scale_norm_ptr": None,
        "use_tma": False,
        "use_5d_scales": False,
        "block_quant_size": 128,
        "warp_specialize": False,
    }
    signature = {
        **dict.fromkeys(pointers, "*fp16:16"),
        "b_ptr": "*i32:16",
        **dict.fromkeys(("M", "M_CLOSEST"), "i32"),
        **{f"stride_{name}": "i32:16" for name in strides},
        **dict.fromkeys(("stride_ak", "stride_bn", "stride_cn", "stride_meta_n"), "i32:1"),
    }
    variant = Variant(
        name="gemlite/matmul-16x128-4b-g128-asym-fp16",
        kernel=kernel,
        signature=signature,
        constexprs={name: fixed[name] for name in kernel.arg_names if name in fixed},
        role="peer",
        weights=("b_ptr",),
        packed_bytes=128 * 128 // 2,
        num_warps=4,
        num_stages=2,
        # Triton's tl.dot does not reach the tensor cores of sm_75.
        architectures=tuple(arch for arch in ARCHITECTURES if arch != "sm_75"),
    )
    return [variant]


@contextmanager
def _a_gpu() -> Iterator[None]:
    """Pretend, where there is no GPU, that there is one."""
    import torch
    import triton

    with ExitStack() as pretended:
        if not torch.cuda.is_available():
            h200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
            pretended.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=h200))
            pretended.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
            pretended.enter_context(mock.patch.object(triton.runtime.driver, "_active", mock.MagicMock()))
        yield
