"""`ropewalk tune`: find the plans (gptq/plans.py) that are fastest on this device.

For each number of tokens every candidate runs every shape and width, in one CUDA graph over weights enough to
pass the cache, and what counts is the geometric mean of its times: a plan is chosen for all shapes at once, so
that it does not fit the noise of one. A width gets a plan of its own where that is faster by more than GAIN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ropewalk.bench.peers.weight import Weight, random_weight
from ropewalk.bench.timing import Rotation, copies, measure
from ropewalk.errors import RopewalkError
from ropewalk.gptq.few_tokens import MOST_TOKENS
from ropewalk.gptq.layout import row_order, to_execution
from ropewalk.gptq.plans import Plan, split_k
from ropewalk.gptq.triton_linear import packed_linear

# The largest number of tokens of each plan; timed at that number.
BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256)
GAIN = 0.03
PROGRAMS = (1, 2, 3, 4, 6, 8)  # for each multiprocessor


@dataclass(frozen=True)
class Case:
    """One packed weight, in copies that rotate: the arguments of `packed_linear` after x."""

    bits: int
    group_size: int
    in_features: int
    out_features: int
    arguments: list[tuple[Any, ...]]


def cases(
    shapes: Sequence[tuple[int, int]], widths: Sequence[int], device: torch.device, rotate: int | None = None
) -> list[Case]:
    """Return layers of the given (K, N) and widths: act-order in groups of 128, symmetric, as most files are.

    Args:
        rotate: bytes to fill with copies of each; see `timing.copies`.
    """
    made = []
    for (rows, columns), bits in ((shape, bits) for shape in shapes for bits in widths):
        group_size = min(128, rows)
        weight: Weight = random_weight(
            in_features=rows,
            out_features=columns,
            bits=bits,
            group_size=group_size,
            desc_act=True,
            sym=True,
            device=device,
        )
        order = row_order(weight.g_idx, group_size)
        words = to_execution(weight.qweight, bits, order)
        arguments = [
            (words.clone(), weight.scales.clone(), None, order, None)
            for _ in range(copies(words.nbytes, device, rotate))
        ]
        made.append(Case(bits, group_size, rows, columns, arguments))
    return made


def candidates(m: int, *, tensor_cores: bool = True, cuda: bool = False) -> Iterator[Plan]:
    """Return the plans worth trying for m tokens.

    Args:
        tensor_cores: whether Triton reaches them (not on sm_75).
        cuda: whether there is NVRTC for the kernel in CUDA C++.
    """
    most = 1 << (m - 1).bit_length()
    if cuda and m <= MOST_TOKENS:
        for block_n, warps, stages in itertools.product((16, 32, 64), (4, 8, 16), (4, 6)):
            yield Plan(m, "cuda", block_n=block_n, num_warps=warps, num_stages=stages)
    if m > 32:
        yield Plan(m, "dense")
    if not tensor_cores:
        if m <= 8:
            for block_n, warps in ((32, 4), (64, 4), (64, 8), (128, 8)):
                yield Plan(m, "decode", block_n=block_n, num_warps=warps, num_stages=2)
        return
    for block_m in (8, 16, 32, 64, 128):
        if block_m > max(most, 8) or block_m * 4 < most:
            continue
        for block_n in (64, 128):
            for warps in (4, 8):
                for stages in (3, 5):
                    for gather in (False, True) if m <= 16 else (True,):
                        yield Plan(m, "matmul", block_m, block_n, gather, warps, stages)


def tune(
    made: Sequence[Case],
    *,
    device: torch.device,
    seconds: float,
    buckets: Sequence[int] = BUCKETS,
    tensor_cores: bool = True,
    cuda: bool = False,
    multiprocessors: int = 64,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return {"programs_per_multiprocessor", "plans"} as a file of plans has them.

    Args:
        made: as `cases` returns them.
        seconds: how long each candidate runs on each case.
        say: called with a line for each choice.
    """
    first = next(iter(candidates(1, tensor_cores=tensor_cores)))
    programs = _best(
        [(f"{count} programs", partial(_split_call, first, count * multiprocessors)) for count in PROGRAMS],
        made,
        1,
        device,
        seconds,
    )[0]
    wanted = PROGRAMS[programs]
    say(f"{wanted} programs for each multiprocessor")
    plans: list[Plan] = []
    for m in buckets:
        tried = list(candidates(m, tensor_cores=tensor_cores, cuda=cuda))
        if not tried:
            continue
        named = [(repr(plan), partial(_split_call, plan, wanted * multiprocessors)) for plan in tried]
        best, scores = _best(named, made, m, device, seconds)
        for bits in sorted({case.bits for case in made}):
            own = [i for i, case in enumerate(made) if case.bits == bits]
            theirs = min(range(len(tried)), key=lambda j: _mean(scores[j], own))
            if theirs != best and _mean(scores[theirs], own) < (1 - GAIN) * _mean(scores[best], own):
                plans.append(replace(tried[theirs], bits=(bits,)))
                say(f"up to {m} tokens, {bits} bits: {tried[theirs]}")
        plans.append(tried[best])
        say(f"up to {m} tokens: {tried[best]}")
    plans.append(Plan(None, "dense"))
    return {"programs_per_multiprocessor": wanted, "plans": [_as_json(plan) for plan in plans]}


def _split_call(plan: Plan, wanted: int, case: Case, m: int, x: torch.Tensor, index: int) -> torch.Tensor:
    columns, rows = -(-case.out_features // plan.block_n), -(-m // plan.block_m)
    split = 1 if plan.kernel in ("cuda", "dense") else split_k(columns * rows, case.in_features, case.bits, wanted)
    weight = case.arguments[index]
    return packed_linear(x, *weight, bits=case.bits, group_size=case.group_size, plan=plan, split=split)


def _best(
    named: Sequence[tuple[str, Callable[..., torch.Tensor]]],
    made: Sequence[Case],
    m: int,
    device: torch.device,
    seconds: float,
) -> tuple[int, list[list[float]]]:
    """Return which candidate has the least mean, and the logarithm of each one's seconds on each case."""
    scores: list[list[float]] = [[] for _ in named]
    for case in made:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        x = torch.randn(m, case.in_features, device=device, dtype=dtype)
        for score, (name, call) in zip(scores, named, strict=True):
            # One at a time: the graphs of all together would not fit, and a candidate that fails is only left out.
            try:
                turns = Rotation([partial(call, case, m, x, i) for i in range(len(case.arguments))], device)
            except (RuntimeError, RopewalkError):  # more shared memory or threads than the device has
                score.append(math.inf)
                continue
            timings, failed = measure({name: turns.sample}, seconds)
            score.append(math.inf if failed else math.log(timings[name].seconds))
    return min(range(len(named)), key=lambda j: sum(scores[j])), scores


def _mean(score: Sequence[float], which: Sequence[int]) -> float:
    """Return the geometric mean of the seconds on some cases."""
    return math.exp(sum(score[i] for i in which) / len(which))


def _as_json(plan: Plan) -> dict[str, Any]:
    if plan.kernel == "dense":
        return {"max_m": plan.max_m, "kernel": "dense"}
    found: dict[str, Any] = {"max_m": plan.max_m, "kernel": plan.kernel}
    if plan.kernel == "matmul":
        found |= {"block_m": plan.block_m, "gather": plan.gather}
    # What "cuda" takes of block_m and gather is settled by the number of tokens.
    found |= {"block_n": plan.block_n, "num_warps": plan.num_warps, "num_stages": plan.num_stages}
    return found | ({"bits": list(plan.bits)} if plan.bits else {})
