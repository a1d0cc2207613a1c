"""The packed matmul on a GPU: picks the plan, allocates, launches."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.gptq import few_tokens
from ropewalk.gptq.layout import PLANE, WORDS, bit_planes, rows_per_block
from ropewalk.gptq.plans import Plan, device_plans, split_k
from ropewalk.gptq.triton_decode import decode_kernel
from ropewalk.gptq.triton_dequantize import dequantize
from ropewalk.gptq.triton_gate_up import gate_up_kernel, reduce_gate_up_kernel
from ropewalk.gptq.triton_matmul import matmul_kernel
from ropewalk.gptq.triton_reduce import reduce_kernel

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_REDUCE_BLOCK = 512
_DENSE = Plan(None, "dense")


def packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    gate_up: bool = False,
    plan: Plan | None = None,
    split: int | None = None,
) -> Tensor:
    """Return x @ W + bias for a weight in the execution layout (layout.py).

    Args:
        x: [..., K], float16, bfloat16 or float32; rows may be strided.
        words: int32 [word_rows(K, bits), N].
        scales: [G, N], any floating dtype.
        zeros: uint8 [G, N], or None where all are 2 ** (bits - 1).
        order: int32 [K], the checkpoint row of each sorted row; None where none was moved.
        bias: [N] or None.
        group_size: -1, at least K, or a multiple of PLANE (`layout.supports`).
        gate_up: W holds gate and up as `layout.interleave` puts them: return silu(x @ gate) * (x @ up).
        plan, split: instead of those for the device.

    Returns:
        [..., N] (with gate_up [..., N / 2]) in x's dtype, accumulated in float32 and rounded once; twice where
        the plan is "dense", since the weight is rounded to x's dtype as well. Two runs give the same bits.
    """
    if x.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        # The interpreter computes with the bits of bfloat16 numbers, not with their values.
        settings = {"bits": bits, "group_size": group_size, "gate_up": gate_up, "plan": plan, "split": split}
        return packed_linear(x.float(), words, scales, zeros, order, bias, **settings).to(x.dtype)  # type: ignore[arg-type]
    *leading, in_features = x.shape
    columns = words.shape[1]
    rows = x.reshape(-1, in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    m = rows.shape[0]
    plans, multiprocessors = device_plans(x.device)
    if plan is None:

        def cuda_takes(plan: Plan) -> bool:
            tiles = plan.block_n // 16
            return few_tokens.takes(x, words, scales, bias, bits=bits, group_size=group_size, tiles=tiles)

        plan = plans.choose(m, bits, cuda_takes)
        if x.dtype == torch.float32 and m > 8 and plan.kernel == "matmul":
            # No tensor core multiplies float32, and twice as wide tiles ask for more shared memory than some have.
            plan = _DENSE
    kept = columns // 2 if gate_up else columns
    if m == 0:
        return x.new_empty((*leading, kept))
    if plan.kernel == "dense":
        weight = dequantize(
            words, scales, zeros, order, bits=bits, group_size=group_size, in_features=in_features, dtype=x.dtype
        )
        y = torch.nn.functional.linear(rows, weight.t(), None if bias is None else bias.to(x.dtype))
        if gate_up:
            y = _reduce(y[None], None, True, x.dtype)
        return y.reshape(*leading, kept)
    if order is not None and plan.gather:
        rows, order = rows.index_select(1, order), None
    if plan.kernel == "cuda":
        y = few_tokens.few_tokens(
            rows,
            words,
            scales,
            zeros,
            order,
            bias,
            bits=bits,
            group_size=group_size,
            tiles=plan.block_n // 16,
            warps=plan.num_warps,
            stages=plan.num_stages,
            split=split or 1,
            gate_up=gate_up,
        )
        return (_reduce(y, bias, gate_up, x.dtype) if y.ndim == 3 else y).reshape(*leading, kept)
    block_m = triton.next_power_of_2(m) if plan.kernel == "decode" else plan.block_m
    grid_n, grid_m = triton.cdiv(columns, plan.block_n), triton.cdiv(m, block_m)
    if split is None:
        split = split_k(grid_n * grid_m, in_features, bits, plans.programs_per_multiprocessor * multiprocessors)
    if gate_up and (plan.kernel == "decode" or columns % 16 or plan.block_n < 16):
        # Without whole tiles of tensor cores a second step gates the product, as where K is split.
        split = max(split, 2)
    shape, dtype = ((m, kept), x.dtype) if split == 1 else ((split, m, columns), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    low, high = bit_planes(words, bits)
    arguments = (
        rows,
        low,
        low if high is None else high,
        scales,
        scales if zeros is None else zeros,
        scales if order is None else order,
        scales if bias is None else bias,
        out,
        m,
        columns,
        in_features,
        rows.stride(0),
    )
    constants = {
        "BITS": bits,
        "GROUP": 0 if group_size == -1 or group_size >= in_features else group_size,
        "HAS_ZEROS": zeros is not None,
        "HAS_ORDER": order is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": block_m,
        "BLOCK_N": plan.block_n,
        "WORDS": WORDS,
        "PLANES": rows_per_block(bits) // PLANE,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    if plan.kernel == "decode":
        decode_kernel[(grid_n, split)](*arguments, SPLIT_K=split, **constants)
    elif gate_up and split == 1:
        gate_up_kernel[(grid_m, grid_n)](*arguments, DTYPE=DTYPES[x.dtype], **constants)
    else:
        matmul_kernel[(grid_m, grid_n, split)](*arguments, SPLIT_K=split, DTYPE=DTYPES[x.dtype], **constants)
    return (_reduce(out, bias, gate_up, x.dtype) if split > 1 else out).reshape(*leading, kept)


def _reduce(parts: Tensor, bias: Tensor | None, gate_up: bool, dtype: torch.dtype) -> Tensor:
    """Add the parts [split, M, N] of a product in order; return it, or with gate_up what it gates, in `dtype`."""
    split, m, columns = parts.shape
    out = torch.empty(m, columns // 2 if gate_up else columns, dtype=dtype, device=parts.device)
    size = out.numel()
    kernel = reduce_gate_up_kernel if gate_up else reduce_kernel
    has_bias = bias is not None
    kernel[(triton.cdiv(size, _REDUCE_BLOCK),)](
        *(parts, bias if has_bias else parts, out, size, columns),
        HAS_BIAS=has_bias,
        SPLIT_K=split,
        BLOCK=_REDUCE_BLOCK,
        num_warps=4,
    )
    return out
