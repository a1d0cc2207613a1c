"""Rotary embeddings, ours and others', in the form that a transformers model calls them.

q and k arrive as views [1, heads, tokens, head_dim] of what the projections wrote, [1, tokens, heads, head_dim].
Where a peer wants a cache of cosines and sines, making it is not timed: a model does so once for all layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ropewalk.rope.ops  # noqa: F401  registers ropewalk::rope and rope_
from ropewalk.bench.peers.base import imported, why_missing
from ropewalk.bench.peers.ours import OURS

Rotated = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """One call's inputs.

    Attributes:
        q, k: [1, heads, tokens, head_dim] and [1, kv_heads, tokens, head_dim], views as described above.
        inv_freq: float32 [head_dim / 2].
        position_ids: int64 [1, tokens].
        cos, sin: [1, tokens, head_dim] in q's dtype, both halves alike, as transformers has them.
    """

    q: Tensor
    k: Tensor
    inv_freq: Tensor
    position_ids: Tensor
    cos: Tensor
    sin: Tensor

    def clone(self) -> Inputs:
        """Return the same with q and k in buffers of their own."""
        q, k = (t.transpose(1, 2).clone().transpose(1, 2) for t in (self.q, self.k))
        return Inputs(q, k, self.inv_freq, self.position_ids, self.cos, self.sin)


class RotaryPeer(ABC):
    """A way to rotate q and k; `prepare` returns a function without arguments for one set of inputs.

    Attributes:
        name: its name in tables and for --peers.
        package: what must be importable, or "".
        devices: where it runs.
    """

    name = ""
    package = ""
    devices: tuple[str, ...] = ("cuda",)
    by_default: tuple[str, ...] = ("cpu", "cuda")

    def available(self, device: torch.device) -> str | None:
        """Return why it cannot run here, or None."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return why_missing(self.package) if self.package else None

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Callable[[], Rotated]:
        """Return a function that gives q and k rotated, shaped as they came; it may change them in place."""


class Ropewalk(RotaryPeer):
    """`ropewalk::rope`: angles computed in the kernel, results in new buffers."""

    name = OURS
    devices = ("cpu", "cuda")

    def prepare(self, inputs: Inputs) -> Callable[[], Rotated]:
        """Take inv_freq and position ids as they are."""
        return lambda: torch.ops.ropewalk.rope(inputs.q, inputs.k, inputs.inv_freq, inputs.position_ids)


class RopewalkInPlace(RotaryPeer):
    """`ropewalk::rope_`: the same, written over q and k."""

    name = f"{OURS}-in-place"
    devices = ("cpu", "cuda")

    def prepare(self, inputs: Inputs) -> Callable[[], Rotated]:
        """Take inv_freq and position ids as they are."""

        def run() -> Rotated:
            torch.ops.ropewalk.rope_(inputs.q, inputs.k, inputs.inv_freq, inputs.position_ids)
            return inputs.q, inputs.k

        return run


class Transformers(RotaryPeer):
    """`apply_rotary_pos_emb` of transformers' Llama, as it is or compiled."""

    devices = ("cpu", "cuda")
    package = "transformers"

    def __init__(self, name: str = "transformers", compiled: bool = False):
        self.name = name
        self.compiled = compiled

    def prepare(self, inputs: Inputs) -> Callable[[], Rotated]:
        """Import the function; compile it where that is wanted."""
        apply = imported("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
        if self.compiled:
            apply = torch.compile(apply)
        return lambda: apply(inputs.q, inputs.k, inputs.cos, inputs.sin)


class Liger(RotaryPeer):
    """`liger_rotary_pos_emb` (0.8.5): q and k in one launch, in place."""

    name = "liger"
    package = "liger_kernel"

    def prepare(self, inputs: Inputs) -> Callable[[], Rotated]:
        """Import the function."""
        apply = imported("liger_kernel.transformers.rope").liger_rotary_pos_emb
        return lambda: apply(inputs.q, inputs.k, inputs.cos, inputs.sin)


class FlashAttn(RotaryPeer):
    """`flash_attn.layers.rotary.apply_rotary_emb`, in place, a launch each for q and k."""

    name = "flash-attn"
    package = "flash_attn"

    def prepare(self, inputs: Inputs) -> Callable[[], Rotated]:
        """Give it [1, tokens, heads, head_dim] and one half of the cosines."""
        apply = imported("flash_attn.layers.rotary").apply_rotary_emb
        q, k = inputs.q.transpose(1, 2), inputs.k.transpose(1, 2)
        half = inputs.cos.shape[-1] // 2
        cos, sin = (t[0, :, :half].contiguous() for t in (inputs.cos, inputs.sin))

        def run() -> Rotated:
            return apply(q, cos, sin, inplace=True).transpose(1, 2), apply(k, cos, sin, inplace=True).transpose(1, 2)

        return run


class FlatRotary(RotaryPeer):
    """vLLM's operator and conch's, which has its signature: [tokens, heads * head_dim], in place.

    Args:
        module, function: where it is.
    """

    def __init__(self, name: str, package: str, module: str, function: str):
        self.name = name
        self.package = package
        self.module = module
        self.function = function

    def prepare(self, inputs: Inputs) -> Callable[[], Rotated]:
        """Flatten the views, and put cosines and sines side by side by position."""
        apply = getattr(imported(self.module), self.function)
        head_dim, half = inputs.q.shape[-1], inputs.cos.shape[-1] // 2
        positions = inputs.position_ids[0]
        both = torch.cat([inputs.cos[0, :, :half], inputs.sin[0, :, :half]], -1)
        side_by_side = torch.zeros(int(positions.max()) + 1, 2 * half, dtype=both.dtype, device=both.device)
        side_by_side[positions] = both
        q, k = (t.transpose(1, 2).flatten(2)[0] for t in (inputs.q, inputs.k))

        def run() -> Rotated:
            apply(positions, q, k, head_dim, side_by_side, is_neox=True)
            return inputs.q, inputs.k

        return run
