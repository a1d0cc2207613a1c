"""Operators that are computed in plain torch until the kernels of the CPU are there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ropewalk import cpu

Function = TypeVar("Function", bound=Callable[..., Any])


def unless_in_cpp(name: str, in_torch: str, mutates_args: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Have the first call on the CPU load the C++ kernel of operator `name`, which takes all later ones itself, where
    it is built.

    The function stays within reach of the kernel as an operator of its own, `in_torch`: it is given what C++ does
    not take, and every mistake.
    """

    def decorate(function: Function) -> Function:
        torch.library.define(in_torch, torch.library.infer_schema(function, mutates_args=mutates_args))
        torch.library.impl(in_torch, "CPU")(function)

        @functools.wraps(function)
        def first(x: Tensor, *args: object, **kwargs: object) -> object:
            if x.is_cpu and cpu.load(build_it=False) and _has_kernel(name):
                return getattr(torch.ops.ropewalk, name)(x, *args, **kwargs)
            return function(x, *args, **kwargs)

        return cast("Function", first)

    return decorate


def _has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ropewalk::{name}", "CPU")
