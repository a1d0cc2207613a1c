"""What the decoding benchmark wants of a program that runs whole models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

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
    def prefill(self, ids: Tensor) -> Tensor:
        """Begin anew with a prompt, int64 [T]; return the logits [vocabulary] of its last token."""

    @abstractmethod
    def step(self, token: int) -> Tensor:
        """Go on by one token; return its logits, which may be overwritten by the next call."""

    @abstractmethod
    def close(self) -> None:
        """Free the model."""


class DecodePeer(Program, ABC):
    """A program that decodes with the model of a folder.

    Nothing of its package is imported before `load`.

    Attributes:
        mode: which of our kernels for the CPU it runs; None for what has no such choice.
    """

    mode: str | None = None

    def nbytes(self, model: PackedModel, dtype: torch.dtype, context: float) -> float:
        """Return the fewest bytes that a token needs read, `context` tokens from the beginning."""
        return model.token_bytes(context)

    def memory(self, model: PackedModel, dtype: torch.dtype) -> float:
        """Return about how many bytes it needs to load and run."""
        embeddings = 2 * model.shape.vocab * model.shape.hidden * dtype.itemsize
        return 2 * model.token_bytes(model.shape.hidden) + embeddings

    @abstractmethod
    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device, capacity: int) -> Decoder:
        """Load it for up to `capacity` tokens."""


class TransformersDecoder(Decoder):
    """A causal language model of transformers, called as its `generate` does, with a static cache."""

    def __init__(self, model: Any, capacity: int, note: str = ""):
        self.model = model
        self.note = note
        self._capacity = capacity
        self._cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """Make a new cache."""
        from transformers import StaticCache

        self._cache = StaticCache(self.model.config, self._capacity)
        return self._logits(ids[None])

    def step(self, token: int) -> Tensor:
        """Call the model with one token."""
        return self._logits(torch.tensor([[token]]))

    def close(self) -> None:
        """Let go of the model."""
        self.model = self._cache = None

    def _logits(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.model.device)
        return self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]
