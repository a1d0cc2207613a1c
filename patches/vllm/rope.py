"""The rotary embedding in vLLM: what configs of 2023 fail to say, our types by name, our operator.

vLLM reads a config (`get_config`), derives the longest context from it (`_get_and_verify_max_len`), and builds the
rotary embedding of each layer from its `rope_parameters` (`get_rope`), which the modules of its models import by name:
so that is replaced before the first of them is imported.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.transformers_utils import config as hf_config

import ropewalk.rope.ops  # noqa: F401  registers ropewalk::rope_
from ropewalk import cpu
from ropewalk.loader.quantize_config import FILES
from ropewalk.loader.rope import KEYS_OF_2023, context_length, decide_rope
from ropewalk.loader.rotary import frequencies_of, register_rope_types, unregister_rope_types

log = logging.getLogger("ropewalk")

GET_ROPE = ("head_size", "max_position", "is_neox_style", "rope_parameters", "dtype")
# vLLM has an "ntk" of its own, by factor.
TYPES = ("partial-ntk", "ntk-by-parts", "ntk")
_HOLDER = "vllm"
_made: dict[Any, RopewalkRotary] = {}


def register_types() -> None:
    """Let configs name our types."""
    register_rope_types(_HOLDER)


def unregister_types() -> None:
    """Take that back."""
    unregister_rope_types(_HOLDER)


def with_rope(get_config: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's `get_config` with the rope that a config means, and the packing that stands in a file beside it."""

    @functools.wraps(get_config)
    def wrapped(model: Any, trust_remote_code: bool, revision: str | None = None, *args: Any, **kwargs: Any) -> Any:
        config = get_config(model, trust_remote_code, revision, *args, **kwargs)
        _add_packing(config, model, revision)
        text = config.get_text_config()
        if _may_be_ours(text):
            decision = decide_rope(text.to_dict(), file=Path(model, "config.json"))
            if decision.type in (*TYPES, "linear"):
                text.rope_parameters = dict(decision.parameters)
                if decision.type == "linear":
                    # vLLM fails for a whole number.
                    text.rope_parameters["factor"] = float(decision.parameters["factor"])
                log.info("rope: %s, since %s", decision, decision.why)
        return config

    return wrapped


def _may_be_ours(config: Any) -> bool:
    """Return whether a config names, or may imply, a rope that vLLM would take for another. All others are vLLM's."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return False
    named = parameters.get("rope_type", "default")
    if named != "default":
        return named == "linear" or is_ours(parameters)
    of_2023 = any(getattr(config, key, None) for key in KEYS_OF_2023)
    return of_2023 or (config.model_type == "llama" and hasattr(config, "original_max_position_embeddings"))


def _add_packing(config: Any, model: Any, revision: str | None) -> None:
    """Give a config what a file beside it says of the packing, as checkpoints of 2023 have it."""
    stated = getattr(config, "quantization_config", None)
    if isinstance(stated, dict) and "bits" in stated:
        stated.setdefault("quant_method", "gptq")
    if stated is not None:
        return
    for name in FILES:
        if hf_config.file_or_path_exists(model, name, revision):
            found = hf_config.get_hf_file_to_dict(name, model, revision)
            if isinstance(found, dict) and found.get("quant_method", "gptq") == "gptq":
                config.quantization_config = {**found, "quant_method": "gptq"}
                return


def with_longest(longest: Callable[..., int]) -> Callable[..., int]:
    """Return vLLM's function for the longest context, which for linear and for types that it does not know would
    multiply the number of positions by the factor, whether that is in it or not.
    """

    @functools.wraps(longest)
    def wrapped(hf_config: Any, *args: Any, **kwargs: Any) -> int:
        parameters = getattr(hf_config, "rope_parameters", None)
        if isinstance(parameters, dict) and (is_ours(parameters) or parameters.get("rope_type") == "linear"):
            scaled = context_length(hf_config) / hf_config.max_position_embeddings
            hf_config = copy.copy(hf_config)
            hf_config.rope_parameters = {**parameters, "factor": scaled}
        return longest(hf_config, *args, **kwargs)

    return wrapped


def is_ours(parameters: Any) -> bool:
    """Return whether rope parameters name a type of ours."""
    if not isinstance(parameters, dict) or parameters.get("rope_type") not in TYPES:
        return False
    return parameters["rope_type"] != "ntk" or "alpha" in parameters


def with_types(get_rope: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's `get_rope`, which makes ours for our types."""

    @functools.wraps(get_rope)
    def wrapped(
        head_size: int,
        max_position: int,
        is_neox_style: bool = True,
        rope_parameters: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Any:
        if not is_ours(rope_parameters):
            return get_rope(head_size, max_position, is_neox_style, rope_parameters, dtype, **kwargs)
        assert rope_parameters is not None
        dtype = dtype or torch.get_default_dtype()
        key = head_size, max_position, is_neox_style, dtype, repr(sorted(rope_parameters.items()))
        if key not in _made:  # all layers share one, as with vLLM's own
            _made[key] = RopewalkRotary(head_size, max_position, is_neox_style, rope_parameters, dtype)
        return _made[key]

    return wrapped


class RopewalkRotary(RotaryEmbedding):
    """A rotary embedding of vLLM with frequencies of ours, in one operator that computes its angles itself.

    Args:
        head_size: channels of a head.
        max_position: `max_position_embeddings` of the config.
        is_neox_style: whether a channel's partner is half the rotary dim away, rather than beside it.
        parameters: `rope_parameters` of the config, of one of TYPES.
        dtype: of vLLM's table of cosine and sine, which some of its own kernels read.

    Raises:
        RopeError: parameters that are missing or impossible.
    """

    def __init__(
        self, head_size: int, max_position: int, is_neox_style: bool, parameters: dict[str, Any], dtype: torch.dtype
    ):
        config = SimpleNamespace(
            head_dim=head_size, max_position_embeddings=max_position, rope_parameters=dict(parameters)
        )
        inv_freq, scaling = frequencies_of(config)
        dim, base = 2 * inv_freq.shape[0], parameters.get("rope_theta", 10000.0)
        super().__init__(head_size, dim, context_length(config), base, is_neox_style, dtype, init_cache=False)
        if torch.get_default_device().type == "cpu":
            cpu.load()  # makes `rope_` one pass in C++
        self.attention_scaling = scaling
        self.register_buffer("inv_freq", inv_freq.to(torch.get_default_device()), persistent=False)
        self.register_buffer("cos_sin_cache", self._compute_cos_sin_cache().to(dtype), persistent=False)

    def _compute_inv_freq(self, base: float) -> Tensor:
        inv_freq: Tensor = self.inv_freq
        return inv_freq

    def _compute_cos_sin_cache(self) -> Tensor:
        return super()._compute_cos_sin_cache() * self.attention_scaling

    def forward_native(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate in place, and return, query [tokens, heads * head_size] and key at positions [tokens]."""
        if key is None:  # keys of another layer
            return super().forward_native(positions, query, key)
        q, k = (x.view(1, x.shape[0], -1, self.head_size).transpose(1, 2) for x in (query, key))
        torch.ops.ropewalk.rope_(
            q,
            k,
            self.inv_freq,
            positions.view(1, -1),
            attention_scaling=self.attention_scaling,
            interleaved=not self.is_neox_style,
        )
        return query, key

    # On every device, and whether vLLM's custom operators are on or, as with inductor, off.
    forward_cuda = forward_hip = forward_xpu = forward_cpu = forward_native
