"""Continue a prompt, handing the text out as it comes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import ContextLengthError, MissingPackageError, UsageError

CHUNK = 2048  # tokens of a prompt that are read at once: what an MLP makes of 16,384 would take more room than they


@dataclass(frozen=True)
class Generation:
    """What came out, and how fast.

    Attributes:
        text: the continuation, without the prompt.
        prompt_tokens, new_tokens: how many.
        prefill_seconds: from the call to the first new token.
        decode_seconds: from the first new token to the last.
        stopped: "length", "eos" or "stop string".
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    stopped: str

    @property
    def tokens_per_second(self) -> float:
        """The rate of decoding, without the prompt's share; 0 where there was one token or none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


def context_length(model: Any) -> int:
    """Return how many positions the model was made for."""
    from ropewalk.loader import rope

    return rope.context_length(model.config)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: list[str] | None = None,
    kv_bits: int | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue a prompt.

    Args:
        model, tokenizer: of transformers.
        prompt: text; the tokenizer puts its <s> before it.
        max_new_tokens: at most so many; fewer where the context ends.
        temperature: 0 picks the likeliest token every time.
        top_p, top_k: keep to the likeliest tokens, by their share and their number (0: all).
        repetition_penalty: above 1, makes tokens seen before less likely.
        seed: of the sampling.
        stop: strings that end it; the text has them no more.
        kv_bits: keep keys and values in so many bits (2, 3, 4 or 8), by transformers' quantized cache and the package
            hqq; the last 128 tokens or fewer stay as they are.
        on_start: called once the prompt is known to fit, before anything is computed.
        on_text: called with every piece of text as it comes.

    Raises:
        ContextLengthError: the prompt fills the context or more.
        UsageError: a setting out of range.
        MissingPackageError: hqq is not there.
    """
    import torch

    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if temperature < 0:
        raise UsageError(f"temperature: expected 0 or more, found {temperature:g}")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False).to(model.device)
    prompt_tokens, context = inputs["input_ids"].shape[1], context_length(model)
    if prompt_tokens >= context:
        raise ContextLengthError(f"prompt: expected fewer tokens than the context of {context}, found {prompt_tokens}")
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    on_start()
    streamer = _streamer(tokenizer, stop or [], on_text)
    limit = min(max_new_tokens, context - prompt_tokens)
    tokens = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=limit,
        **_quantized_cache(kv_bits),
        prefill_chunk_size=CHUNK if prompt_tokens > CHUNK and _has_cache(model) else None,
        repetition_penalty=repetition_penalty,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({"stop_strings": stop, "tokenizer": tokenizer} if stop else {}),
    )[0, prompt_tokens:]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [text.index(s) for s in stop or [] if s in text]
    last = int(tokens[-1])
    eos = model.generation_config.eos_token_id
    at_eos = last in (eos if isinstance(eos, list) else [eos])
    return Generation(
        text=text[: min(ends)] if ends else text,
        prompt_tokens=prompt_tokens,
        new_tokens=len(tokens),
        prefill_seconds=streamer.first - streamer.began,
        decode_seconds=streamer.last - streamer.first,
        stopped="stop string" if ends else "eos" if at_eos else "length",
    )


def _quantized_cache(bits: int | None) -> dict[str, Any]:
    if bits is None:
        return {}
    if importlib.util.find_spec("hqq") is None:
        raise MissingPackageError("--kv-bits: expected the package hqq (pip install 'ropewalk[kv]'), found none")
    settings = {"backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1}
    return {"cache_implementation": "quantized", "cache_config": settings}


def _has_cache(model: Any) -> bool:
    """Return whether `generate` keeps keys and values for this model; MPT's config of 2023 says to keep none."""
    settings = (model.generation_config.use_cache, getattr(model.config, "use_cache", None))
    return False not in settings


def _streamer(tokenizer: Any, stop: list[str], on_text: Callable[[str], None]) -> Any:
    """Return a streamer of transformers that keeps the time and never hands out a stop string."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.began = self.first = self.last = time.perf_counter()
            self.held, self.stopped, self.started = "", False, False

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.last = time.perf_counter()
                if not self.started:
                    self.first, self.started = self.last, True
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.held += text
            found = [self.held.index(s) for s in stop if s in self.held]
            if found and not self.stopped:
                self._hand_out(min(found))
                self.stopped = True
            elif not self.stopped:
                # What might be the beginning of a stop string waits for the rest of it.
                kept = 0 if stream_end else max((_overlap(self.held, s) for s in stop), default=0)
                self._hand_out(len(self.held) - kept)

        def _hand_out(self, length: int) -> None:
            if length:
                on_text(self.held[:length])
            self.held = self.held[length:]

    return Streamer()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
