"""Perplexity of a causal language model over a text, by length of context: the table of the model cards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ropewalk.errors import ContextLengthError


def windows(length: int, context: int, stride: int | None = None) -> list[tuple[int, int]]:
    """Return (begin, scored) for each window of `context` tokens: its last `scored` tokens count.

    Without a stride the windows do not overlap and all their tokens count but the first, which nothing
    predicts. With one, each window begins `stride` tokens after the last and only the new tokens count
    (of the first window all). What does not fill a last window is left out.
    """
    step = stride or context
    begins = range(0, length - context + 1, step)
    return [(begin, context - 1 if stride is None or begin == 0 else stride) for begin in begins]


@torch.inference_mode()
def perplexity(
    model: Any,
    ids: Tensor,
    context: int,
    *,
    stride: int | None = None,
    tokens_per_batch: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Return exp of the mean negative log likelihood, natural, of the tokens that count (see `windows`).

    Args:
        model: a causal language model of transformers.
        ids: token numbers [T].
        context: tokens of a window, at least 2.
        stride: see `windows`; from 1 to context - 1.
        tokens_per_batch: how many tokens go through the model at once (at least one window does).
        progress: called with the number of tokens done after each batch.

    Raises:
        ContextLengthError: a context below 2, or a text shorter than one window.
    """
    if context < 2:
        raise ContextLengthError(f"context: expected at least 2 tokens, found {context}")
    if len(ids) < context:
        raise ContextLengthError(f"text: expected at least one window of {context} tokens, found {len(ids)}")
    if stride is not None and not 1 <= stride < context:
        raise ContextLengthError(
            f"stride: expected 1 to {context - 1} tokens for a context of {context}, found {stride}"
        )
    places = windows(len(ids), context, stride)
    size = max(1, tokens_per_batch // context)
    total, count = 0.0, 0
    for first in range(0, len(places), size):
        batch = places[first : first + size]
        tokens = torch.stack([ids[begin : begin + context] for begin, _ in batch]).to(model.device)
        logits = model(tokens, use_cache=False).logits
        for row, (_, scored) in enumerate(batch):
            # A window at a time: float32 logits of a whole batch can be larger than the model.
            loss = cross_entropy(logits[row, -scored - 1 : -1].float(), tokens[row, -scored:], reduction="sum")
            total, count = total + loss.item(), count + scored
        if progress is not None:
            progress(len(batch) * context)
    return math.exp(total / count)
