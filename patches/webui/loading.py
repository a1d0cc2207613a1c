"""What webui's functions around a model do where the loader is Ropewalk, and leave to webui where it is not."""

from __future__ import annotations

import functools
import importlib
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ropewalk.errors import MissingFileError, RopewalkError, UsageError
from ropewalk.patches.webui.options import LORAS, NAME
from ropewalk.templates import by_name

# What is called with (bytes read, bytes in all) while a model loads; without one, a terminal shows a bar.
_progress: ContextVar[Callable[[int, int], None] | None] = ContextVar("progress", default=None)

# Models of ours, by which LoRA is told whose a model is: `args.loader` is only what the page shows.
_loaded: Any = weakref.WeakSet()


def _webui(name: str) -> Any:
    return importlib.import_module(f"modules.{name}")


@contextmanager
def progress_to(call: Callable[[int, int], None]) -> Iterator[None]:
    """Have models that are loaded in this context tell how far they are."""
    token = _progress.set(call)
    try:
        yield
    finally:
        _progress.reset(token)


def load_model(original: Any) -> Any:
    """Wrap models.load_model(model_name, loader=None), which returns (model, tokenizer)."""

    @functools.wraps(original)
    def load_model(model_name: str, loader: str | None = None) -> tuple[Any, Any]:
        shared, settings = _webui("shared"), _webui("models_settings")
        if (loader or shared.args.loader or settings.get_model_metadata(model_name)["loader"]) != NAME:
            return original(model_name, loader)
        try:
            return _load(model_name)
        except (RopewalkError, OSError, MemoryError) as error:
            shared.model_name = "None"
            _webui("logging_colors").logger.error(f'Failed to load "{model_name}": {error}')
            if shared.generation_lock is None:
                return None, None  # webui is starting: its page is of more use than a traceback
            raise error.with_traceback(None) from None  # whose frames hold what had been read

    return load_model


def _load(model_name: str) -> tuple[Any, Any]:
    """Do what webui's own load_model does, with the loading ours.

    Raises:
        RopewalkError: as `ropewalk.load`.
    """
    import torch

    from ropewalk.loader.load import load
    from ropewalk.loader.rope import context_length

    shared, settings = _webui("shared"), _webui("models_settings")
    logger, began = _webui("logging_colors").logger, time.time()
    logger.info(f'Loading "{model_name}"')
    shared.is_seq2seq = shared.is_multimodal = False
    shared.model_name, shared.args.loader = model_name, NAME
    metadata = settings.get_model_metadata(model_name)
    _webui("sampler_hijack").hijack_samplers()
    if shared.args.ctx_size < 0:
        raise UsageError(f"ctx-size: expected 0 or more, found {shared.args.ctx_size}")
    adapters = _adapters(getattr(shared.args, LORAS, None) or [])
    source = _webui("utils").resolve_model_path(model_name)
    if not Path(source).exists():
        raise MissingFileError(source, "a folder with a model", "nothing of this name")
    model, tokenizer = load(source, progress=_progress.get() or True, **_options(shared.args))
    if tokenizer is None:
        raise MissingFileError(source, "a tokenizer (tokenizer.json or tokenizer.model)", "none")
    _loaded.add(model)
    if not torch.cuda.is_available():
        shared.args.cpu = True  # as webui's own loader does; or LoRA and others would look for a GPU
    longest = _context(Path(source), shared.args.rope) or context_length(model.config)
    if adapters:
        model, shared.lora_names = _put_on(model, adapters), list(adapters)
    shared.settings.update({key: value for key, value in metadata.items() if key in shared.settings})
    shared.settings["truncation_length"] = shared.args.ctx_size or longest
    if shared.settings["truncation_length"] > longest:
        logger.warning(f"ctx-size {shared.args.ctx_size}: the model was made for {longest} tokens")
    logger.info(f'Loaded "{model_name}" in {time.time() - began:.2f} seconds.')
    logger.info(f'LOADER: "{NAME}": {describe(model, shared.settings["truncation_length"])}')
    return model, tokenizer


def describe(model: Any, length: int) -> str:
    """Return one line on the rotary embedding and the context of a model."""
    parameters = getattr(model.config, "rope_parameters", None) or {"rope_type": "none"}
    numbers = {key: value for key, value in parameters.items() if isinstance(value, (int, float))}
    shown = ", ".join(f"{key} {value:g}" for key, value in numbers.items())
    return f"rope {parameters.get('rope_type', 'per layer')}{f' ({shown})' if shown else ''}, context {length}"


def _options(args: Any) -> dict[str, Any]:
    """Return what `ropewalk.load` is to be called with for webui's arguments.

    Raises:
        UsageError: sizes or devices that are none, or contradict each other.
    """
    import torch

    chosen: dict[str, Any] = {"rope": args.rope or "auto", "cpu_mode": args.cpu_mode or None}
    sizes = _max_memory(args)
    given = str(args.device_map or "").strip()
    if args.cpu and given not in ("", "cpu"):
        raise UsageError(f"device_map: expected cpu or nothing, since cpu is chosen, found {given!r}")
    if args.cpu_layers and (given or sizes):
        raise UsageError("cpu_layers: expected neither device_map nor memory sizes besides, found some")
    if args.cpu:
        chosen["device_map"] = "cpu"
    elif given.startswith("{"):
        try:
            chosen["device_map"] = json.loads(given)
        except ValueError as error:
            raise UsageError(f"device_map: expected a JSON object from modules to devices, {error}") from None
    elif given:
        chosen["device_map"] = given
    elif args.cpu_layers and torch.cuda.is_available():
        chosen["device_map"] = f"cpu-layers:{args.cpu_layers}"
    elif sizes:
        chosen["device_map"] = "auto"
    if sizes and not args.cpu:
        chosen["max_memory"] = sizes
    if args.bf16:
        chosen["dtype"] = "bfloat16"
    if args.load_in_4bit:
        chosen["load_in_4bit"] = True
    if args.attn_implementation:
        chosen["attn_implementation"] = args.attn_implementation
    return chosen


def _max_memory(args: Any) -> dict[int | str, str]:
    """Return what accelerate takes for "20,7" GiB of GPUs and so many of the CPU."""
    sizes: dict[int | str, str] = {}
    parts = [part.strip() for part in str(args.gpu_split or "").split(",") if part.strip()]
    given: list[tuple[int | str, str]] = [*enumerate(parts)]
    if args.cpu_memory:
        given.append(("cpu", str(args.cpu_memory)))
    for name, part in given:
        try:
            size = float(part)
        except ValueError:
            size = -1.0
        if not 0 <= size < 1e6:
            raise UsageError(f"gpu-split: expected sizes in GiB such as 20,7, found {part!r}")
        sizes[name] = f"{size:g}GiB"
    return sizes


def infer_loader(original: Any) -> Any:
    """Wrap models_settings.infer_loader, which names the loader for a folder."""
    from ropewalk.loader.packed_name import is_packed

    @functools.wraps(original)
    def infer_loader(model_name: str, model_settings: Any, hf_quant_method: Any = None) -> Any:
        loader = original(model_name, model_settings, hf_quant_method=hf_quant_method)
        folder = _webui("utils").resolve_model_path(model_name)
        return NAME if loader == "Transformers" and folder.is_dir() and is_packed(folder, {}) else loader

    return infer_loader


def get_model_metadata(original: Any) -> Any:
    """Wrap models_settings.get_model_metadata, whose settings the page shows and loading goes by."""

    @functools.wraps(original)
    def get_model_metadata(model: str) -> dict[str, Any]:
        found: dict[str, Any] = original(model)
        if found.get("loader") == NAME:
            folder = Path(_webui("utils").resolve_model_path(model))
            longest = _context(folder, str(found.get("rope") or _webui("shared").args.rope))
            if longest is not None:
                if found["ctx_size"] == min(found["truncation_length_info"], 8192):
                    found["ctx_size"] = 0  # webui's own guess; for us 0 is all that the model has
                found["truncation_length"] = found["truncation_length_info"] = longest
            _choose_template(model, found)
        return found

    return get_model_metadata


def _choose_template(model: str, found: dict[str, Any]) -> None:
    """Have a model's name say how it is talked to, where neither the model nor the user does: webui takes Alpaca."""
    shared, name = _webui("shared"), Path(model).name
    chosen = by_name(name)
    file = shared.user_data_dir / "instruction-templates" / f"{NAME}-{chosen}.yaml"
    if found.get("instruction_template") != "Alpaca" or chosen is None or not file.is_file():
        return
    for pattern, settings in shared.user_config.items():
        if re.match(pattern.lower(), name.lower()) and "instruction_template" in settings:
            return
    found["instruction_template"] = file.stem
    found["instruction_template_str"] = _webui("models_settings").load_instruction_template(file.stem)


def _context(folder: Path, rope: str) -> int | None:
    """Return the context that a model has with its rotary embedding; None where that cannot be told, which loading
    it will say.
    """
    from ropewalk.loader.quantize_config import read_json
    from ropewalk.loader.rope import context_length, decide_rope

    try:
        config: Mapping[str, Any] = read_json((folder if folder.is_dir() else folder.parent) / "config.json")
        decision = decide_rope(config, rope or "auto")
        original = config.get("original_max_position_embeddings")
        if decision.type == "default" and isinstance(original, int):
            return original  # its scaling was taken away
        return context_length(SimpleNamespace(**{**config, "rope_parameters": decision.parameters}))
    except (RopewalkError, OSError, TypeError, KeyError, AttributeError):
        return None


def is_ours(model: Any) -> bool:
    """Tell whether a model, with adapters or without, was loaded here."""
    return _base(model) in _loaded


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's models have that


def add_lora_transformers(original: Any) -> Any:
    """Wrap LoRA.add_lora_transformers(lora_names), which puts exactly these on `shared.model`."""

    @functools.wraps(original)
    def add_lora_transformers(lora_names: list[str]) -> None:
        shared = _webui("shared")
        starting = shared.generation_lock is None
        if shared.model is None and starting and shared.args.loader == NAME:
            return  # its model could not be loaded, which has been said
        if shared.model is None or not is_ours(shared.model):
            original(lora_names)
            return
        try:
            _change_adapters(shared, lora_names)
        except (RopewalkError, OSError) as error:
            if not starting:
                raise
            _webui("logging_colors").logger.error(f"Failed to apply the LoRAs: {error}")

    return add_lora_transformers


def _change_adapters(shared: Any, names: list[str]) -> None:
    """Put exactly these adapters on `shared.model`; where that fails, it is left without any."""
    adapters = _adapters(names)
    if list(adapters) == shared.lora_names:
        return
    if shared.model is not _base(shared.model):
        shared.model = shared.model.unload()
        vars(shared.model).pop("peft_config", None)  # which PEFT before 0.19 leaves behind
    shared.lora_names = []
    if adapters:
        logger = _webui("logging_colors").logger
        logger.info(f"Applying the following LoRAs to {shared.model_name}: {', '.join(adapters)}")
        shared.model, shared.lora_names = _put_on(shared.model, adapters), list(adapters)


def _adapters(names: list[str]) -> dict[str, Path]:
    """Return the folder of each LoRA that is chosen in webui's list.

    Raises:
        MissingFileError: no such folder.
    """
    lora = _webui("LoRA")
    found = {name: Path(lora.get_lora_path(name)) for name in names if name != "None"}
    for folder in found.values():
        if not folder.is_dir():
            raise MissingFileError(folder, "a folder with a PEFT adapter", "nothing of this name")
    return found


def _put_on(model: Any, adapters: Mapping[str, Path]) -> Any:
    """Return a model with adapters on it; several add up."""
    from ropewalk.loader.lora import load_lora

    loaded = load_lora(model, list(adapters.values()))
    if len(adapters) > 1:
        loaded.base_model.set_adapter(list(loaded.peft_config))
    return loaded
