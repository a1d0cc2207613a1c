"""The packed matmul of all experts on a GPU: picks the plan, allocates, launches."""

from __future__ import annotations

import os

import torch
import triton
from torch import Tensor

from ropewalk.gptq.experts import both_halves, weighted_sum
from ropewalk.gptq.layout import PLANE, WORDS, rows_per_block
from ropewalk.gptq.plans import Plan, Plans, device_plans, split_k
from ropewalk.gptq.reference import silu_times
from ropewalk.gptq.triton_align import align, most_blocks
from ropewalk.gptq.triton_dequantize import dequantize
from ropewalk.gptq.triton_experts import (
    MAX_REGISTERS,
    combine_gate_up_kernel,
    combine_kernel,
    experts_kernel,
    gather_kernel,
)
from ropewalk.gptq.triton_linear import DTYPES

_ROW_BLOCK = 1024  # columns of one program of the kernels around the matmul


def packed_experts(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    expert_ids: Tensor,
    routing_weights: Tensor | None,
    *,
    bits: int,
    group_size: int,
    gate_up: bool = False,
    plan: Plan | None = None,
    split: int | None = None,
    aligned: bool | None = None,
) -> Tensor:
    """Return what the operator of the same name does (ops_experts.py), without waiting for the device.

    Args:
        plan, split, aligned: instead of those for the device and the number of tokens; aligned tells whether
            assignments are sorted by expert.

    Returns:
        [T, top_k, N], or [T, N] by routing_weights, in x's dtype: accumulated in float32 and rounded once (where
        the plan is "dense" the weight and each expert's product are rounded to x's dtype as well).
    """
    if x.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        # The interpreter computes with the bits of bfloat16 numbers, not with their values.
        settings = {"bits": bits, "group_size": group_size, "gate_up": gate_up, "plan": plan, "split": split}
        settings |= {"aligned": aligned}
        weights = None if routing_weights is None else routing_weights.float()
        wide = packed_experts(x.float(), words, scales, zeros, order, bias, expert_ids, weights, **settings)  # type: ignore[arg-type]
        return wide.to(x.dtype)
    tokens, top_k = expert_ids.shape
    experts, columns = words.shape[0], words.shape[-1]
    in_features, assignments = x.shape[-1], tokens * top_k
    shape = (tokens, top_k, columns) if routing_weights is None else (tokens, columns)
    if assignments == 0:
        return x.new_zeros(shape)
    plans, multiprocessors = device_plans(x.device)
    plan = plan or plan_for(plans, -(-assignments // experts), bits)
    if plan.kernel == "dense":
        if gate_up:
            halves = both_halves(words, scales, zeros, bias)
            return silu_times(*(_dense(x, *half, order, expert_ids, bits, group_size) for half in halves))
        y = _dense(x, words, scales, zeros, bias, order, expert_ids, bits, group_size)
        return y if routing_weights is None else weighted_sum(y, expert_ids, routing_weights, experts)
    rows, sharing = x.reshape(-1, in_features), top_k if x.ndim == 2 else 1
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    ids = expert_ids.reshape(-1).contiguous()
    order, bias = (None if t is None else t.contiguous() for t in (order, bias))
    if plan.gather and order is not None:
        moved = torch.empty(assignments, in_features, dtype=x.dtype, device=x.device)
        gather_kernel[(assignments, triton.cdiv(in_features, _ROW_BLOCK))](
            rows, order, ids, moved, experts, in_features, sharing, rows.stride(0), BLOCK=_ROW_BLOCK, num_warps=4
        )
        rows, sharing, order = moved, 1, None
    dot = plan.kernel == "matmul"
    if aligned is None:
        # With no more assignments than experts hardly two of them share a weight.
        aligned = dot and assignments > experts
    block_m = plan.block_m if dot else 1
    slots, of_block = align(ids, experts, block_m) if aligned else (ids, ids)
    blocks = most_blocks(assignments, experts, block_m) if aligned else assignments
    grid_n = triton.cdiv(-(-columns // 8) * 16 if gate_up else columns, plan.block_n)
    if split is None:
        split = split_k(blocks * grid_n, in_features, bits, plans.programs_per_multiprocessor * multiprocessors)
    # Without whole tiles of tensor cores a second step gates the products.
    gated = gate_up and split == 1 and dot and plan.block_n >= 16
    combined = split > 1 or routing_weights is not None or (gate_up and not gated)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    parts = out
    if combined:
        width = 2 * columns if gate_up else columns
        parts = torch.empty(split, assignments, width, dtype=torch.float32, device=x.device)
    low, high = stacked_planes(words, bits)
    if zeros is not None and zeros.stride(0) != scales.stride(0):
        scales, zeros = scales.contiguous(), zeros.contiguous()
    experts_kernel[(blocks, grid_n, split)](
        rows,
        low,
        high,
        scales,
        scales if zeros is None else zeros,
        scales if order is None else order,
        scales if bias is None else bias,
        ids,
        slots,
        of_block,
        parts,
        assignments,
        experts,
        columns,
        in_features,
        sharing,
        rows.stride(0),
        words.stride(0),
        scales.stride(0),
        BITS=bits,
        GROUP=0 if group_size == -1 or group_size >= in_features else group_size,
        HAS_ZEROS=zeros is not None,
        HAS_ORDER=order is not None,
        HAS_BIAS=bias is not None and not combined,
        ALIGNED=aligned,
        DOT=dot,
        BLOCK_M=block_m,
        BLOCK_N=plan.block_n,
        WORDS=WORDS,
        PLANES=rows_per_block(bits) // PLANE,
        SPLIT_K=split,
        DTYPE=DTYPES[x.dtype],
        GATE_UP=gate_up,
        GATED=gated,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **({} if torch.version.hip else {"maxnreg": MAX_REGISTERS}),
    )
    if combined and gate_up:
        combine_gate_up_kernel[(assignments, triton.cdiv(columns, _ROW_BLOCK))](
            *(parts, scales if bias is None else bias, ids, out, assignments, experts, columns),
            SPLIT_K=split,
            HAS_BIAS=bias is not None,
            BLOCK=_ROW_BLOCK,
            num_warps=4,
        )
    elif combined:
        weighted = routing_weights is not None
        combine_kernel[(tokens if weighted else assignments, triton.cdiv(columns, _ROW_BLOCK))](
            parts,
            scales if bias is None else bias,
            ids,
            ids if routing_weights is None else routing_weights.contiguous(),
            out,
            assignments,
            experts,
            columns,
            TOP_K=top_k if weighted else 1,
            SPLIT_K=split,
            HAS_BIAS=bias is not None,
            HAS_WEIGHTS=weighted,
            BLOCK=_ROW_BLOCK,
            num_warps=4,
        )
    return out


def plan_for(plans: Plans, tokens: int, bits: int) -> Plan:
    """Return the plan for experts of so many tokens each, on average.

    "dense" only where the device has no plan with tensor cores: how many tokens an expert has is known on the
    device alone, and the matmul library is told sizes by the host.
    """
    chosen = plans.choose(tokens, bits)
    if chosen.kernel != "dense":
        return chosen
    able = [plan for plan in plans.plans if plan.kernel == "matmul" and (not plan.bits or bits in plan.bits)]
    return able[-1] if able else chosen


def stacked_planes(words: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the words of a stack as the kernels address them, flat: int32, and for 3 bits the high plane of the
    first expert and what follows it as int16, otherwise the same words again.
    """
    # Experts may be more than a weight apart.
    flat = words.as_strided(
        (sum((n - 1) * step for n, step in zip(words.shape, words.stride(), strict=True)) + 1,), (1,)
    )
    if bits != 3:
        return flat, flat
    *_, rows, columns = words.shape
    return flat, flat.view(torch.int16)[2 * (rows // 3 * 2) * columns :]


def _dense(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    expert_ids: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return [T, top_k, N]: every expert multiplies every row, and each assignment takes its own. That is several
    times the work, but no size depends on the routing.
    """
    out = x.new_zeros(*expert_ids.shape, words.shape[2])
    rows = x[:, None] if x.ndim == 2 else x
    for expert in range(words.shape[0]):
        weight = dequantize(
            words[expert],
            scales[expert],
            None if zeros is None else zeros[expert],
            None if order is None else order[expert],
            bits=bits,
            group_size=group_size,
            in_features=x.shape[-1],
            dtype=x.dtype,
        )
        y = torch.nn.functional.linear(rows, weight.t(), None if bias is None else bias[expert].to(x.dtype))
        out = torch.where((expert_ids == expert)[..., None], y, out)
    return out
