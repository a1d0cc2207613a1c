"""transformers' Auto classes, so that they run no code that comes with a packed model, whatever trust_remote_code says.

A repository may name code of its own in config.json and tokenizer_config.json, which `trust_remote_code=True` has
transformers run before anyone looks at the weights. Packed models are built from transformers' own classes here, so
that the code would be run for nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ropewalk.errors import CheckpointError
from ropewalk.loader.packed_name import is_packed
from ropewalk.patches.replace import Replacements, expect_arguments

# What a config.json may name code in.
_KEYS = ("auto_map", "custom_pipelines")


def replace(replaced: Replacements) -> None:
    """Replace `from_pretrained` of the Auto classes for configs, tokenizers and processors; those for models ask the
    config whether there is code.

    Raises:
        PatchError: one that has other arguments than are known here; nothing is replaced then.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    wrappers = {AutoConfig: _config, AutoTokenizer: _without_code, AutoProcessor: _without_code}
    for owner in wrappers:
        known = ["cls", "pretrained_model_name_or_path"]
        expect_arguments("transformers", f"{owner.__name__}.from_pretrained", owner.from_pretrained.__func__, known)
    for owner, wrapper in wrappers.items():
        replaced.put(owner, "from_pretrained", classmethod(wrapper(owner.from_pretrained.__func__)))


def _without_code(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("trust_remote_code") and is_packed(pretrained_model_name_or_path, kwargs):
            kwargs["trust_remote_code"] = False
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    return from_pretrained


def _config(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not (kwargs.get("trust_remote_code") and is_packed(pretrained_model_name_or_path, kwargs)):
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        kwargs["trust_remote_code"] = False
        _check_known(cls, pretrained_model_name_or_path, kwargs)
        found = original(cls, pretrained_model_name_or_path, *args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        for key in _KEYS:
            if hasattr(config, key):
                delattr(config, key)
        return found

    return from_pretrained


def _check_known(cls: Any, name: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a model that its own code alone can build.

    Raises:
        CheckpointError: it is one.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    read, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
    model_type = read.get("model_type")
    if model_type not in CONFIG_MAPPING:
        expected = "a model_type of transformers, as no code of a packed model is run"
        raise CheckpointError(Path(str(name), "config.json"), expected, repr(model_type))
