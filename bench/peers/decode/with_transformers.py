"""The decoder that is a model of transformers, called as its `generate` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.peers.decode.base import Decoder, random_keys

# As `generate` compiles the step of a static cache, with the promise that there is no graph break.
COMPILE: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True}
CHUNK = 512  # tokens that are read at once


class TransformersDecoder(Decoder):
    """A causal language model of transformers with a static cache.

    Attributes:
        compiled: whether to compile the step, as `generate` does on a GPU; prompts are read as they are.
    """

    def __init__(self, model: Any, note: str = "", *, compiled: bool = False):
        self.model = model
        self.note = note
        self.compiled = compiled
        self._batch = 1
        self._cache: Any = None
        self._step: Any = model

    def start(self, batch: int, capacity: int) -> None:
        """Make a static cache."""
        from transformers import StaticCache

        self.stop()
        self._batch = batch
        self._cache = StaticCache(self.model.config, capacity)
        if self.compiled:
            from transformers import CompileConfig

            self._step = self.model.get_compiled_call(CompileConfig(**COMPILE))

    def fill(self, tokens: int) -> None:
        """Write to the cache, layer by layer."""
        # The first call tells the cache its dtype and sizes.
        self.logits(torch.zeros(self._batch, 1, dtype=torch.int64))
        for i, layer in enumerate(self._cache.layers):
            _, heads, _, channels = layer.keys.shape
            keys, values = random_keys(i, heads, tokens, channels, layer.keys.dtype, layer.keys.device)
            layer.keys[:, :, :tokens] = keys
            layer.values[:, :, :tokens] = values
        self.rewind(tokens)

    def rewind(self, tokens: int) -> None:
        """Set how many tokens there are; what lies behind them is masked."""
        for layer in self._cache.layers:
            # In place: a compiled step has its address.
            layer.cumulative_length.fill_(tokens)

    def prefill(self, ids: Tensor) -> Tensor:
        """Read the tokens in chunks."""
        for chunk in ids.split(CHUNK, 1):
            logits = self.logits(chunk)
        return logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Call the model, or its compiled step, with one token for each sequence."""
        return self._call(self._step, tokens[:, None], 1)[:, -1]

    def logits(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Read tokens [B, T] at once; return the logits [B, keep, vocabulary] of the last ones."""
        return self._call(self.model, ids, keep)

    def stop(self) -> None:
        """Let go of the cache, and of what was compiled for it."""
        if self.compiled and self._cache is not None:
            # Another capacity would make the step a dynamic one.
            torch._dynamo.reset()
        self._cache = None

    def close(self) -> None:
        """Let go of the model."""
        self.stop()
        self.model = self._step = None

    def _call(self, call: Any, ids: Tensor, keep: int) -> Tensor:
        ids = ids.to(self.model.device)
        found: Tensor = call(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=keep).logits
        return found
