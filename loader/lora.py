"""PEFT adapters on a model: checked before the model is touched, and taken back where PEFT does not take them.

PEFT itself loads an adapter whose tensors have other names, or that lacks some, and says so in a warning or not at
all; the model then talks as if there were none. Here that is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.errors import (
    AdapterError,
    MissingFileError,
    MissingPackageError,
    MissingTensorsError,
    RopewalkError,
    UsageError,
)
from ropewalk.loader import peft_hook
from ropewalk.loader.safetensors_file import read_header

Lora = str | Path | Sequence[str | Path] | Mapping[str, str | Path]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Before it, a pickle could get around weights_only (CVE-2026-24747, and before 2.6 CVE-2025-32434).
SAFE_PICKLES = (2, 10)

_SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((\[.*?\])\)"
)


def load_lora(model: Any, lora: Lora) -> Any:
    """Return a model with adapters on top, as PEFT's PeftModel; the first adapter is active.

    Args:
        model: of transformers, packed or not, without adapters. It is changed in place; where this raises, it is as
            it was.
        lora: a folder with a PEFT adapter, several folders, or names and folders. A folder without a name goes by
            that of the folder, made one that PEFT takes and different from the others.

    Raises:
        MissingPackageError: PEFT is not installed.
        MissingFileError: no adapter in a folder, or one without weights.
        MissingTensorsError: tensors that the adapter needs and its file lacks, or the reverse.
        AdapterError: an adapter that does not fit the model.
        CheckpointError: a damaged file.
        UsageError: no folder, a name that cannot be one, or a model that has adapters.
    """
    try:
        peft_hook.require()
    except ImportError as error:
        raise MissingPackageError(
            f"--lora: expected the package peft (pip install 'ropewalk[peft]'), {error}"
        ) from error
    from peft import PeftModel

    if isinstance(model, PeftModel):
        raise UsageError("lora: expected a model without adapters, found one with some; model.load_adapter adds to it")
    folders = name_adapters(lora, model)
    checked = {name: _read(folder, model) for name, folder in folders.items()}
    loaded: Any = None
    with _restored_on_failure(model), _placed_as_it_is(model):
        for name, (config, weights) in checked.items():
            loaded = _put_on(model if loaded is None else loaded, name, folders[name], config, weights)
    return loaded


def name_adapters(lora: Lora, model: Any) -> dict[str, Path]:
    """Return the folder of each adapter by its name.

    Raises:
        UsageError: no folder, or a name that PEFT could not tell from its own.
    """
    taken = _taken_names(model)
    if isinstance(lora, Mapping):
        for name in lora:
            if not re.fullmatch(r"[\w-]+", name) or _is_taken(name, taken):
                raise UsageError(f"lora: expected a name of letters, digits, _ and -, none of PEFT's, found {name!r}")
        named = {name: Path(folder).expanduser() for name, folder in lora.items()}
    else:
        folders = [lora] if isinstance(lora, (str, Path)) else lora
        named = {}
        for folder in (Path(f).expanduser() for f in folders):
            stem = re.sub(r"[^\w-]", "-", folder.resolve().name, flags=re.ASCII) or "adapter"
            stem = f"adapter-{stem}" if _is_taken(stem, taken) else stem
            name, count = stem, 1
            while name in named:
                count += 1
                name = f"{stem}-{count}"
            named[name] = folder
    if not named:
        raise UsageError("lora: expected a folder with an adapter, found none")
    return named


def _taken_names(model: Any) -> set[str]:
    """Return what an adapter cannot be called: it becomes a part of the names of its tensors, and a key of
    torch's ModuleDict, which has its own attributes.
    """
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    return parts | {"base_model", "base_layer", "weight", "bias", "__base__"} | set(dir(nn.ModuleDict()))


def _is_taken(name: str, taken: set[str]) -> bool:
    # PEFT looks for "lora_" in the names of tensors, and for the adapter's name in what it finds.
    return name in taken or name in "lora_" or hasattr(nn.ParameterDict, name)


def _read(folder: Path, model: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return (PEFT's config, tensors) of an adapter, checked as far as can be without putting it on the model."""
    from peft import LoraConfig, PeftConfig

    file = folder / CONFIG
    if not file.is_file():
        raise MissingFileError(folder, f"a PEFT adapter ({CONFIG})", "none")
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["peft_type"]
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(file, "the config of a PEFT adapter", f"{type(error).__name__}: {_line(error)}") from error
    weights = _read_weights(folder)
    if not isinstance(config, LoraConfig):
        return config, weights
    if peft_hook.has_packed_layers(model):
        _check_needs_no_weights(file, config)
    stray = sorted(n for n, tensor in weights.items() if not (_belongs(n, config) or _is_of_base(n, tensor, model)))
    if stray:
        # PEFT would write a tensor of that name into the base model, if that has one.
        raise MissingTensorsError(_weights_file(folder), f"only tensors of a {kind} adapter", _and_more(stray))
    return config, weights


def _check_needs_no_weights(file: Path, config: Any) -> None:
    """Refuse a LoRA that reads or changes the weights of its base, which packed layers do not have."""
    if config.bias != "none":
        raise AdapterError(file, "an adapter without biases (bias 'none'), as the base is packed", repr(config.bias))
    if config.use_dora:
        raise AdapterError(file, "an adapter without DoRA, as the base is packed", "use_dora true")
    start = str(config.init_lora_weights)
    if start.startswith(("pissa", "olora", "corda", "lora_ga")):
        expected = "an adapter that adds to the weights as they are, as the base is packed"
        raise AdapterError(file, expected, f"one that changes them first (init_lora_weights {start!r})")


def _belongs(name: str, config: Any) -> bool:
    """Return whether a tensor is one that a LoRA of that config has."""
    whole = (*(config.modules_to_save or ()), "trainable_tokens_delta", "token_adapter")
    return (
        "lora_" in name
        or any(f".{part}." in f".{name}." for part in whole)
        or (config.bias != "none" and name.endswith(".bias"))
    )


def _is_of_base(name: str, tensor: Tensor, model: Any) -> bool:
    """Return whether a tensor is one that the base has with the same numbers, as PEFT saves embeddings, too."""
    owner, _, attribute = name.removeprefix("base_model.model.").replace(".base_layer.", ".").rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), attribute)
    except AttributeError:
        return False
    return isinstance(found, Tensor) and torch.equal(tensor.to(found), found)


def _weights_file(folder: Path) -> Path:
    return folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / PICKLE


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = _weights_file(folder)
    if not file.is_file():
        raise MissingFileError(folder, f"the weights of the adapter ({WEIGHTS})", "none")
    if file.name == WEIGHTS:
        from safetensors.torch import load_file

        read_header(file)  # one typed error for each way in which a file can be damaged
        return load_file(file)
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < SAFE_PICKLES:
        expected = f"{WEIGHTS}, or torch {'.'.join(map(str, SAFE_PICKLES))}: with older ones a pickle may run code"
        raise AdapterError(file, expected, f"a pickle and torch {torch.__version__}")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a pickle can raise
        raise AdapterError(file, "a pickle of tensors and of nothing else", _line(error)) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise AdapterError(file, "tensors by their names", type(weights).__name__)
    return weights


def _put_on(model: Any, name: str, folder: Path, config: Any, weights: dict[str, Tensor]) -> Any:
    """Load an adapter onto a model, or beside the adapters that it has; return the PeftModel."""
    from peft import PeftModel, set_peft_model_state_dict

    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
        if config.is_prompt_learning and getattr(model, "word_embeddings", None) is None:
            # PEFT looks for it among the parameters, which one that keeps its 16 bits is not.
            model.word_embeddings = model.get_base_model().get_input_embeddings()
        # Once more, since PEFT keeps to itself what it found then.
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RopewalkError:
        raise
    except KeyError as error:
        raise MissingTensorsError(_weights_file(folder), f"tensor {error.args[0]}", "none of that name") from error
    except Exception as error:  # whatever PEFT raises
        raise _refusal(folder, name, config, error) from error
    mine = re.compile(rf"\.{getattr(model.base_model, 'prefix', '')}\w*\.{re.escape(name)}(\.|$)")
    missing = sorted(key for key in result.missing_keys if mine.search(key))
    if missing:
        raise MissingTensorsError(_weights_file(folder), f"tensor {_in_file(missing[0], name)}", _none_of(missing))
    if result.unexpected_keys and not config.is_prompt_learning:  # PEFT loads those tensors beside the state dict
        found = _and_more(sorted(_in_file(key, name) for key in result.unexpected_keys))
        raise MissingTensorsError(_weights_file(folder), f"only tensors for layers of {_class_of(model)}", found)
    return model


def _refusal(folder: Path, name: str, config: Any, error: Exception) -> AdapterError:
    mismatch = _SIZE_MISMATCH.search(str(error))
    if mismatch:
        key, found, expected = mismatch.groups()
        expected = f"shape {expected} of {_in_file(key, name)}, as {CONFIG} and the base model have it"
        return AdapterError(_weights_file(folder), expected, found)
    kind = getattr(config.peft_type, "value", config.peft_type)
    return AdapterError(folder / CONFIG, "an adapter that goes on this model", f"one of type {kind}: {_line(error)}")


@contextmanager
def _restored_on_failure(model: Any) -> Iterator[None]:
    """Give a model back the modules and parameters it had, if what is done with it fails half-way."""
    modules = [(m, dict(m._modules), dict(m._parameters), m.training) for m in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    try:
        yield
    except BaseException:
        for module, children, parameters, training in modules:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        for attribute in set(vars(model)) - attributes:
            delattr(model, attribute)
        raise


@contextmanager
def _placed_as_it_is(model: Any) -> Iterator[None]:
    """Keep PEFT from spreading a model over devices anew, which it does where some of it is on the CPU: packed
    layers compute there. Where weights are on the meta device, since they are copied to a GPU for each call, it has to.
    """
    tensors = [*model.parameters(), *model.buffers()]
    placed = vars(model).get("hf_device_map")
    if placed is None or any(tensor.is_meta for tensor in tensors):
        yield
        return
    del model.hf_device_map
    try:
        yield
    finally:
        model.hf_device_map = placed


def _in_file(key: str, name: str) -> str:
    """Return the name in the adapter's file of a tensor of the model."""
    return re.sub(rf"\.{re.escape(name)}(?=\.[^.]+$|$)", "", key)


def _class_of(model: Any) -> str:
    return type(model.get_base_model()).__name__


def _and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _none_of(names: list[str]) -> str:
    return "none of that name" + (f" ({len(names)} missing)" if len(names) > 1 else "")


def _line(error: Exception) -> str:
    """Return what an error says, as one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
