"""Which rotary embedding a checkpoint means: what its config says, what it fails to say, or what the user wants.

The configs of 2023 are the reason. airophin-13b-pntk-16k was trained with partial NTK scaling, yet its
config has `rope_scaling: null` and only a top-level `original_max_position_embeddings`; transformers
gives such a model the default embedding without a word, and it talks nonsense past 4096 tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ropewalk.errors import RopeError
from ropewalk.rope.frequencies import ROPE_TYPES, inverse_frequencies, parameter_names, rotary_dim

# What may stand for a longer parameter name in `partial-ntk:factor=4,original=4096`.
_SHORT = {"original": "original_max_position_embeddings", "max": "max_position_embeddings", "theta": "rope_theta"}
_ALIASES = {"none": "default", "su": "longrope", "part-ntk": "partial-ntk", "pntk": "partial-ntk"}
# The one parameter that a bare number stands for: `linear:2`, `ntk:2.5`.
_FIRST = {"linear": "factor", "dynamic": "factor", "yarn": "factor", "partial-ntk": "factor", "ntk-by-parts": "factor"}
_FIRST |= {"ntk": "alpha", "llama3": "factor"}

# The top-level keys of jquesnelle/scaled-rope before it used rope_scaling (July 2023).
KEYS_OF_2023 = ("part_ntk_scale", "ntk_alpha", "position_interpolation_scale")
# What some families of transformers call theirs, and turn into "default" themselves.
_OF_FAMILIES = ("mrope",)
# Families in which all layers share one; they would take several for none without a word.
_ONE_FOR_ALL = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
# Beyond these, computing would take all memory or overflow; ten times what there is.
_LARGEST_HEAD = 1 << 14
_MOST_POSITIONS = 1 << 30
_LLAMA_2 = 4096  # its context, the longest that linear scaling started from in 2023

BY_PARTS_NOTE = (
    "ntk-by-parts is the formula of the YaRN paper (section 3.2); the formula of July 2023 is called partial-ntk"
)


@dataclass(frozen=True)
class RopeDecision:
    """Which rotary embedding a model gets, and why.

    Attributes:
        type: a name of `ropewalk.rope.ROPE_TYPES`, another that transformers knows, "none" for a model
            without rotary embedding, or "per-layer" for one with several.
        parameters: the config's `rope_parameters`, "rope_type" and "rope_theta" among them; empty for "none".
        why: one sentence.
        warnings: what the user should look at.
    """

    type: str
    parameters: dict[str, Any]
    why: str
    warnings: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        shown = {k: v for k, v in self.parameters.items() if k != "rope_type" and not isinstance(v, list)}
        return f"{self.type}" + (f" ({', '.join(f'{k} {_plain(v)}' for k, v in shown.items())})" if shown else "")

    def as_dict(self) -> dict[str, Any]:
        """Return the decision as `--json` prints it."""
        return {"type": self.type, "why": self.why, **{k: v for k, v in self.parameters.items() if k != "rope_type"}}


def decide_rope(config: Mapping[str, Any], override: str = "auto", file: object = "") -> RopeDecision:
    """Decide by the first rule that fits: the user's wish, the config's own words, what the config implies.

    Args:
        config: config.json as read.
        override: "auto", or what `parse_rope` takes.
        file: where the config was read, for messages.

    Raises:
        RopeError: an override or a config that names an unknown type or impossible parameters.
    """
    try:
        return _decide(config, override)
    except RopeError as error:
        if file and override == "auto":
            raise RopeError(f"{file}: {error}") from None
        raise


def _decide(config: Mapping[str, Any], override: str) -> RopeDecision:
    if not _has_rotary(config):
        if override not in ("auto", "none"):
            raise RopeError(
                f"rope: expected auto for {config['model_type']}, which has no rotary scaling, found {override!r}"
            )
        why = f"{config['model_type']} has no rotary embedding that could be scaled"
        return RopeDecision("none", {}, why + (" (it uses ALiBi)" if config["model_type"] in ("mpt", "bloom") else ""))
    stated = config.get("rope_parameters")
    if isinstance(stated, dict) and stated and all(isinstance(value, dict) for value in stated.values()):
        # Gemma 3 and others: a set for each kind of layer, which is theirs to keep.
        if config["model_type"] in _ONE_FOR_ALL:
            found = f"one for each of {', '.join(map(str, stated))}"[:200]
            raise RopeError(f"rope_parameters: expected one for all layers of {config['model_type']}, found {found}")
        if override != "auto":
            raise RopeError(f"rope: expected auto for {config['model_type']}, which has several, found {override!r}")
        return RopeDecision("per-layer", dict(stated), "the config has one for each kind of layer")
    decision = _decide_auto(config) if override == "auto" else _decide_override(config, override)
    _check(config, decision)
    return decision


def parse_rope(text: str) -> tuple[str, dict[str, Any]]:
    """Return (type, parameters) of an override: `none`, `linear:2`, `ntk:alpha=2.5`,
    `partial-ntk:factor=4,original=4096`, and so on for every type of `ropewalk.rope.ROPE_TYPES`.

    Raises:
        RopeError: an unknown type or parameter, or a value that is not a number.
    """
    name, _, rest = text.strip().partition(":")
    rope_type = _ALIASES.get(name, name)
    if rope_type not in ROPE_TYPES:
        raise RopeError(f"rope: expected auto, none or one of {', '.join(ROPE_TYPES)}, found {name!r}")
    parameters: dict[str, Any] = {}
    known = (*(n for n in parameter_names(rope_type) if n != "seq_len"), "rope_theta")
    if rope_type == "dynamic":
        known = ("factor", "original_max_position_embeddings", "rope_theta")
    for part in filter(None, rest.split(",")):
        key, separator, value = part.partition("=")
        if not separator:
            key, value = _FIRST.get(rope_type, ""), key
        key = _SHORT.get(key.strip(), key.strip())
        if key not in known:
            raise RopeError(f"rope {rope_type}: expected parameters {', '.join(known)}, found {part!r}")
        parameters[key] = _number(f"rope {rope_type}: {key}", value)
    return rope_type, parameters


def _number(name: str, text: str) -> int | float | bool:
    if text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    try:
        number = float(text)
    except ValueError:
        raise RopeError(f"{name}: expected a number, found {text!r}") from None
    return int(number) if number.is_integer() and "." not in text else number


def _decide_override(config: Mapping[str, Any], override: str) -> RopeDecision:
    rope_type, given = parse_rope(override)
    implied = {}
    original, longest = context_lengths(config)
    names = parameter_names(rope_type)
    if "original_max_position_embeddings" in names or rope_type == "dynamic":
        implied["original_max_position_embeddings"] = original
    if "factor" in names and "factor" not in given:
        shorter = given.get("original_max_position_embeddings", original)
        if not 0 < shorter < longest:
            raise RopeError(
                f"rope {rope_type}: expected a factor ({rope_type}:2), since the config names no shorter "
                f"original context, found none"
            )
        implied["factor"] = longest / shorter
    return RopeDecision(
        rope_type, _parameters(config, rope_type, {**implied, **given}), f"asked for: {override}", _notes(rope_type)
    )


def _decide_auto(config: Mapping[str, Any]) -> RopeDecision:
    stated = _stated(config)
    name = stated.get("rope_type") or stated.get("type") or "default"
    if not isinstance(name, str):
        raise RopeError(f"rope type: expected a name, found {_short(name)}")
    if name != "default":
        given = {k: v for k, v in stated.items() if k not in ("rope_type", "type")}
        rope_type = _ALIASES.get(name, name)
        original, _ = context_lengths(config)
        if rope_type in ROPE_TYPES and "original_max_position_embeddings" in parameter_names(rope_type):
            given.setdefault("original_max_position_embeddings", original)
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        why = f"the config says so ({key} of type {name})"
        return RopeDecision(rope_type, _parameters(config, rope_type, given), why, _notes(rope_type))

    old = _decide_by_keys_of_2023(config)
    if old is not None:
        return old
    original, longest = context_lengths(config)
    if config["model_type"] == "llama" and original < longest:
        factor, rest = divmod(longest, original)
        why = (
            f"the config has original_max_position_embeddings {original}, max_position_embeddings {longest} and no "
            f"rope scaling, as models trained with partial NTK by {factor} in 2023 do (airophin-13b-pntk-16k)"
        )
        odd = (f"{longest} is not a multiple of {original}; the factor is rounded down to {factor}",) if rest else ()
        parameters = {"factor": float(factor), "original_max_position_embeddings": original}
        return RopeDecision("partial-ntk", _parameters(config, "partial-ntk", parameters), why, odd)
    return RopeDecision("default", _parameters(config, "default", {}), "the config names no scaling")


def _decide_by_keys_of_2023(config: Mapping[str, Any]) -> RopeDecision | None:
    """Read KEYS_OF_2023."""
    found = []
    if config.get("part_ntk_scale"):
        # That code left the original context at its default.
        parameters = {"factor": config["part_ntk_scale"], "original_max_position_embeddings": 2048}
        found.append(("partial-ntk", parameters, "part_ntk_scale"))
    if config.get("ntk_alpha"):
        found.append(("ntk", {"alpha": config["ntk_alpha"]}, "ntk_alpha"))
    scale = config.get("position_interpolation_scale")
    if scale not in (None, 1, 0):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1e-9 < scale < 1e9:
            raise RopeError(f"position_interpolation_scale: expected a number above 0, found {_short(scale)}")
        found.append(("linear", {"factor": 1 / scale}, "position_interpolation_scale"))
    if len(found) > 1:
        raise RopeError(f"config: expected one rotary scaling, found {' and '.join(key for _, _, key in found)}")
    for rope_type, parameters, key in found:
        return RopeDecision(rope_type, _parameters(config, rope_type, parameters), f"the config says so ({key})")
    return None


def _parameters(config: Mapping[str, Any], rope_type: str, given: Mapping[str, Any]) -> dict[str, Any]:
    inherited: dict[str, Any] = {"rope_theta": 10000.0}
    stated = _stated(config) if config.get("rope_parameters") else {}
    for key in ("rope_theta", "partial_rotary_factor"):
        value = stated.get(key, config.get(key))
        if value is not None:
            inherited[key] = value
    return {"rope_type": rope_type, **inherited, **given}


def _stated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the config says of its rotary embedding, empty where it says nothing."""
    for key in ("rope_parameters", "rope_scaling"):
        stated = config.get(key)
        if stated is not None and not isinstance(stated, dict):
            raise RopeError(f"{key}: expected an object or null, found {_short(stated)}")
        if stated:
            return stated
    return {}


def _short(value: object) -> str:
    return repr(value)[:80]


def context_lengths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (original context, longest context); equal where the config names one only.

    Raises:
        RopeError: one that is no number of positions.
    """
    longest = config.get("max_position_embeddings", 2048)
    stated = _stated(config)
    original = stated.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    for name, value in (
        ("max_position_embeddings", longest),
        ("original_max_position_embeddings", original or longest),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_POSITIONS:
            raise RopeError(f"{name}: expected a positive number of positions, found {_short(value)}")
    return original or longest, longest


def context_length(config: Any) -> int:
    """Return how many positions a model is made for.

    `max_position_embeddings` is that in the configs of most, and the length before scaling in those that transformers
    asked for in 2023 and for yarn still does. A config that names the original length tells which of the two it is.
    One with linear scaling need not; what is longer than Llama 2's own 4096 is scaled already then.

    Args:
        config: of a transformers model.
    """
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's name
    if longest is None:
        return 2048
    stated = getattr(config, "rope_parameters", None) or {}
    factor = stated.get("factor") if isinstance(stated, Mapping) else None
    if not isinstance(factor, (int, float)) or factor <= 1:
        return int(longest)
    original = stated.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None)
    if original is None and stated.get("rope_type") == "linear" and longest > _LLAMA_2:
        return int(longest)
    return int(max(longest, factor * (original or longest)))


def _notes(rope_type: str) -> tuple[str, ...]:
    return (BY_PARTS_NOTE,) if rope_type == "ntk-by-parts" else ()


def _check(config: Mapping[str, Any], decision: RopeDecision) -> None:
    """Compute the frequencies once, so that impossible parameters are found before a model is built."""
    if decision.type not in ROPE_TYPES:
        _check_is_known(decision.type)
        return  # building the module checks its parameters
    sizes = {name: config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads")}
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31):
            raise RopeError(f"{name}: expected a positive whole number, found {_short(value)}")
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    head_dim = sizes["head_dim"] or (width // heads if heads and width else None)
    if head_dim is None:
        return
    if head_dim > _LARGEST_HEAD:
        raise RopeError(f"head_dim: expected at most {_LARGEST_HEAD} channels, found {head_dim}")
    names = parameter_names(decision.type)
    given = {k: v for k, v in decision.parameters.items() if k in names}
    if "max_position_embeddings" in names:
        given.setdefault("max_position_embeddings", context_lengths(config)[1])
    try:
        dim = rotary_dim(head_dim, decision.parameters.get("partial_rotary_factor") or 1.0)
        with np.errstate(all="ignore"):
            found, scaling = inverse_frequencies(
                decision.type, dim=dim, base=decision.parameters["rope_theta"], **given
            )
        finite = bool(found.isfinite().all()) and math.isfinite(scaling)
    except RopeError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # text for a number, a number beyond all bounds
        expected = f"rope type {decision.type}: expected numbers to compute with"
        raise RopeError(f"{expected}, found {_short(given)} ({_short(error)})") from None
    if not finite:
        raise RopeError(f"rope type {decision.type}: expected finite frequencies, found others by {_short(given)}")


def _check_is_known(rope_type: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type not in ROPE_INIT_FUNCTIONS and rope_type not in _OF_FAMILIES:
        names = ", ".join(dict.fromkeys((*ROPE_TYPES, *ROPE_INIT_FUNCTIONS)))
        raise RopeError(f"rope type: expected one of {names}, found {_short(rope_type)}")


def _has_rotary(config: Mapping[str, Any]) -> bool:
    from transformers import modeling_rope_utils
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        return False
    known = CONFIG_MAPPING[model_type]
    if hasattr(modeling_rope_utils, "RotaryEmbeddingConfigMixin"):
        # Every model of transformers 5 with a rotary embedding that can be scaled declares this.
        return hasattr(known, "rope_parameters")
    # transformers 4, with which AutoGPTQ runs
    return bool({"rope_theta", "rope_scaling"} & inspect.signature(known.__init__).parameters.keys())


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
