"""A model's rotary embedding in words that other programs read, so that nothing of ours is needed there.

`partial-ntk`, `ntk-by-parts` and `ntk` are names that only this package gives them (vLLM has another formula for its
"ntk"), and a config of 2023 may name nothing at all. But `longrope`, which transformers, vLLM and others know, divides
each frequency by a factor of its own, and so says exactly what any scaling does that does not depend on the length.

longrope has two sets of factors, up to `original_max_position_embeddings` and beyond, and scales attention by the
quotient of `max_position_embeddings` and that length. Here both sets are one, nothing is to be scaled, and vLLM offers
no more context than the original length; so the original length is written as equal to the whole context. Then every
program computes a scaling of 1, those included that know no `attention_factor` (vLLM, and transformers' code of Phi-3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ropewalk.errors import CheckpointError, RopewalkError
from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.quantize_config import CONFIG_KEY
from ropewalk.loader.rope import KEYS_OF_2023, RopeDecision, context_length, context_lengths
from ropewalk.loader.rotary import REGISTERED_TYPES, divisors_of, frequencies_of
from ropewalk.loader.skeleton import first_line, model_config

# Types that other programs know by the same names.
_KNOWN = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# Of them those whose `max_position_embeddings` is the scaled length, for transformers and vLLM. For linear and dynamic
# vLLM multiplies by the factor itself.
_SCALED_LENGTH = ("yarn", "llama3")
_ORIGINAL = "original_max_position_embeddings"
# Float32 arithmetic of other programs is off by 1e-6 at most, another reading of the parameters by far more.
_SAME = 1e-5


@dataclass(frozen=True)
class PortableRope:
    """How a rope is written for other programs.

    Attributes:
        type: the rope type written; the decision's own where the config is left as it was.
        config: config.json with it, all other keys as they were and in their order.
        note: what was done, in a line.
        context: how many positions the model is then made for; None without rope.
        factors: of longrope that stands for another type; else empty.
    """

    type: str
    config: dict[str, Any]
    note: str
    context: int | None = None
    factors: tuple[float, ...] = ()


def portable(checkpoint: Checkpoint, decision: RopeDecision, asked: bool) -> PortableRope:
    """Write a decision into a checkpoint's config so that other programs compute the same.

    Args:
        asked: whether the user asked for this rope; else the default one is left as the config has it.

    Raises:
        CheckpointError: a config of which transformers makes none, or not with this rope.
        RopeError: parameters that are missing or impossible.
        RopewalkError: transformers would compute other frequencies than we do.
    """
    if decision.type == "none":
        return PortableRope("none", dict(checkpoint.config), f"no rope to write: {decision.why}")
    model = _without_scaling(checkpoint, decision) if decision.type in (*_KNOWN, *REGISTERED_TYPES) else None
    if model is None:
        return PortableRope(decision.type, dict(checkpoint.config), f"rope {decision.type} left as it was")
    context_lengths(checkpoint.config)  # are numbers
    config = dict(checkpoint.config)
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    if getattr(model, "head_dim", head_dim) is None:
        config["head_dim"] = head_dim  # of Mixtral; transformers fails for YaRN and longrope where it is not told
    ours = SimpleNamespace(
        rope_parameters={**model.rope_parameters, **decision.parameters},
        head_dim=head_dim,
        max_position_embeddings=model.max_position_embeddings,
        original_max_position_embeddings=checkpoint.config.get(_ORIGINAL),
    )
    if decision.type in REGISTERED_TYPES:
        written = _as_longrope(config, ours, decision)
    elif decision.type == "default" and not asked:
        written = PortableRope("default", dict(checkpoint.config), "rope default left as it was", context_length(ours))
    else:
        written = _as_known(config, ours, decision)
    _check(checkpoint, written, ours)
    return written


def _without_scaling(checkpoint: Checkpoint, decision: RopeDecision) -> Any:
    """Return transformers' config of a model with the default rope: what config.json leaves to its family is there."""
    kept = {k: v for k, v in decision.parameters.items() if k in ("rope_theta", "partial_rotary_factor")}
    return model_config(checkpoint, RopeDecision("default", {"rope_type": "default", **kept}, decision.why))


def _as_longrope(config: Mapping[str, Any], ours: Any, decision: RopeDecision) -> PortableRope:
    found, scaling = divisors_of(ours)
    factors = tuple(float(factor) for factor in found)
    context = context_length(ours)
    parameters = {
        "short_factor": list(factors),
        "long_factor": list(factors),
        "factor": 1.0,  # of attention alone; without it transformers warns
        "attention_factor": scaling,
        _ORIGINAL: context,
    }
    lengths = {"max_position_embeddings": context, _ORIGINAL: context}
    note = (
        f"rope {decision.type} written as longrope ({len(factors)} factors, {min(factors):.2f} to {max(factors):.2f}), "
        f"context {context}"
    )
    return PortableRope("longrope", _with_rope(config, ours, "longrope", parameters, lengths), note, context, factors)


def _as_known(config: Mapping[str, Any], ours: Any, decision: RopeDecision) -> PortableRope:
    rope_type, context = decision.type, context_length(ours)
    parameters = {k: v for k, v in decision.parameters.items() if k not in ("rope_type", "type")}
    for name in ("factor", "attention_factor"):  # vLLM fails for a whole factor of linear, transformers warns of others
        if isinstance(parameters.get(name), int):
            parameters[name] = float(parameters[name])
    lengths: dict[str, Any] = {}
    if rope_type == "dynamic" and _ORIGINAL in parameters:  # others scale from max_position_embeddings on
        lengths = {"max_position_embeddings": parameters.pop(_ORIGINAL)}
    elif rope_type in _SCALED_LENGTH:
        lengths = {"max_position_embeddings": context}
    elif rope_type != "default" and _ORIGINAL in config:
        # Phi-3's code reads it there for longrope; for linear and dynamic it tells which length the other one is.
        lengths = {_ORIGINAL: config[_ORIGINAL]}
    why = "other programs know it by this name"
    if rope_type == "dynamic":
        why += ", and longrope cannot follow the length as it does"
    note = f"rope {rope_type} kept, since {why}; context {context}"
    return PortableRope(rope_type, _with_rope(config, ours, rope_type, parameters, lengths), note, context)


def _with_rope(
    config: Mapping[str, Any], ours: Any, rope_type: str, parameters: Mapping[str, Any], lengths: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a config with a rope in the words of transformers 5 (rope_parameters) and of earlier ones: rope_scaling,
    which transformers 5 reads first where both are there, and rope_theta outside of it.

    What said the scaling before, by other keys, goes: who reads it would scale twice.
    """
    shared = {
        name: ours.rope_parameters[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if ours.rope_parameters.get(name) is not None
    }
    rope = {"rope_type": rope_type, **shared, **parameters}
    scaling = {**rope, "type": rope_type} if rope_type != "default" else None
    kept = {name: value for name, value in config.items() if name not in (*KEYS_OF_2023, _ORIGINAL) or name in lengths}
    return {**kept, **lengths, **shared, "rope_scaling": scaling, "rope_parameters": rope}


def _check(checkpoint: Checkpoint, written: PortableRope, ours: Any) -> None:
    """Compare what transformers makes of a config with what we do.

    Raises:
        CheckpointError: it makes nothing of it: a family that knows no such rope.
        RopewalkError: they differ.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if written.type not in ROPE_INIT_FUNCTIONS:
        return  # default, which has no scaling to be misread
    raw = json.loads(json.dumps({k: v for k, v in written.config.items() if k not in (CONFIG_KEY, "auto_map")}))
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        theirs, their_scaling = ROPE_INIT_FUNCTIONS[written.type](config)
    except Exception as error:  # whatever a config's validation raises, and computing with it
        wanted = f"a {raw['model_type']} model that transformers gives a rope of type {written.type}"
        raise CheckpointError(checkpoint.folder / "config.json", wanted, first_line(error)) from error
    expected, scaling = frequencies_of(ours)
    if theirs.shape != expected.shape or not (
        bool(((theirs - expected).abs() <= _SAME * expected).all()) and abs(their_scaling - scaling) <= _SAME * scaling
    ):
        raise RopewalkError(
            f"export: expected transformers to compute {_shown(expected, scaling)} from rope type {written.type}, "
            f"found {_shown(theirs, their_scaling)}; nothing was written"
        )


def _shown(inv_freq: Any, scaling: float) -> str:
    values = inv_freq.tolist()
    return f"{len(values)} frequencies down to {min(values, default=math.nan):.4g} and scaling {scaling:.4g}"
