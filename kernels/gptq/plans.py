"""Which kernel serves how many tokens, and with what block sizes: read from data files, never tuned on the fly.

A file holds the plans of one device, named by the device ("nvidia-h200.json") or by its architecture
("sm_75.json"); default.json serves the rest. What `ropewalk tune` wrote (`user_folder`) goes before what ships
in `tuned/`. `measured` says on what and when a file was tuned, null where it was not. The first plan whose
`max_m` is not below the number of tokens counts.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ropewalk.errors import FormatError
from ropewalk.gptq.few_tokens import MOST_TOKENS
from ropewalk.gptq.layout import rows_per_block

KERNELS = ("cuda", "decode", "matmul", "dense")
_POWERS = tuple(1 << i for i in range(11))


@dataclass(frozen=True)
class Plan:
    """How one matmul runs.

    Attributes:
        max_m: the most tokens it is for; None for any number.
        kernel: "cuda" (few_tokens), "decode" (triton_decode), "matmul" (triton_matmul) or "dense" (dequantized whole,
            then the matmul library).
        block_m, block_n: tokens and columns of one program; "cuda" takes all tokens.
        gather: whether the activations are brought into the weight's order by a step of their own, not as they
            are loaded: an access by 2 bytes keeps many tokens from being loaded ahead.
        bits: the only widths it is for; empty for all.
    """

    max_m: int | None
    kernel: str
    block_m: int = 16
    block_n: int = 64
    gather: bool = False
    num_warps: int = 4
    num_stages: int = 3
    bits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plans:
    """The plans of one device, and how many programs keep one of its multiprocessors busy."""

    plans: tuple[Plan, ...]
    programs_per_multiprocessor: int
    measured: str | None

    def choose(self, m: int, bits: int, cuda_takes: Callable[[Plan], bool] | None = None) -> Plan:
        """Return the plan for m tokens and a weight of so many bits.

        Args:
            cuda_takes: whether a plan with the kernel "cuda" can be followed; without it none can.
        """
        return next(
            p
            for p in self.plans
            if (p.max_m is None or m <= p.max_m)
            and (not p.bits or bits in p.bits)
            and (p.kernel != "cuda" or (cuda_takes is not None and cuda_takes(p)))
        )


def user_folder() -> Path:
    """Return where `ropewalk tune` writes plans: $ROPEWALK_TUNED, or ropewalk/tuned in the user's configuration."""
    chosen = os.environ.get("ROPEWALK_TUNED")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config", "ropewalk/tuned").expanduser()


def read_plans(name: str) -> Plans | None:
    """Return the plans in <name>.json, the user's or those that ship, or None where there is no such file.

    Raises:
        FormatError: a file that holds something else.
    """
    for folder in (user_folder(), files("ropewalk.gptq") / "tuned"):
        file = folder / f"{name}.json"
        if file.is_file():
            return parse_plans(file.read_text(encoding="utf-8"), str(file))
    return None


def parse_plans(text: str, file: str) -> Plans:
    """Return the plans in a file's text.

    Raises:
        FormatError: naming the file, and what in it is not as it should be.
    """
    try:
        data = json.loads(text)
        plans = tuple(Plan(**{**plan, "bits": tuple(plan.get("bits", ()))}) for plan in data["plans"])
        found = Plans(plans, int(data["programs_per_multiprocessor"]), data["measured"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(
            "plans", "the form of gptq/tuned/default.json", f"{type(error).__name__}: {error}", file
        ) from None
    for plan in plans:
        sizes: dict[str, Any] = {"block_m": plan.block_m, "block_n": plan.block_n, "num_warps": plan.num_warps}
        odd = [f"{key} {value}" for key, value in sizes.items() if value not in _POWERS]
        if plan.kernel not in KERNELS or odd:
            found_here = ", ".join(odd) or repr(plan.kernel)
            raise FormatError("plans", f"{', '.join(KERNELS)}, and powers of two for sizes", found_here, file)
        if plan.kernel == "cuda" and (plan.max_m is None or plan.max_m > MOST_TOKENS or plan.block_n < 16):
            found_here = f"max_m {plan.max_m}, block_n {plan.block_n}"
            raise FormatError(
                "plans", f"for cuda at most {MOST_TOKENS} tokens and at least 16 columns", found_here, file
            )
    if not any(plan.max_m is None and not plan.bits for plan in plans):
        raise FormatError("plans", "one for any number of tokens and all widths", "none", file)
    return found


@functools.cache
def device_plans(device: torch.device) -> tuple[Plans, int]:
    """Return the plans for a device and its number of multiprocessors. The CPU stands for a device of 64."""
    names, multiprocessors = ["default"], 64
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        multiprocessors = properties.multi_processor_count
        names = [device_slug(properties.name), f"sm_{properties.major}{properties.minor}", *names]
    return next(plans for name in names if (plans := read_plans(name)) is not None), multiprocessors


def device_slug(name: str) -> str:
    """Return a device's name as a file name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def split_k(programs: int, in_features: int, bits: int, wanted: int) -> int:
    """Return into how many parts K is split so that about `wanted` programs run, if K has that many blocks.

    A power of two up to 16: each is a specialization of the kernel, and the parts are read once more. Three quarters
    of what is wanted are enough not to double it.
    """
    blocks = -(-in_features // rows_per_block(bits))
    split = 1
    while split < 16 and 4 * programs * split < 3 * wanted and 2 * split <= blocks:
        split *= 2
    return split
