"""`ropewalk.load`: from a folder to a model of transformers that computes with packed weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ropewalk.errors import CheckpointError, MissingTensorsError, UsageError
from ropewalk.gptq.cpu_ops import check_mode
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.half_linear import keep_half
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.rope import RopeDecision, decide_rope

log = logging.getLogger("ropewalk")


def load(
    model: str | Path,
    *,
    rope: str = "auto",
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    lora: str | Path | None = None,
    cpu_mode: str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a local folder with config.json and .safetensors weights, packed by GPTQ (of 2023, with
            quantize_config.json and a file such as gptq_model-4bit-32g.safetensors, or modern) or in
            plain float16.
        rope: "auto" follows the config and what it implies (see `ropewalk.loader.rope`); otherwise
            "none", "linear:2", "partial-ntk:factor=4,original=4096" and so on (`parse_rope`).
        device_map: as transformers takes it; by default all on the GPU if there is one, else the CPU.
        dtype: of activations and of what is not packed; by default float32 on the CPU, float16 on a GPU.
        lora: a folder with a PEFT adapter to put on top.
        cpu_mode: of packed layers on the CPU: "int8" rounds activations to 8 bits in blocks of 32, "exact" does not
            (see `ropewalk.gptq.cpu_ops`); by default $ROPEWALK_CPU_MODE, or "int8".
        kwargs: passed on to transformers' `from_pretrained` (attn_implementation, max_memory, …).

    Returns:
        (model, tokenizer): a normal transformers model in eval mode, whose `config.rope_parameters` tell
        the rotary embedding chosen; the tokenizer is None where the folder has none.

    Raises:
        CheckpointError, FormatError: a file at fault, found before the model is built.
        RopeError: an impossible rotary embedding.
        UsageError: an argument that is not understood.
    """
    if cpu_mode is not None:
        check_mode(cpu_mode, "cpu_mode")
    checkpoint = open_checkpoint(model)
    decision = decide_rope(checkpoint.config, rope)
    log.info("rope: %s, since %s", decision, decision.why)
    for warning in (*checkpoint.warnings, *decision.warnings):
        log.warning("%s: %s", checkpoint.folder.name, warning)
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(checkpoint, decision, device_map=device_map, dtype=as_dtype(dtype, device_map), **kwargs)
    if checkpoint.quantize_config is not None:
        keep_half(loaded, checkpoint)
    for layer in loaded.modules():
        if isinstance(layer, QuantLinear):
            layer.cpu_mode = cpu_mode
    if lora is not None:
        from ropewalk.loader.lora import load_lora

        loaded = load_lora(loaded, lora)
    return loaded, load_tokenizer(checkpoint)


def load_model(checkpoint: Checkpoint, decision: RopeDecision, **kwargs: Any) -> Any:
    """Build the model of a checked checkpoint; `kwargs` go to transformers' `from_pretrained`.

    Raises:
        CheckpointError: an architecture that transformers does not have.
        MissingTensorsError: tensors that the model needs and the checkpoint lacks, or the reverse.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ropewalk.loader import quantizer

    quantizer.register()
    model_type = checkpoint.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(checkpoint.folder / "config.json", "a model_type of transformers", repr(model_type))
    raw = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "auto_map")}
    if decision.parameters:
        raw.pop("rope_scaling", None)
        raw["rope_parameters"] = decision.parameters
    config = CONFIG_MAPPING[model_type].from_dict(raw)
    if checkpoint.quantize_config is not None:
        config.quantization_config = quantizer.request(checkpoint.quantize_config)
    if len(checkpoint.files) == 1:
        config.transformers_weights = checkpoint.files[0].name
    model, loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=config,
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
        **kwargs,
    )
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights  # or it would be saved, and name a file that is not there
    _check_complete(checkpoint, loaded)
    quantizer.install_rope(model, decision)
    return model


def _check_complete(checkpoint: Checkpoint, loaded: dict[str, Any]) -> None:
    """Refuse a model with a weight that was not in the file, or a file with one that is not in the model."""
    # Persisted by transformers up to 4.31: rotary frequencies and attention biases, computed afresh today.
    old = ("rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
    unexpected = sorted(name for name in loaded["unexpected_keys"] if not name.endswith(old))
    missing = sorted(loaded["missing_keys"])
    mismatched = sorted(str(m[0] if isinstance(m, (tuple, list)) else m) for m in loaded["mismatched_keys"])
    if missing:
        raise MissingTensorsError(checkpoint.folder, f"tensor {missing[0]}", _none_of(missing))
    if unexpected:
        found = f"{unexpected[0]}" + (f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else "")
        raise MissingTensorsError(checkpoint.folder, "only tensors that the model has", found)
    if mismatched:
        raise MissingTensorsError(checkpoint.folder, "shapes as config.json has them", f"others for {mismatched[0]}")


def _none_of(names: list[str]) -> str:
    return "none of that name" + (f" ({len(names)} missing)" if len(names) > 1 else "")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the folder's tokenizer, or None where it has no tokenizer files.

    Raises:
        CheckpointError: tokenizer files that cannot be read.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((checkpoint.folder / name).is_file() for name in names):
        log.warning("%s: no tokenizer files (%s)", checkpoint.folder.name, ", ".join(names))
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # whatever a tokenizer library raises
        raise CheckpointError(checkpoint.folder, "a tokenizer that transformers can read", error) from error


def as_dtype(dtype: torch.dtype | str | None, device_map: Any) -> torch.dtype:
    """Return a floating dtype from its name, or the default for where the model goes.

    Raises:
        UsageError: not a name of one.
    """
    if dtype is None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        return torch.float32 if all(str(place) == "cpu" for place in places) else torch.float16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype: expected float32, float16 or bfloat16, found {dtype!r}")
    return found
