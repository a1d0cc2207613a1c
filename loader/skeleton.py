"""A model of transformers without its weights: the right modules, packed layers among them, and nothing read yet.

Everything that headers can tell is checked here: each tensor of the checkpoint has a place in the model, each place has
a tensor, and the shapes agree. What remains is to fill it (fill.py).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.errors import CheckpointError, FormatError, MissingTensorsError, UsageError
from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.experts import CLASSES, NAMES, PackedExperts
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.rope import RopeDecision

# Persisted by transformers up to 4.31: rotary frequencies and attention biases, computed afresh today.
OLD_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.masked_bias")

# Building a model changes torch's default dtype and methods of nn.Module for a moment, for all threads.
BUILDING = threading.RLock()

# Names of sizes, of counts and of others in configs.
_SIZES = (
    *("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads"),
    *("d_model", "n_heads", "expansion_ratio", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("n_embd", "n_inner", "n_head", "ffn_dim", "rotary_dim", "num_kv_heads", "word_embed_proj_dim"),
)
_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# What some families make a table of, at once or when they are first used; and what transformers makes a dict of.
_TABLES = {"max_seq_len": 1 << 22, "n_positions": 1 << 22, "n_ctx": 1 << 22, "num_labels": 1 << 16}
_FLAGS = ("return_dict", "output_hidden_states", "output_attentions", "use_cache")
_WINDOWS = ("sliding_window", "attention_chunk_size", "max_window_layers", "max_position_embeddings")
# What nothing works without; of others 0 means that there is none.
_POSITIVE = ("sliding_window", "attention_chunk_size", "num_experts_per_tok", "max_seq_len", "num_attention_heads")

_EXPERT = re.compile(r"(?P<stack>.+)\.(?P<number>\d+)\.(?P<name>w1|w2|w3|gate_proj|up_proj|down_proj)")


@dataclass
class Skeleton:
    """A model on the meta device, and where each tensor of the checkpoint goes.

    Attributes:
        model: of transformers; parameters are on the meta device, other buffers where they belong.
        packed: name of a layer in the checkpoint -> the QuantLinear that takes it.
        plain: name of a tensor in the checkpoint -> name of the parameter or buffer that takes it.
        stacked: name of a tensor in the checkpoint -> (name of a parameter, the slice of it that it fills).
        tied: name of a parameter that has no tensor of its own -> name of that it shares.
    """

    model: Any
    packed: dict[str, QuantLinear] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def model_config(checkpoint: Checkpoint, decision: RopeDecision) -> Any:
    """Return transformers' config of a checkpoint with the rope decided, without code or quantization in it; our rope
    types must be registered.

    Raises:
        CheckpointError: an architecture that transformers does not have, or settings that it refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = checkpoint.folder / "config.json"
    model_type = checkpoint.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(file, "a model_type of transformers", repr(model_type))
    check_sizes(checkpoint)
    raw = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "auto_map")}
    if decision.parameters:
        raw.pop("rope_scaling", None)
        raw["rope_parameters"] = decision.parameters
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # whatever a config's validation raises
        raise CheckpointError(file, f"settings of a {model_type} model", first_line(error)) from error
    _check_defaults(checkpoint, config)
    config.name_or_path = str(checkpoint.folder)
    return config


def build(
    checkpoint: Checkpoint, decision: RopeDecision, dtype: torch.dtype, model_class: Any = None, **options: Any
) -> Skeleton:
    """Build the model of a packed checkpoint.

    Args:
        dtype: of what is not packed.
        model_class: a class of transformers; by default the causal language model of the config.
        options: `attn_implementation`.

    Raises:
        CheckpointError: a config that gives no causal language model.
        MissingTensorsError: tensors that the model needs and the checkpoint lacks, or the reverse.
        FormatError: shapes that differ from the model's.
    """
    from transformers import AutoModelForCausalLM

    config = model_config(checkpoint, decision)
    file = checkpoint.folder / "config.json"
    make = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    with BUILDING, _empty_weights():
        try:
            model = make(config, dtype=dtype, **options)
        except Exception as error:  # an architecture without a causal model, sizes that do not divide, …
            if "attn_implementation" in options and "attn" in str(error):
                raise UsageError(f"attn_implementation: {first_line(error)}") from error
            raise CheckpointError(file, "settings that a model can be built from", first_line(error)) from error
    skeleton = Skeleton(model)
    rename = _Names(model)
    _place_packed(skeleton, checkpoint, rename)
    _place_plain(skeleton, checkpoint, rename)
    return skeleton


def check_sizes(checkpoint: Checkpoint) -> None:
    """Refuse sizes that no model made of these tensors has, before a model of them takes all memory or days.

    Raises:
        CheckpointError: naming the size.
    """
    tensors, file = checkpoint.tensors, checkpoint.folder / "config.json"
    largest = max((max(entry.shape, default=1) for entry in tensors.values()), default=1)
    limits = dict.fromkeys(_SIZES, 32 * largest) | dict.fromkeys(_COUNTS, len(tensors))
    limits |= dict.fromkeys((*_EXPERTS, "num_experts_per_tok"), max(largest, len(tensors)))
    limits |= _TABLES | dict.fromkeys(_WINDOWS, 1 << 40)
    for name in _FLAGS:
        if not isinstance(value := checkpoint.config.get(name), (bool, type(None))):
            raise CheckpointError(file, f"{name} true or false", repr(value)[:80])
    parts = [part for part in checkpoint.config.values() if isinstance(part, dict)]  # text_config and the like
    for part in (checkpoint.config, *parts):
        for name, limit in limits.items():
            value = part.get(name)
            # transformers writes a window of 0 for a Qwen that uses none.
            none = name == "sliding_window" and str(part.get("model_type")).startswith("qwen")
            least = 1 if name in _POSITIVE and not none else 0
            odd = isinstance(value, (float, str, dict)) or (isinstance(value, list) and name in _WINDOWS)
            if odd or (isinstance(value, int) and not least <= value <= limit):
                by = ", by the size of the tensors" if limit < 1 << 40 and name not in _TABLES else ""
                raise CheckpointError(file, f"{name} a whole number from {least} to {limit}{by}", repr(value)[:80])


def _check_defaults(checkpoint: Checkpoint, config: Any) -> None:
    """As `check_sizes`, of what config.json leaves to the defaults of its family."""
    largest = max((max(entry.shape, default=1) for entry in checkpoint.tensors.values()), default=1)
    text = config.get_text_config()
    limits = {"num_hidden_layers": len(checkpoint.tensors), "hidden_size": 32 * largest, "vocab_size": 32 * largest}
    experts = next((n for name in _EXPERTS if type(n := getattr(text, name, None)) is int), None)
    if experts:
        limits["num_experts_per_tok"] = experts
    for name, limit in limits.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and value > limit:
            by = f"for {config.model_type}, by the size of the tensors or the number of experts"
            raise CheckpointError(checkpoint.folder / "config.json", f"{name} of at most {limit} {by}", value)


def first_line(error: BaseException) -> str:
    """Return an error of another library as a part of a message of ours."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _empty_weights() -> Any:
    """Return a context in which parameters get no memory and no initial values, while buffers do."""
    from contextlib import ExitStack

    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    stack = ExitStack()
    stack.enter_context(no_init_weights())
    stack.enter_context(init_empty_weights(include_buffers=False))
    return stack


class _Names:
    """Turns the names that a checkpoint uses into those of today's transformers, where these differ."""

    def __init__(self, model: Any):
        self._model = model
        self._renamings: list[Any] | None = None

    def __call__(self, name: str) -> str:
        if self._renamings is None:  # most checkpoints need none, and making the table takes a tenth of a second
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming

            found = get_model_conversion_mapping(self._model) or []
            self._renamings = [renaming for renaming in found if isinstance(renaming, WeightRenaming)]
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return name


def _place_packed(skeleton: Skeleton, checkpoint: Checkpoint, rename: _Names) -> None:
    """Put a QuantLinear wherever the checkpoint has a packed layer."""
    stacks: dict[str, dict[int, dict[str, PackedLayer]]] = {}
    modules = dict(skeleton.model.named_modules())
    for layer in checkpoint.layers.values():
        name = layer.name if layer.name in modules else rename(f"{layer.name}.qweight").removesuffix(".qweight")
        of_expert = None if name in modules else _EXPERT.fullmatch(name)
        if of_expert and type(modules.get(of_expert["stack"])).__name__ in CLASSES:
            experts = stacks.setdefault(of_expert["stack"], {})
            experts.setdefault(int(of_expert["number"]), {})[of_expert["name"]] = layer
            continue
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "none of that name" if linear is None else type(linear).__name__
            raise MissingTensorsError(
                _file(layer), f"a linear layer {layer.name} in {type(skeleton.model).__name__}", found
            )
        skeleton.packed[layer.name] = _replace(skeleton.model, name, layer, linear.in_features, linear.out_features)
    for name, experts in stacks.items():
        _place_experts(skeleton, name, modules[name], experts)


def _place_experts(skeleton: Skeleton, name: str, module: Any, found: dict[int, dict[str, PackedLayer]]) -> None:
    """Put PackedExperts in place of a module of transformers."""
    count, twice_inner, hidden = module.gate_up_proj.shape
    some = next(iter(next(iter(found.values())).values()))
    names = next(names for names in NAMES if some.name.rpartition(".")[2] in names)
    sizes = dict(zip(names, ((hidden, twice_inner // 2),) * 2 + ((twice_inner // 2, hidden),), strict=True))
    experts = []
    for number in range(count):
        layers = found.get(number, {})
        for wanted in names:
            if wanted not in layers:
                stem = some.name.rsplit(".", 2)[0]
                raise MissingTensorsError(_file(some), f"a packed layer {stem}.{number}.{wanted}", "none of that name")
        experts.append({n: _packed(layers[n], *sizes[n]) for n in names})
        skeleton.packed.update({layers[n].name: experts[-1][n] for n in names})
    if extra := sorted(set(found) - set(range(count))):
        raise MissingTensorsError(_file(some), f"{count} experts (config.json)", f"number {extra[0]} in {name}")
    parent, _, attribute = name.rpartition(".")
    setattr(skeleton.model.get_submodule(parent), attribute, PackedExperts(experts, module.act_fn))


def _replace(model: Any, name: str, layer: PackedLayer, in_features: int, out_features: int) -> QuantLinear:
    packed = _packed(layer, in_features, out_features)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, packed)
    return packed


def _packed(layer: PackedLayer, in_features: int, out_features: int) -> QuantLinear:
    """Return an empty QuantLinear for a layer that has the sizes which the model expects.

    Raises:
        FormatError: others.
    """
    if (layer.in_features, layer.out_features) != (in_features, out_features):
        expected = f"a layer of {in_features} inputs and {out_features} outputs (config.json)"
        raise FormatError(layer.name, expected, f"{layer.in_features} and {layer.out_features}", str(_file(layer)))
    settings = layer.settings
    packed = QuantLinear(
        settings.bits,
        settings.group_size,
        in_features,
        out_features,
        layer.has_bias,
        checkpoint_format=settings.checkpoint_format,
        device="meta",
    )
    if not layer.has_g_idx:
        packed.drop_g_idx()
    return packed


def _file(layer: PackedLayer) -> object:
    return next(iter(layer.entries.values())).file


def _place_plain(skeleton: Skeleton, checkpoint: Checkpoint, rename: _Names) -> None:
    """Find the place of every other tensor, and see that none is left over and no place left empty."""
    model = skeleton.model
    places = _places(model)
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    unexpected = []
    for name in checkpoint.plain_tensors():
        target = name if name in places else rename(name)
        of_expert = _EXPERT.fullmatch(target.removesuffix(".weight"))
        if target in places:
            skeleton.plain[name] = target
            _check_shape(checkpoint, name, places[target].shape)
        elif of_expert and (part := _part_of_stack(of_expert, places)):
            skeleton.stacked[name] = part
            _check_shape(checkpoint, name, places[part[0]][part[1]].shape)
        elif not target.endswith(OLD_BUFFERS) and not any(re.search(pattern, target) for pattern in ignored):
            unexpected.append(name)
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise MissingTensorsError(checkpoint.folder, "only tensors that the model has", f"{unexpected[0]}{more}")
    _check_complete(skeleton, checkpoint, places)


def _places(model: Any) -> dict[str, Tensor]:
    """Return name -> parameter or persistent buffer of all that is not packed."""
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in packed
    }


def _part_of_stack(found: re.Match[str], places: Mapping[str, Tensor]) -> tuple[str, tuple[Any, ...]] | None:
    """Return which parameter of an unpacked stack a weight of one expert is a part of, and which part."""
    gate_up, down = (places.get(f"{found['stack']}.{name}") for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or int(found["number"]) >= len(down):
        return None
    number, inner = int(found["number"]), gate_up.shape[1] // 2
    role = next(names.index(found["name"]) for names in NAMES if found["name"] in names)
    if role == 2:
        return f"{found['stack']}.down_proj", (number,)
    return f"{found['stack']}.gate_up_proj", (number, slice(role * inner, (role + 1) * inner))


def _check_shape(checkpoint: Checkpoint, name: str, expected: torch.Size) -> None:
    entry = checkpoint.tensors[name]
    if entry.shape != tuple(expected):
        raise FormatError(name, f"shape {list(expected)} (config.json)", list(entry.shape), str(entry.file))
    if not entry.dtype.is_floating_point:
        raise FormatError(name, "a floating-point dtype", entry.dtype, str(entry.file))


def _check_complete(skeleton: Skeleton, checkpoint: Checkpoint, places: Mapping[str, Tensor]) -> None:
    """See that every place gets a tensor: one of its own, all parts of it, or one that it is tied to."""
    filled = set(skeleton.plain.values())
    sizes: dict[str, int] = {}
    for name, (target, _) in skeleton.stacked.items():
        sizes[target] = sizes.get(target, 0) + math.prod(checkpoint.tensors[name].shape)
    filled |= {target for target, size in sizes.items() if size == places[target].numel()}
    for target, source in (getattr(skeleton.model, "all_tied_weights_keys", None) or {}).items():
        if target not in filled and source in filled:
            skeleton.tied[target] = source
        elif source not in filled and target in filled:
            skeleton.tied[source] = target
    # A buffer that is saved but was computed while building needs none.
    missing = [n for n, t in places.items() if n not in filled and n not in skeleton.tied and t.is_meta]
    if missing:
        more = f" ({len(missing)} missing)" if len(missing) > 1 else ""
        raise MissingTensorsError(checkpoint.folder, f"tensor {sorted(missing)[0]}", f"none of that name{more}")
