"""Perplexity of a causal language model over a text, by length of context: the table of the model cards."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ropewalk.errors import ContextLengthError

CHUNK = 2048
# With these, a token's angles depend on how much is read at once, so that a cache holds others than a whole reading.
BY_LENGTH = ("dynamic", "longrope")


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
def logits_from(model: Any, tokens: Tensor, first: int, chunk: int | None = CHUNK) -> Iterator[tuple[int, Tensor]]:
    """Yield (place, logits [B, n, V]) until all places from `first` on are covered, in order.

    A row longer than `chunk` is read `chunk` tokens at a time into a KV cache, so that neither activations nor logits
    of the whole of it are ever there at once. Rotary embeddings whose angles follow the length of what is read
    (dynamic NTK, longrope) are read whole all the same.

    Args:
        model: a causal language model of transformers.
        tokens: [B, T], on the model's device.
        first: from 0 to T - 1.
        chunk: tokens; None for whole rows.
    """
    length = tokens.shape[1]
    # Places before the first one that counts need no pass through the output embedding.
    cuts = "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters
    if chunk is None or length <= chunk or _follows_length(model):
        keep = {"logits_to_keep": length - first} if cuts and first > 0 else {}
        yield first, model(tokens, use_cache=False, **keep).logits[:, first - length :]
        return
    cache = None
    for begin in range(0, length, chunk):
        part = tokens[:, begin : begin + chunk]
        end = begin + part.shape[1]
        count = min(max(end - first, 0), part.shape[1])
        keep = {"logits_to_keep": max(count, 1)} if cuts else {}
        made = model(part, past_key_values=cache, use_cache=True, **keep)
        cache = made.past_key_values
        if count:
            yield end - count, made.logits[:, -count:]


def _follows_length(model: Any) -> bool:
    parameters = getattr(getattr(model, "config", None), "rope_parameters", None) or {}
    # Models with several kinds of layers have a set for each.
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(one.get("rope_type") in BY_LENGTH for one in sets)


@torch.inference_mode()
def perplexity(
    model: Any,
    ids: Tensor,
    context: int,
    *,
    stride: int | None = None,
    chunk: int | None = CHUNK,
    tokens_per_batch: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Return exp of the mean negative log likelihood, natural, of the tokens that count (see `windows`).

    Args:
        model: a causal language model of transformers.
        ids: token numbers [T].
        context: tokens of a window, at least 2.
        stride: see `windows`; from 1 to context - 1.
        chunk: how many tokens of a window are read at once (see `logits_from`).
        tokens_per_batch: how many tokens of windows go through the model side by side (at least one window does).
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
        most = max(scored for _, scored in batch)
        for place, logits in logits_from(model, tokens, context - most - 1, chunk):
            for row, (_, scored) in enumerate(batch):
                begin = max(context - scored - 1, place)
                end = min(place + logits.shape[1], context - 1)  # nothing follows the last token
                total += _loss(logits[row, begin - place : end - place], tokens[row, begin + 1 : end + 1])
        count += sum(scored for _, scored in batch)
        if progress is not None:
            progress(len(batch) * context)
    return math.exp(total / count)


def _loss(logits: Tensor, tokens: Tensor) -> float:
    """Return the sum of the losses of tokens [n] by logits [n, V], a piece at a time: in float32 they are large."""
    pieces = zip(logits.split(CHUNK), tokens.split(CHUNK), strict=True)
    return sum(cross_entropy(part.float(), wanted, reduction="sum").item() for part, wanted in pieces)
