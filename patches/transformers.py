"""transformers: `from_pretrained` on a GPTQ folder computes with our layers, our rope types have names, and
the rotary embedding of every half-rotated family is one kernel on a GPU.

What is changed, all of it undone by `revert`: `PreTrainedModel.from_pretrained`, which otherwise asks for optimum and
gptqmodel; `apply_rotary_pos_emb` of the modeling modules that are imported (see `ropewalk.loader.apply_rotary`); and
`PreTrainedModel.__init__`, so as to do that for the ones to come.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from ropewalk.errors import CheckpointError, UsageError
from ropewalk.patches.replace import Replacements, expect_arguments, installed

# What from_pretrained takes that means nothing for a packed folder on this machine, or is settled by it.
_WITHOUT_MEANING = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "token", "use_auth_token", "revision", "code_revision"),
        *("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "proxies", "user_agent", "subfolder"),
        *("weights_only", "adapter_kwargs", "quantization_config", "_commit_hash", "_from_auto", "_from_pipeline"),
        *("ignore_mismatched_sizes", "offload_buffers", "use_kernels", "tqdm_class", "resume_download"),
    }
)

_replaced = Replacements()


def apply() -> str:
    """Patch transformers; return one line that says what was done. Doing it twice changes nothing.

    Raises:
        PatchError: a transformers whose methods have other arguments than are known here; nothing is changed then.
        MissingPackageError: a transformers before 5; the same.
    """
    from transformers import PreTrainedModel

    from ropewalk.loader import apply_rotary
    from ropewalk.loader.rotary import register_rope_types

    if not _replaced:
        init, from_pretrained = PreTrainedModel.__init__, PreTrainedModel.from_pretrained.__func__
        expect_arguments("transformers", "PreTrainedModel", init, ["self", "config"])
        known = ["cls", "pretrained_model_name_or_path"]
        expect_arguments("transformers", "from_pretrained", from_pretrained, known)
        register_rope_types()
        _replaced.put(PreTrainedModel, "__init__", _init(init))
        _replaced.put(PreTrainedModel, "from_pretrained", classmethod(_from_pretrained(from_pretrained)))
    apply_rotary.replace_imported()
    return (
        "transformers: GPTQ checkpoints load with ropewalk; rope types partial-ntk, ntk-by-parts and ntk registered; "
        "half-rotated families rotate q and k in one kernel on a GPU"
    )


def _init(original: Any) -> Any:
    """Have `apply_rotary_pos_emb` of a family replaced when the first of its models is built, however it is."""
    from ropewalk.loader import apply_rotary

    @functools.wraps(original)
    def init(self: Any, config: Any, *inputs: Any, **kwargs: Any) -> None:
        apply_rotary.replace(type(self).__module__)
        original(self, config, *inputs, **kwargs)

    return init


def _from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        checkpoint = None if args else _packed(pretrained_model_name_or_path, kwargs)
        if checkpoint is None:
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        return _load(cls, checkpoint, kwargs)

    return from_pretrained


def _packed(name: Any, kwargs: dict[str, Any]) -> Any:
    """Return the checkpoint that a call means, or None where it is not one that GPTQ packed."""
    from ropewalk.loader.checkpoint import open_checkpoint
    from ropewalk.loader.source import find_source

    if name is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return None
    folder = Path(name)
    if not folder.is_dir():
        stated = getattr(kwargs.get("config"), "quantization_config", None)
        method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
        if str(getattr(method, "value", method)) != "gptq":
            return None
        given = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        folder = find_source(str(name), **given).folder
    return open_checkpoint(folder) if _is_packed(folder) else None


def _is_packed(folder: Path) -> bool:
    """Tell whether a folder says that GPTQ packed it, or holds packed layers without saying so."""
    from ropewalk.loader.quantize_config import CONFIG_KEY, FILES, read_json

    if any((folder / name).is_file() for name in FILES):
        return True
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        return False
    stated = config.get(CONFIG_KEY)
    if stated is not None:
        return isinstance(stated, dict) and stated.get("quant_method") == "gptq"
    return any(_has_packed_layers(file) for file in folder.glob("*.safetensors"))


def _has_packed_layers(file: Path) -> bool:
    from ropewalk.loader.safetensors_file import read_header

    try:
        return any(name.endswith(".qweight") for name in read_header(file)[0])
    except CheckpointError:
        return False  # whatever it is, transformers may not need it; where it does, it says what is wrong


def _load(cls: Any, checkpoint: Any, kwargs: dict[str, Any]) -> Any:
    """Load a packed checkpoint as `from_pretrained` would, with its defaults: the config's dtype, and the CPU."""
    import torch

    from ropewalk.loader.load import load_packed
    from ropewalk.loader.rope import decide_rope

    options = {key: value for key, value in kwargs.items() if key not in _WITHOUT_MEANING and value is not None}
    config = options.pop("config", None)
    generation_config = options.pop("generation_config", None)
    with_info = options.pop("output_loading_info", False)
    dtype = options.pop("dtype", options.pop("torch_dtype", "auto"))
    if config is not None:
        # It may be the caller's own, with another rope for example; what it does not know is as in the file.
        checkpoint = replace(checkpoint, config={**checkpoint.config, **config.to_dict()})
    if dtype == "auto":
        stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float16"
        dtype = stated if isinstance(stated, torch.dtype) else str(stated).removeprefix("torch.")
    known = {key: options.pop(key) for key in ("device_map", "max_memory", "attn_implementation") if key in options}
    if options:
        raise UsageError(f"from_pretrained: expected no {sorted(options)[0]} for a packed model, found one")
    known.setdefault("device_map", "cpu")
    decision = decide_rope(checkpoint.config, file=checkpoint.folder / "config.json")
    model = load_packed(checkpoint, decision, dtype=dtype, model_class=cls, progress=True, **known)
    if generation_config is not None:
        model.generation_config = generation_config
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model, info) if with_info else model


def revert() -> str:
    """Give transformers its own methods and functions back; models that are loaded keep their layers."""
    from ropewalk.loader import apply_rotary

    apply_rotary.restore()
    _replaced.restore()
    return "transformers: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}."""
    return {
        "package": "transformers",
        "version": installed("transformers"),
        "tested": "5.6 to 5.23",
        "applied": bool(_replaced),
    }
