"""What a benchmark wants of a kernel, ours or another's."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ropewalk.bench.peers.weight import Weight


class Packed(Protocol):
    """How something is packed: a weight, or a whole model."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def group_size(self) -> int:
        """Rows that share a scale, or -1."""

    @property
    def act_order(self) -> bool:
        """Whether rows of a group lie apart."""

    @property
    def sym(self) -> bool:
        """Whether there are no zero points."""


class Program:
    """Something that computes with packed weights, and that may be installed or not.

    Attributes:
        name: its name in tables and for --peers.
        package: what must be importable, or "".
        devices: where it runs.
        bits, group_sizes: what it can hold; group_sizes None for any.
        act_order, asymmetric: whether it can hold those.
        dtypes: those it computes in; another one is replaced by the first.
        by_default: devices, among those, on which it is timed without being named.
    """

    name = ""
    package = ""
    devices: tuple[str, ...] = ("cuda",)
    bits: tuple[int, ...] = (4,)
    group_sizes: tuple[int, ...] | None = None
    act_order = False
    asymmetric = True
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    by_default: tuple[str, ...] = ("cpu", "cuda")

    def available(self, device: torch.device) -> str | None:
        """Return why it cannot run here, or None."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return why_missing(self.package) if self.package else None

    def cannot_hold(self, packed: Packed) -> str | None:
        """Return why it cannot hold what is packed so, or None."""
        if packed.bits not in self.bits:
            return f"has no {packed.bits}-bit kernel"
        if self.group_sizes is not None and packed.group_size not in self.group_sizes:
            return f"has no groups of {packed.group_size}" if packed.group_size > 0 else "needs groups"
        if packed.act_order and not self.act_order:
            return "has no act-order"
        if not packed.sym and not self.asymmetric:
            return "has no zero points"
        return None

    def dtype(self, asked: torch.dtype) -> torch.dtype:
        """Return the dtype it computes in when `asked` is wanted."""
        return asked if asked in self.dtypes else self.dtypes[0]


class Peer(Program, ABC):
    """A way to multiply with a packed weight.

    A subclass says what it needs and can hold, and turns a weight into a function. Nothing of a peer's package
    is imported before `prepare`.

    Attributes:
        dense: whether it keeps the weight unpacked, in the dtype it computes in.
        most_copies: over how many copies of a weight to rotate at most, where each of them is slow to make.
        mode: which of our kernels for the CPU it is; None for what has no such choice.
    """

    dense = False
    most_copies = 192
    mode: str | None = None

    def refuses(self, weight: Weight) -> str | None:
        """Return why it cannot hold a weight, or None."""
        return self.cannot_hold(weight)

    def nbytes(self, weight: Weight, dtype: torch.dtype) -> int:
        """Return the fewest bytes of the weight that it must read."""
        return weight.in_features * weight.out_features * dtype.itemsize if self.dense else weight.nbytes

    @abstractmethod
    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return a function x [M, K] -> x @ W [M, N] in dtype, with buffers of its own.

        It may take the weight's tensors for itself.
        """


def why_missing(package: str) -> str | None:
    """Return None if a package can be imported, by the look of it, or that it cannot."""
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def imported(name: str) -> Any:
    """Import an optional module; its types are not known here."""
    return importlib.import_module(name)
