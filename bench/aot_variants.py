"""Which kernels `ropewalk compile` compiles: those that launches would, by plan (gptq/tuned), width and grouping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from itertools import product
from typing import Any

from ropewalk.bench.aot import ARCHITECTURES, Variant

BITS = (2, 3, 4, 8)
GROUPS = (32, 128, -1)
# Bits, group size, zero points, dtype and act-order, where one choice stands for its width.
_ONE_OF_EACH = (
    (2, -1, False, "fp16", True),
    (3, 128, True, "fp16", True),
    (4, 32, True, "bf16", True),
    (4, 128, False, "fp16", True),
    (8, 128, True, "bf16", False),
)
_POINTERS = {"fp16": "*fp16:16", "bf16": "*bf16:16"}
# Plans named after a device are compiled for its architecture.
_DEVICES = {
    "sm_80": ("a100", "a800", "a30"),
    "sm_86": ("a10", "a40", "a6000", "rtx-30"),
    "sm_89": ("l4", "l40", "rtx-40", "ada"),
    "sm_90": ("h100", "h200", "h20", "h800", "gh200"),
    "sm_100": ("b200", "gb200"),
    "sm_120": ("rtx-50", "rtx-pro"),
}


def variants(every: bool = False) -> list[Variant]:
    """Return the kernels with the types and constants of their uses, for the architectures where they occur.

    Args:
        every: all combinations of width, group size, zero points, dtype and act-order for each plan, instead of
            some in which every pair of choices occurs.
    """
    return [*_matmuls(every), *_gate_up(), *_experts(), *_dequantize(every), *_reduce(), *_rope(), *_norm()]


def plan_files() -> dict[str, tuple[str, ...]]:
    """Return the files of plans that ship with the package, and the architectures whose devices read them."""
    names = sorted(
        file.name[:-5] for file in (files("ropewalk.gptq") / "tuned").iterdir() if file.name.endswith(".json")
    )
    found = {name: (name,) if name in ARCHITECTURES else _by_device(name) for name in names if name != "default"}
    own = {name for name in found if name in ARCHITECTURES}
    return {"default": tuple(arch for arch in ARCHITECTURES if arch not in own), **found}


def _by_device(name: str) -> tuple[str, ...]:
    return tuple(arch for arch, parts in _DEVICES.items() if any(f"-{part}" in f"-{name}" for part in parts))


def _choices(every: bool) -> list[tuple[int, int, bool, str, bool]]:
    """Return combinations of bits, group size, zero points, dtype and act-order."""
    dtypes = ("fp16", "bf16")
    if every:
        return list(product(BITS, GROUPS, (False, True), dtypes, (False, True)))
    # Twelve rows that hold every pair: each bit of b and their exclusive or, turned over by the parity of g.
    return [
        (bits, group, bool((b + g) % 2), dtypes[(b // 2 + g) % 2], bool((b + b // 2 + g) % 2))
        for (b, bits), (g, group) in product(enumerate(BITS), enumerate(GROUPS))
    ]


def _matmuls(every: bool) -> Iterator[Variant]:
    from ropewalk.gptq.plans import read_plans

    for name, architectures in plan_files().items():
        plans = read_plans(name)
        assert plans is not None  # its name comes from the folder
        for plan in plans.plans:
            if plan.kernel != "dense":
                for choice in _choices(every):
                    if plans.choose(plan.max_m or 1 << 30, choice[0]) is not plan:
                        continue  # another plan serves this width
                    yield _matmul(name, plan, architectures, *choice)


def _matmul(
    plans: str,
    plan: Any,
    architectures: tuple[str, ...],
    bits: int,
    group: int,
    zeros: bool,
    dtype: str,
    order: bool,
) -> Variant:
    """Return one matmul whose rows of x begin at multiples of 16 elements; with act-order, with a bias too."""
    import triton.language as tl

    from ropewalk.gptq.layout import PLANE, WORDS, rows_per_block
    from ropewalk.gptq.triton_decode import decode_kernel
    from ropewalk.gptq.triton_matmul import matmul_kernel

    fma = plan.kernel == "decode"
    constants = {
        "BITS": bits,
        "GROUP": max(group, 0),
        "HAS_ZEROS": zeros,
        "HAS_ORDER": order and not plan.gather,
        "HAS_BIAS": order,
        # Without tensor cores the kernel is written out for the number of tokens: one stands for all.
        "BLOCK_M": 1 if fma else plan.block_m,
        "BLOCK_N": plan.block_n,
        "WORDS": WORDS,
        "PLANES": rows_per_block(bits) // PLANE,
        "SPLIT_K": 1,
        "DTYPE": {"fp16": tl.float16, "bf16": tl.bfloat16}[dtype],
    }
    kernel = decode_kernel if fma else matmul_kernel
    pointer = _POINTERS[dtype]
    few = plan.max_m is not None and plan.max_m <= 16
    tile = f"{constants['BLOCK_M']}x{plan.block_n}"
    return Variant(
        name=f"{plans}/{plan.kernel}-{tile}-{_weight(bits, group, zeros, order)}-{dtype}",
        kernel=kernel,
        signature={"x": pointer, "stride_x": "i32:16", "bias": pointer, "out": pointer, "M": "i32"}
        | _weight_types(bits, zeros, order and not plan.gather),
        constexprs={name: value for name, value in constants.items() if name in kernel.arg_names},
        role="decode-fma" if fma else "decode" if few else "matmul",
        weights=("low", "high") if bits == 3 else ("low",),
        packed_bytes=plan.block_n * WORDS * (6 if bits == 3 else 4),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        architectures=architectures,
    )


def _gate_up() -> Iterator[Variant]:
    """Yield gate and up in one for every plan with tensor cores, with one choice for each width: the loop is that of
    the matmul.
    """
    from ropewalk.gptq.plans import read_plans
    from ropewalk.gptq.triton_gate_up import gate_up_kernel

    for name, architectures in plan_files().items():
        plans = read_plans(name)
        assert plans is not None  # its name comes from the folder
        for plan, choice in product(plans.plans, _ONE_OF_EACH):
            if plan.kernel == "matmul" and plans.choose(plan.max_m or 1 << 30, choice[0]) is plan:
                one = _matmul(name, plan, architectures, *choice)
                constants = {key: value for key, value in one.constexprs.items() if key in gate_up_kernel.arg_names}
                yield replace(one, name=one.name.replace("/", "/gate-up-"), kernel=gate_up_kernel, constexprs=constants)


def _experts() -> Iterator[Variant]:
    """Yield the matmul of experts for every plan that it can have, with one choice for each width: the loop is that
    of the matmul. Where a plan is for few tokens their assignments are not sorted. Then what stands around it.
    """
    from ropewalk.gptq.plans import read_plans
    from ropewalk.gptq.triton_align import align_kernel
    from ropewalk.gptq.triton_experts import MAX_REGISTERS, combine_kernel, experts_kernel, gather_kernel

    for name, architectures in plan_files().items():
        plans = read_plans(name)
        assert plans is not None  # its name comes from the folder
        for plan, choice in product(plans.plans, _ONE_OF_EACH):
            if plan.kernel != "dense" and plans.choose(plan.max_m or 1 << 30, choice[0]) is plan:
                one = _matmul(name, plan, architectures, *choice)
                few = plan.kernel == "decode" or (plan.max_m is not None and plan.max_m <= 8)
                constants = {"DTYPE": None, "SPLIT_K": 1} | dict(one.constexprs)
                numbers = dict.fromkeys(("A", "E", "sharing"), "i32")
                gated = plan.kernel == "matmul" and choice[3] == "bf16"  # half of them with gate and up in one
                yield replace(
                    one,
                    name=one.name.replace("/", "/experts-gate-up-" if gated else "/experts-"),
                    kernel=experts_kernel,
                    maxnreg=MAX_REGISTERS,
                    signature={**one.signature, "ids": "*i64:16", "slots": "*i32:16", "experts": "*i32:16", **numbers}
                    | dict.fromkeys(("stride_words", "stride_scales"), "i32:16"),
                    constexprs={
                        **constants,
                        "ALIGNED": not few,
                        "DOT": plan.kernel == "matmul",
                        **dict.fromkeys(("GATE_UP", "GATED"), gated),
                    },
                )
    for dtype in ("fp16", "bf16"):
        pointer, row = _POINTERS[dtype], dict.fromkeys(("stride_x", "K", "N"), "i32:16")
        shared = {"x": pointer, "out": pointer, "ids": "*i64:16", "order": "*i32:16", "A": "i32", "E": "i32", **row}
        yield Variant(
            name=f"experts-gather-{dtype}",
            kernel=gather_kernel,
            signature={**shared, "sharing": "i32"},
            constexprs={"BLOCK": 1024},
            role="reduce",
        )
        yield Variant(
            name=f"experts-combine-{dtype}",
            kernel=combine_kernel,
            signature={**shared, "parts": "*fp32:16", "bias": "*fp16:16", "weights": pointer},
            constexprs={"TOP_K": 2, "SPLIT_K": 2, "HAS_BIAS": True, "HAS_WEIGHTS": True, "BLOCK": 1024},
            role="reduce",
        )
    for bins, block_m in ((16, 16), (256, 64)):
        yield Variant(
            name=f"experts-align-{bins}",
            kernel=align_kernel,
            signature={"ids": "*i64:16", "slots": "*i32:16", "experts": "*i32:16"}
            | dict.fromkeys(("A", "E", "max_blocks"), "i32"),
            constexprs={"BINS": bins, "BLOCK_M": block_m, "CHUNK": 1024},
            role="reduce",
        )


def _dequantize(every: bool) -> Iterator[Variant]:
    from ropewalk.gptq.layout import PLANE, WORDS, rows_per_block
    from ropewalk.gptq.triton_dequantize import dequantize_kernel

    for bits, group, zeros, dtype, order in _choices(every):
        constants = {
            "BITS": bits,
            "GROUP": max(group, 0),
            "HAS_ZEROS": zeros,
            "HAS_ORDER": order,
            "BLOCK_N": 128,
            "WORDS": WORDS,
            "PLANES": rows_per_block(bits) // PLANE,
        }
        yield Variant(
            name=f"dequantize-{_weight(bits, group, zeros, order)}-{dtype}",
            kernel=dequantize_kernel,
            signature=_weight_types(bits, zeros, order) | {"out": _POINTERS[dtype]},
            constexprs=constants,
            role="dequantize",
            weights=("low", "high") if bits == 3 else ("low",),
            num_warps=8,
        )


def _reduce() -> Iterator[Variant]:
    from ropewalk.gptq.triton_gate_up import reduce_gate_up_kernel
    from ropewalk.gptq.triton_reduce import reduce_kernel

    for parts, split in (("*fp16:16", 1), ("*fp32:16", 4)):
        yield Variant(
            name=f"reduce-gate-up-{split}{'-bias' if split > 1 else ''}",
            kernel=reduce_gate_up_kernel,
            signature={"parts": parts, "bias": "*fp16:16", "out": "*fp16:16", "size": "i32:16", "N": "i32:16"},
            constexprs={"HAS_BIAS": split > 1, "SPLIT_K": split, "BLOCK": 512},
            role="reduce",
        )
    for split, bias in ((2, False), (16, True)):
        yield Variant(
            name=f"reduce-{split}{'-bias' if bias else ''}",
            kernel=reduce_kernel,
            signature={"parts": "*fp32:16", "bias": "*fp16:16", "out": "*fp16:16", "size": "i32:16", "N": "i32:16"},
            constexprs={"HAS_BIAS": bias, "SPLIT_K": split, "BLOCK": 512},
            role="reduce",
        )


def _weight(bits: int, group: int, zeros: bool, order: bool) -> str:
    return f"{bits}b-g{group}".replace("g-1", "none") + ("-asym" if zeros else "") + ("-act" if order else "")


def _weight_types(bits: int, zeros: bool, order: bool) -> dict[str, str]:
    """Return the types of what a packed weight hands to a kernel; what it lacks is given as the scales."""
    return {
        "low": "*i32:16",
        "high": "*i16:16" if bits == 3 else "*i32:16",
        "scales": "*fp16:16",
        "zeros": "*u8:16" if zeros else "*fp16:16",
        "order": "*i32:16" if order else "*fp16:16",
        "N": "i32:16",
        "K": "i32:16",
    }


def _rope() -> Iterator[Variant]:
    """Yield what Llama-2 13B (40 heads of 128) and its kin need: prompts, single tokens with a cache, tables."""
    yield _rotate("rope-prompt-fp16", tokens=4096, dtype="fp16")
    yield _rotate("rope-prompt-bf16", tokens=4096, dtype="bf16")
    yield _rotate("rope-prompt-fp16-interleaved", tokens=4096, dtype="fp16", interleaved=True)
    yield _rotate("rope-prompt-fp16-table", tokens=4096, dtype="fp16", table=True)
    yield _rotate("rope-token-fp16", tokens=1, dtype="fp16")
    yield _rotate("rope-token-fp16-cache", tokens=1, dtype="fp16", cache=True)
    yield _rotate("rope-token-bf16-cache", tokens=1, dtype="bf16", cache=True)


def _rotate(
    name: str, tokens: int, dtype: str, interleaved: bool = False, table: bool = False, cache: bool = False
) -> Variant:
    """Return the in-place rotation of q and k [batch, heads, seq, 128] whose last stride is 1."""
    from ropewalk.rope.triton_rope import plan, rope_kernel

    block_s, block_h, warps = plan(tokens, 40, 64)
    pointer = _POINTERS[dtype]
    absent = [] if cache else ["v", "k_cache", "v_cache", "slots"]
    absent += ["inv_freq", "position_ids"] if table else ["cos", "sin"]
    strides = ("i32:16", "i32:16", "i32:16", "i32:1")
    nothing = ("i32:16",) * 4  # zeros
    signature = {
        **dict.fromkeys(("q", "q_out", "k", "k_out", "v", "k_cache", "v_cache", "cos", "sin"), pointer),
        **dict.fromkeys(("slots", "position_ids"), "*i64:16"),
        "inv_freq": "*fp32:16",
        **dict.fromkeys(("q_strides", "q_out_strides", "k_strides", "k_out_strides"), strides),
        **dict.fromkeys(("v_strides", "k_cache_strides", "v_cache_strides"), strides if cache else nothing),
        "slots_strides": ("i32:16", "i32:1") if cache else nothing[:2],
        "position_strides": nothing[:2] if table else ("i32:16", "i32:1"),
        **dict.fromkeys(("cos_strides", "sin_strides"), strides if table else nothing),
        **dict.fromkeys(("tokens", "seq_len", "cache_len", "q_heads", "k_heads"), "i32"),
        "attention_scaling": "fp32",
    }
    constants = {
        "DIM": 128,
        "HEAD_DIM": 128,
        "V_DIM": 128 if cache else 0,
        "INTERLEAVED": interleaved,
        "INVERSE": False,
        "IN_PLACE": True,
        "BLOCK_S": block_s,
        "BLOCK_H": block_h,
        **dict.fromkeys(absent),
    }
    return Variant(
        name=name,
        kernel=rope_kernel,
        signature=signature,
        constexprs=constants,
        role="rope",
        num_warps=warps,
    )


def _norm() -> Iterator[Variant]:
    """Yield the norms of Llama-2 7B and 13B (5120 channels) and of longer rows, with and without what is optional."""
    yield _normalize("norm-fp16", channels=5120, dtype="fp16")
    yield _normalize("norm-bf16-order", channels=4096, dtype="bf16", order=True)
    yield _normalize("norm-fp16-add", channels=5120, dtype="fp16", add=True)
    yield _normalize("norm-fp16-add-order", channels=5120, dtype="fp16", add=True, order=True)
    yield _normalize("norm-bf16-add-order", channels=8192, dtype="bf16", add=True, order=True)
    yield _normalize("norm-fp16-add-order-long", channels=16384, dtype="fp16", add=True, order=True)


def _normalize(name: str, channels: int, dtype: str, add: bool = False, order: bool = False) -> Variant:
    from ropewalk.norm.triton_norm import MAX_REGISTERS, norm_kernel, plan

    block, warps = plan(channels)
    absent = ([] if add else ["y", "total"]) + ([] if order else ["order"])
    return Variant(
        name=name,
        kernel=norm_kernel,
        signature=dict.fromkeys(("x", "y", "weight", "total", "normed"), _POINTERS[dtype])
        | {"order": "*i32:16", "stride_x": "i32:16", "stride_y": "i32:16", "eps": "fp32"},
        constexprs={"K": channels, "BLOCK": block, **dict.fromkeys(absent)},
        role="norm",
        num_warps=warps,
        maxnreg=MAX_REGISTERS,
    )
