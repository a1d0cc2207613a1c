"""FastChat: its own command line and workers load GPTQ checkpoints with ropewalk and talk to them in their format.

What is changed, all of it undone by `revert`: `load_model` and `get_model_adapter` of fastchat.model.model_adapter, for
the models that are ours (see `_is_ours`) and for --gptq-ckpt, which asked for a GPTQ-for-LLaMa on the disk;
`get_context_length` of fastchat.utils, which fails for every Llama of transformers 5; `generate_stream`, which fails
where no more room is left for a prompt; the conversation templates of `ropewalk.templates` that FastChat lacks, added
under their names; and `json` of what its API streams, which fails with pydantic 2. Modules that have imported one of
these functions by name get the other one, too.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
from typing import Any

from ropewalk.errors import MissingFileError, MissingPackageError, UsageError
from ropewalk.patches.replace import Replacements, expect_arguments, installed
from ropewalk.templates import TEMPLATES, Template, by_name

log = logging.getLogger("ropewalk")

_LOAD_MODEL = ("model_path", "device", "num_gpus", "max_gpu_memory", "dtype", "load_8bit", "cpu_offloading")
# Those of our templates that FastChat's own rules, which go by names as well, do not find.
_ITS_RULES_MISS = ("airoboros", "airoboros-2.1", "orca-8k")

_replaced = Replacements()
_functions: list[tuple[Any, Any]] = []  # (FastChat's, ours)
_templates: dict[str, Any] = {}
_options: dict[str, Any] = {}


def load_with(**options: Any) -> None:
    """Have models loaded with options of `ropewalk.load` that FastChat has no flags for: `rope`, `lora`, `cpu_mode`,
    `cache_packed`.
    """
    _options.clear()
    _options.update(options)


def apply() -> str:
    """Patch FastChat; return one line that says what was done. Doing it twice changes nothing.

    Raises:
        MissingPackageError: it is not installed.
        PatchError: functions with other arguments than are known here; nothing is changed then.
    """
    try:
        from fastchat import conversation, utils
        from fastchat.model import model_adapter
        from fastchat.serve import inference
    except ImportError as error:
        raise MissingPackageError(f"fastchat: expected pip install 'ropewalk[fastchat]', found: {error}") from error

    if not _functions:
        expect_arguments("fschat", "load_model", model_adapter.load_model, _LOAD_MODEL)
        expect_arguments("fschat", "get_model_adapter", model_adapter.get_model_adapter, ["model_path"])
        expect_arguments("fschat", "get_context_length", utils.get_context_length, ["config"])
        first = ["model", "tokenizer", "params", "device", "context_len"]
        expect_arguments("fschat", "generate_stream", inference.generate_stream, first)
        adapter = _make_adapter(model_adapter)
        _replace(model_adapter, "load_model", _load_model(model_adapter, adapter))
        _replace(model_adapter, "get_model_adapter", _get_model_adapter(model_adapter, adapter))
        _replace(utils, "get_context_length", _get_context_length(utils.get_context_length))
        _replace(inference, "generate_stream", _generate_stream(inference.generate_stream))
        _rebind(_functions)
        mend_streaming()
        for name, template in TEMPLATES.items():
            if name not in conversation.conv_templates:
                _templates[name] = _conversation(conversation, name, template)
                conversation.register_conv_template(_templates[name])
    return (
        f"fschat {installed('fschat')}: GPTQ checkpoints load with ropewalk; "
        f"conversation templates {', '.join(_templates)} added"
    )


def mend_streaming() -> None:
    """Have the API of FastChat 0.2.36 stream under pydantic 2. Unlike `apply`, it imports neither torch nor a model.

    It calls `json(ensure_ascii=False)` there, which only pydantic 1 knows; its sources have changed since.
    """
    from fastchat.protocol import openai_api_protocol as protocol

    for reply in (protocol.ChatCompletionStreamResponse, protocol.CompletionStreamResponse):
        if hasattr(reply, "model_dump_json") and "json" not in vars(reply):
            _replaced.put(reply, "json", _json)


def _json(self: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
    return str(self.model_dump_json(**kwargs))


def _replace(module: Any, name: str, ours: Any) -> None:
    _functions.append((getattr(module, name), ours))
    _replaced.put(module, name, ours)


def _rebind(functions: list[tuple[Any, Any]]) -> None:
    """Give modules of FastChat that have one of the functions under any name the other one of its pair."""
    for name, module in list(sys.modules.items()):
        if module is None or not (name == "__main__" or name.partition(".")[0] == "fastchat"):
            continue
        for attribute, value in list(vars(module).items()):
            for before, after in functions:
                if value is before:
                    setattr(module, attribute, after)


def _is_ours(model_path: str) -> bool:
    """Tell whether ropewalk loads a model: one that GPTQ packed, or one whose config fails to name its rope.

    A name of the Hub counts where it says so: by GPTQ in it, or by a branch behind a colon.
    """
    if not os.path.exists(os.path.expanduser(model_path)):
        return bool(re.search(r"gptq|^[\w.-]+/[\w.-]+:", model_path, re.IGNORECASE))
    if os.path.isfile(os.path.join(model_path, "adapter_config.json")):
        return False  # FastChat loads its base, and PEFT puts the adapter on that
    return _is_ours_here(model_path)


@functools.cache
def _is_ours_here(model_path: str) -> bool:
    from ropewalk.loader.packed_name import is_packed
    from ropewalk.loader.quantize_config import read_json
    from ropewalk.loader.rope import decide_rope
    from ropewalk.loader.source import find_source

    folder = find_source(model_path).folder
    if os.path.isfile(model_path) or is_packed(folder, {}):
        return True
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("rope_parameters") or config.get("rope_scaling"):
        return False
    return config.get("model_type") == "llama" and decide_rope(config).type != "default"


def _conversation(conversation: Any, name: str, template: Template) -> Any:
    """Return a template as FastChat has them; its other processes rebuild it from its fields, so it is no subclass."""
    styles = conversation.SeparatorStyle
    between = template.turn.partition("{user}")[2].removesuffix(template.assistant)
    opening, roles, style = template.opening, (template.user, template.assistant), styles.NO_COLON_TWO
    if template.user.endswith(": ") and template.assistant.endswith(":"):
        style, roles = styles.ADD_COLON_TWO, (template.user[:-2], template.assistant[:-1])
    elif all(role.endswith("\n") for role in roles) and opening.endswith(between) and between == template.end:
        style, roles = styles.ADD_NEW_LINE_SINGLE, (template.user[:-1], template.assistant[:-1])
    if style != styles.NO_COLON_TWO:
        opening = opening.removesuffix(between)  # that style puts it there
    return conversation.Conversation(
        name=name,
        system_template=opening.replace("{system}", "{system_message}"),
        system_message=template.system,
        roles=roles,
        sep_style=style,
        sep=between,
        sep2=template.end,
        stop_str=list(template.stop) if len(template.stop) > 1 else "".join(template.stop) or None,
    )


def _make_adapter(model_adapter: Any) -> Any:
    """Return the adapter, in FastChat's sense, of the models that are ours."""
    others = model_adapter.get_model_adapter

    class RopewalkAdapter(model_adapter.BaseModelAdapter):
        """Loads with `ropewalk.load`."""

        device = "cuda"  # of the call of load_model that is under way

        def match(self, model_path: str) -> bool:
            return _is_ours(model_path)

        def load_model(self, model_path: str, from_pretrained_kwargs: dict[str, Any]) -> tuple[Any, Any]:
            from ropewalk.loader.load import load

            given = {"device_map": self.device, **from_pretrained_kwargs}
            return load(model_path, **_load_options(given), **_options)

        def get_default_conv_template(self, model_path: str) -> Any:
            from fastchat.conversation import get_conv_template

            template = by_name(model_path)
            if template not in _ITS_RULES_MISS:
                return others(model_path).get_default_conv_template(model_path)
            return get_conv_template(template)

    return RopewalkAdapter()


def _get_model_adapter(model_adapter: Any, adapter: Any) -> Any:
    others = model_adapter.get_model_adapter

    @functools.wraps(others)
    def get_model_adapter(model_path: str) -> Any:
        return adapter if adapter.match(model_path) else others(model_path)

    return get_model_adapter


def _load_model(model_adapter: Any, adapter: Any) -> Any:
    original = model_adapter.load_model
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_model(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        path, gptq_config = given["model_path"], given["gptq_config"]
        by_flags = gptq_config is not None and gptq_config.wbits < 16
        adapter.device = given["device"]
        if not by_flags and not adapter.match(path):
            return original(*args, **kwargs)
        for flag in ("load_8bit", "cpu_offloading"):
            if given[flag]:
                text = "--%s: nothing to do, since ropewalk loads %s as its files have it"
                log.warning(text, flag.replace("_", "-"), os.path.basename(path))
        places = _places(model_adapter, given["device"], given["num_gpus"], given["max_gpu_memory"])
        options = {**places, "torch_dtype": given["dtype"], "revision": given.get("revision")}
        load = functools.partial(_load_gptq, gptq_config) if by_flags else adapter.load_model
        model, tokenizer = load(path, options)
        if tokenizer is None:
            raise MissingFileError(path, "a tokenizer (tokenizer.json or tokenizer.model)", "none")
        if given.get("debug"):
            print(model)
        return model, tokenizer

    return load_model


def _places(model_adapter: Any, device: str, num_gpus: int, max_gpu_memory: str | None) -> dict[str, Any]:
    """Return device_map and max_memory for --device, --num-gpus and --max-gpu-memory, as FastChat means them.

    Raises:
        UsageError: a device that is not here, or that has no kernels of ours.
    """
    import torch

    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu or cuda for a model that ropewalk loads, found {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: expected cpu, since torch finds no CUDA GPU here, found cuda")
    if device == "cpu" or num_gpus == 1:
        return {"device_map": device}
    memory = [max_gpu_memory] * num_gpus
    if max_gpu_memory is None:
        memory = [f"{int(free * 0.85)}GiB" for free in model_adapter.get_gpu_memory(num_gpus)]
    return {"device_map": "sequential", "max_memory": dict(enumerate(memory))}


def _load_gptq(gptq_config: Any, model_path: str, given: dict[str, Any]) -> tuple[Any, Any]:
    """Load as --gptq-ckpt, --gptq-wbits and --gptq-groupsize say; act-order is in the file, whatever the flag."""
    from fastchat.modules.gptq import find_gptq_ckpt

    from ropewalk.patches.gptq_for_llama import load_file

    packing = {"bits": gptq_config.wbits, "group_size": gptq_config.groupsize}
    return load_file(model_path, find_gptq_ckpt(gptq_config), **packing, **_load_options(given), **_options)


def _load_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return what `ropewalk.load` takes for what FastChat gives its adapters."""
    options: dict[str, Any] = {key: given[key] for key in ("device_map", "max_memory") if key in given}
    options["dtype"] = given.get("torch_dtype", given.get("dtype"))
    if given.get("revision") not in (None, "main"):  # the latter is the default of --revision
        options["revision"] = given["revision"]
    return options


def _get_context_length(original: Any) -> Any:
    @functools.wraps(original)
    def get_context_length(config: Any) -> int:
        from ropewalk.loader.rope import context_length

        known = any(getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        return context_length(config) if known else original(config)

    return get_context_length


def _generate_stream(original: Any) -> Any:
    """Leave a prompt some room: FastChat cuts it to what max_new_tokens leaves of the context, be that nothing."""

    @functools.wraps(original)
    def generate_stream(
        model: Any, tokenizer: Any, params: dict[str, Any], device: str, context_len: int, *args: Any, **kwargs: Any
    ) -> Any:
        asked = int(params.get("max_new_tokens", 256))
        if asked >= context_len - 1 and not model.config.is_encoder_decoder:
            text = "--max-new-tokens: expected less than the context of %d, found %d; %d are generated"
            log.warning(text, context_len, asked, context_len // 2)
            params = {**params, "max_new_tokens": context_len // 2}
        return original(model, tokenizer, params, device, context_len, *args, **kwargs)

    return generate_stream


def revert() -> str:
    """Give FastChat its own functions and templates back; models that are loaded stay as they are."""
    _replaced.restore()
    if _functions:
        from fastchat import conversation

        for name, ours in _templates.items():
            if conversation.conv_templates.get(name) is ours:
                del conversation.conv_templates[name]
        _rebind([(ours, before) for before, ours in _functions])
    _is_ours_here.cache_clear()
    for kept in (_templates, _functions, _options):
        kept.clear()
    return "fschat: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}."""
    return {
        "package": "fschat",
        "version": installed("fschat"),
        "tested": "0.2.36",
        "applied": bool(_functions),
    }
