"""transformers: `from_pretrained` on a GPTQ folder computes with our layers, our rope types have names, and
the rotary embedding of every half-rotated family is one kernel on a GPU.

What is changed, all of it undone by `revert`: `PreTrainedModel.from_pretrained`, which otherwise asks for optimum and
gptqmodel; `from_pretrained` of AutoConfig, AutoTokenizer and AutoProcessor, which may run code of a packed model (see
remote_code.py); `apply_rotary_pos_emb` of the modeling modules that are imported (see `ropewalk.loader.apply_rotary`);
`PreTrainedModel.__init__`, so as to do that for the ones to come; and the table of rope types.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ropewalk.errors import PatchError, UsageError
from ropewalk.patches import remote_code
from ropewalk.patches.replace import Replacements, expect_arguments, installed

# What from_pretrained takes that means nothing for a packed folder on this machine, or is settled by it.
_WITHOUT_MEANING = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "token", "use_auth_token", "revision", "code_revision"),
        *("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "proxies", "user_agent", "subfolder"),
        *("weights_only", "quantization_config", "_commit_hash", "_from_auto", "_from_pipeline", "offload_folder"),
        *("ignore_mismatched_sizes", "offload_buffers", "offload_state_dict", "use_kernels", "tqdm_class"),
        "resume_download",
    }
)
# What it takes besides, and is not a setting of the config.
_OURS = ("device_map", "max_memory", "attn_implementation", "dtype", "torch_dtype", "generation_config")
_OF_ADAPTERS = ("adapter_kwargs", "adapter_name")

_replaced = Replacements()


def apply() -> str:
    """Patch transformers; return one line that says what was done. Doing it twice changes nothing.

    Raises:
        PatchError: a transformers whose methods have other arguments than are known here; nothing is changed then.
        MissingPackageError: a transformers before 5; the same.
    """
    from transformers import PreTrainedModel

    from ropewalk.loader import apply_rotary
    from ropewalk.loader.rotary import register_rope_types, unregister_rope_types

    if not _replaced:
        init, from_pretrained = PreTrainedModel.__init__, PreTrainedModel.from_pretrained.__func__
        expect_arguments("transformers", "PreTrainedModel", init, ["self", "config"])
        known = ["cls", "pretrained_model_name_or_path"]
        expect_arguments("transformers", "from_pretrained", from_pretrained, known)
        register_rope_types("transformers")
        try:
            remote_code.replace(_replaced)
        except PatchError:
            unregister_rope_types("transformers")
            raise
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
    from ropewalk.loader.packed_name import find_packed

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name, adapter = _base_of(pretrained_model_name_or_path, kwargs)
        ours = not (args or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None)
        source = find_packed(name, kwargs, kwargs.get("config")) if ours else None
        if source is None:
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        return _load(cls, source, adapter, kwargs)

    return from_pretrained


def _base_of(name: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return (the model's name, that of a PEFT adapter or None), as transformers takes an adapter for its base."""
    adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if adapter is None and isinstance(name, (str, os.PathLike)) and Path(name, "adapter_config.json").is_file():
        from transformers.integrations.peft import maybe_load_adapters

        adapter, name, _ = maybe_load_adapters(str(name), {})
    return name, adapter


def _load(cls: Any, source: Any, adapter: Any, kwargs: dict[str, Any]) -> Any:
    """Load a packed checkpoint as `from_pretrained` would, with its defaults: the config's dtype, and the CPU."""
    from ropewalk.loader.checkpoint import open_checkpoint
    from ropewalk.loader.load import load_packed
    from ropewalk.loader.rope import decide_rope

    checkpoint = open_checkpoint(source.folder, file=source.file)
    options = {key: value for key, value in kwargs.items() if key not in _WITHOUT_MEANING and value is not None}
    config = options.pop("config", None)
    of_adapter = {key: options.pop(key) for key in _OF_ADAPTERS if key in options}
    with_info = options.pop("output_loading_info", False)
    known = {key: options.pop(key) for key in _OURS if key in options}
    if options and config is None:
        config = source.folder  # what is left may be settings of it
    if isinstance(config, (str, os.PathLike)):
        config, options = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **options)
    if config is not None:
        # It may be the caller's own, with another rope for example; what it does not know is as in the file.
        checkpoint = replace(checkpoint, config={**checkpoint.config, **config.to_dict()})
    if options:
        raise UsageError(f"from_pretrained: expected no {sorted(options)[0]} for a packed model, found one")
    generation_config = known.pop("generation_config", None)
    dtype = _dtype(known.pop("torch_dtype", None), known.pop("dtype", None), checkpoint.config)
    known.setdefault("device_map", "cpu")
    decision = decide_rope(checkpoint.config, file=checkpoint.folder / "config.json")
    model = load_packed(checkpoint, decision, dtype=dtype, model_class=cls, progress=True, **known)
    if generation_config is not None:
        model.generation_config = generation_config
    if adapter is not None:
        _load_adapter(model, adapter, of_adapter, kwargs)
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model, info) if with_info else model


def _dtype(old: Any, new: Any, config: dict[str, Any]) -> Any:
    """Return the dtype that a call asks for, or the config's for "auto"."""
    import torch

    dtype = new if new is not None else old if old is not None else "auto"
    if dtype != "auto":
        return dtype
    stated = config.get("dtype") or config.get("torch_dtype") or "float16"
    return stated if isinstance(stated, torch.dtype) else str(stated).removeprefix("torch.")


def _load_adapter(model: Any, adapter: Any, of_adapter: dict[str, Any], kwargs: dict[str, Any]) -> None:
    arguments = dict(of_adapter.get("adapter_kwargs") or {})
    arguments.pop("_adapter_model_path", None)
    if kwargs.get("token") is not None:
        arguments["token"] = kwargs["token"]
    name = of_adapter.get("adapter_name", "default")
    model.load_adapter(str(adapter), adapter_name=name, adapter_kwargs=arguments)


def revert() -> str:
    """Give transformers its own methods and functions back; models that are loaded keep their layers."""
    from ropewalk.loader import apply_rotary
    from ropewalk.loader.rotary import unregister_rope_types

    apply_rotary.restore()
    _replaced.restore()
    unregister_rope_types("transformers")
    return "transformers: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}."""
    return {
        "package": "transformers",
        "version": installed("transformers"),
        "tested": "5.6 to 5.23",
        "applied": bool(_replaced),
    }
