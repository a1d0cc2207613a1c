"""The process in which `ropewalk bench decode --engine vllm` holds one engine: orders on stdin and answers on stdout, a
line of JSON each.

    python -m ropewalk.bench.engine_worker

The first order starts the engine and says what it is (`_Engine`); it is answered by {"event": "started"} with what came
of it. Each further one, {"prompts", "tokens", "logprobs"}, is answered by {"event": "generated"}, with what
`_Engine.generate` returns. {"event": "failed", "why"} answers an order that could not be done. Between orders the
process sleeps. The end of stdin ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from ropewalk.bench.load_worker import keep_stdout, reason

Order = dict[str, Any]


def main() -> int:
    """Do what is ordered; return the exit status."""
    orders = os.fdopen(os.dup(0))
    tell = keep_stdout()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nothing else reads orders
    engine: _Engine | None = None
    for line in orders:
        try:
            engine = _obey(json.loads(line), engine, tell)
        except Exception as error:
            tell("failed", why=_plain(error))
    sys.stderr.flush()
    os._exit(0)  # what the engine leaves to exit handlers is freed with the process


def _obey(order: Order, engine: _Engine | None, tell: Callable[..., None]) -> _Engine:
    if engine is None:
        engine = _Engine(order)
        tell("started", **engine.found)
    else:
        tell("generated", **engine.generate(**order))
    return engine


def _plain(error: Exception) -> str:
    """Return an error in one line; of those that pydantic lists, what the first says."""
    listed = getattr(error, "errors", None)
    if callable(listed):
        return str(listed()[0].get("msg", "")).removeprefix("Value error, ")
    return reason(error)


class _Engine:
    """vLLM with a model, in this process.

    Args:
        order: "folder", "device", "dtype", "quantization" (vLLM's name of a method, or None), "eager" (whether to leave
            out torch.compile), "sequences" (at once), "length" (tokens of one, at most), "at_once" (tokens that one
            step reads, at most), "cache_bytes" (for keys and values) and "share" (of a GPU's memory; None elsewhere).

    Attributes:
        found: "version", "quantization" (the method that runs), "compiled", "threads", and "nbytes" of memory that the
            engine took, besides what was imported.
    """

    def __init__(self, order: Order):
        import torch
        import vllm
        from vllm import LLM

        from ropewalk.bench.memory import Meter

        self._meter = Meter(torch.device(order["device"]))
        before = self._meter.held()
        options: dict[str, Any] = {}
        if order["share"] is not None:
            options["gpu_memory_utilization"] = order["share"]
        self._llm = LLM(
            order["folder"],
            dtype=order["dtype"],
            quantization=order["quantization"],
            enforce_eager=order["eager"],
            skip_tokenizer_init=True,
            max_model_len=order["length"],
            # Neither vLLM's table of positions nor its limit goes further than the config says.
            hf_overrides=_lengthen(order["length"]),
            max_num_seqs=order["sequences"],
            max_num_batched_tokens=order["at_once"],
            kv_cache_memory_bytes=order["cache_bytes"],
            # Prompts are repeated; what is timed is reading them.
            enable_prefix_caching=False,
            # A step is scheduled when the one before it is done: else their times could not be told apart.
            async_scheduling=False,
            disable_log_stats=True,
            seed=0,
            **options,
        )
        self._held = self._meter.held()
        compiled = self._llm.llm_engine.vllm_config.compilation_config.mode
        self.found = {
            "version": vllm.__version__,
            "quantization": self._llm.model_config.quantization,
            "compiled": bool(compiled),
            "threads": torch.get_num_threads(),
            "nbytes": max(0, self._held - before),
        }

    def generate(self, prompts: list[list[int]], tokens: int, logprobs: int | None = None) -> Order:
        """Choose tokens greedily.

        Args:
            prompts: token ids of each sequence.
            tokens: of each; the first one comes of reading the prompt.
            logprobs: of how many tokens to tell the logarithm of the probability, at each place.

        Returns:
            "tokens" [B, tokens]; "prefill", the seconds of the step that reads the prompts, and "steps", those of the
            further ones; "peak_bytes" of memory besides what the engine held when it had started; "logprobs",
            [B, tokens] lists of (id, logarithm of the probability), or None.

        Raises:
            RuntimeError: prompts that were not read in one step, all of them.
        """
        from vllm import SamplingParams

        self._meter.held()
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
        )
        inputs: Any = [{"prompt_token_ids": ids} for ids in prompts]
        self._llm.enqueue(inputs, sampling, use_tqdm=False)
        engine, finished, seconds = self._llm.llm_engine, [], []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            finished += [output for output in engine.step() if output.finished]
            seconds.append(time.perf_counter() - begin)
        if len(seconds) != tokens:
            raise RuntimeError(f"expected {tokens} steps for {tokens} tokens of each sequence, found {len(seconds)}")
        finished.sort(key=lambda output: int(output.request_id))
        chosen: list[Any] = [output.outputs[0] for output in finished]
        return {
            "tokens": [list(each.token_ids) for each in chosen],
            "prefill": seconds[0],
            "steps": seconds[1:],
            "peak_bytes": max(0, self._meter.peak() - self._held),
            "logprobs": None if logprobs is None else [[_pairs(at) for at in each.logprobs] for each in chosen],
        }


def _pairs(found: dict[int, Any]) -> list[tuple[int, float]]:
    return [(token, each.logprob) for token, each in found.items()]


def _lengthen(length: int) -> Callable[[Any], Any]:
    """Return a function of a config, which lets it have so many positions, if it has fewer."""

    def change(config: Any) -> Any:
        if getattr(config, "max_position_embeddings", length) < length:
            config.max_position_embeddings = length
        return config

    return change


if __name__ == "__main__":
    sys.exit(main())
