"""What the decoding benchmark wants of a program that runs whole models."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.base import Program


class Decoder(ABC):
    """A loaded model with a cache of keys and values.

    Attributes:
        note: what it is made of, for a person.
    """

    note = ""

    @abstractmethod
    def start(self, batch: int, capacity: int) -> None:
        """Make an empty cache for `batch` sequences of up to `capacity` tokens, in place of the one before."""

    @abstractmethod
    def fill(self, tokens: int) -> None:
        """Put random keys and values of so many tokens into the empty cache, the same for every sequence and for
        every program (`random_keys`). Where that cannot be done, read random tokens.
        """

    @abstractmethod
    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` of each sequence."""

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """Read tokens, int64 [B, T]; return the logits [B, vocabulary] of the last ones."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Go on by one token for each sequence, int64 [B]; return logits [B, vocabulary], which the next call may
        overwrite.
        """

    @abstractmethod
    def stop(self) -> None:
        """Free the cache."""

    @abstractmethod
    def close(self) -> None:
        """Free the model."""


class ModelProgram(Program):
    """A program that runs the model of a folder.

    Attributes:
        mode: which of our kernels for the CPU it runs; None for what has no such choice.
        families: the kinds of models it runs, as config.json names them; none is any.
    """

    mode: str | None = None
    families: tuple[str, ...] = ()

    def cannot_run(self, model: PackedModel) -> str | None:
        """Return why it cannot run a model, or None."""
        family = model.shape.config()["model_type"]
        if self.families and family not in self.families:
            return f"is given models of type {' and '.join(self.families)} only here"
        return self.cannot_hold(model.packing)

    def nbytes(self, model: PackedModel, dtype: torch.dtype, context: float, batch: int = 1) -> float:
        """Return the fewest bytes that a step of `batch` sequences needs read, `context` tokens from the beginning."""
        return model.step_bytes(context, batch, dtype.itemsize)

    def memory(self, model: PackedModel, dtype: torch.dtype) -> float:
        """Return about how many bytes it needs to load and run, without the cache."""
        embeddings = 2 * model.shape.vocab * model.shape.hidden * dtype.itemsize
        return 2 * model.shape.packed_bytes(model.packing) + embeddings


class DecodePeer(ModelProgram, ABC):
    """A program that decodes step by step in this process.

    Nothing of its package is imported before `load`.

    Attributes:
        most_sequences: the largest batch.
        fills_at_once: whether its decoder can be given keys and values; elsewhere it reads tokens, which takes time.
    """

    most_sequences: int | None = None
    fills_at_once = True

    @abstractmethod
    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device) -> Decoder:
        """Load it."""


def random_keys(
    layer: int, heads: int, tokens: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return keys and values of a layer, [1, heads, tokens, channels] each: normal numbers that every dtype holds, the
    same at each call on a device.
    """
    generator = torch.Generator(device).manual_seed(layer)
    shape = (2, 1, heads, tokens, channels)
    numbers = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).to(dtype)
    return numbers[0], numbers[1]
