"""GPTQ-for-LLaMa: scripts of 2023 that import from it run with ropewalk, and it need not be there.

Its repository was no package: scripts put its folder on sys.path and imported `llama`, `llama_inference` and so on.
Here these are modules in `sys.modules`, those of them that cannot be imported otherwise:

    llama, llama_inference, llama_inference_dmapauto, llama_inference_offload    load_quant
    quant         make_quant, make_quant_linear, QuantLinear
    modelutils    find_layers, DEV

`python -m ropewalk.patches.gptq_for_llama SCRIPT …` runs a script as it is.

`load_quant` had many signatures (branches old-cuda, cuda, triton, fastest-inference-4bit, t5, and those of
text-generation-webui and its fork); they begin alike, and what follows is told apart by its name or kind.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ropewalk.errors import UsageError

# What may follow the group size by position: one of these rows, told by the kinds of its first values.
_FUSED = ("fused_mlp", "eval", "warmup_autotune", "act_order")
_FASTER = ("faster_kernel", "exclude_layers", "kernel_switch_threshold")
_OPTIONS = (*_FUSED, *_FASTER, "device", "device_map", "pre_layer")

_put: dict[str, ModuleType] = {}


def load_quant(
    model: str | Path, checkpoint: str | Path, wbits: int, groupsize: int = -1, *more: Any, **options: Any
) -> Any:
    """Load a checkpoint as GPTQ-for-LLaMa's functions of this name do, by `ropewalk.load`.

    Args:
        model: the folder (or the name on the Hub) with config.json and the tokenizer.
        checkpoint: the file with the weights, or the folder that it is in.
        wbits: 2, 3, 4 or 8.
        groupsize: rows that share a scale, -1 for all of them.
        more, options: `fused_mlp`, `warmup_autotune`, `act_order`, `faster_kernel`, `exclude_layers` and
            `kernel_switch_threshold` mean nothing here: the file says which layers are packed and in which order, and
            there is one kernel for all. `eval=False` leaves the model in training mode. `device` is a GPU's number or
            -1 for the CPU, `device_map` accelerate's, `pre_layer` how many layers go onto the first GPU while the
            others compute on the CPU; by default all is where `ropewalk.load` puts it, so that `model.to(DEV)` has
            nothing left to do.

    Returns:
        The model of transformers, in eval mode, with `seqlen`; float16 on a GPU, float32 on the CPU.

    Raises:
        UsageError: an argument that none of them has; what else `ropewalk.load` raises.
    """
    given = {**_by_name(more), **options}
    unknown = sorted(set(given) - set(_OPTIONS))
    if unknown:
        raise UsageError(f"load_quant: expected one of {', '.join(_OPTIONS)}, found {unknown[0]}")
    loaded, _ = load_file(model, checkpoint, bits=wbits, group_size=groupsize, device_map=_places(model, given))
    return loaded if given.get("eval", True) else loaded.train()


def _by_name(more: tuple[Any, ...]) -> dict[str, Any]:
    """Return the positional arguments after the group size by their names."""
    names: tuple[str, ...] = _FUSED
    if more and (isinstance(more[0], (str, Mapping)) or more[0] is None):
        names = ("device_map",)
    elif more and type(more[0]) is int:  # a bool is none of these
        names = ("device",)
    elif len(more) > 1 and isinstance(more[1], (list, tuple)):
        names = _FASTER
    if len(more) > len(names):
        raise UsageError(f"load_quant: expected {', '.join(names)} after groupsize, found {len(more)} values")
    return dict(zip(names, more, strict=False))


def _load_quant_offload(
    model: str | Path, checkpoint: str | Path, wbits: int, groupsize: int, pre_layer: int, *more: Any, **options: Any
) -> Any:
    """Load as `llama_inference_offload.load_quant`, whose fifth argument is the number of layers on the GPU."""
    return load_quant(model, checkpoint, wbits, groupsize, pre_layer=pre_layer, **_by_name(more), **options)


def load_file(model: str | Path, checkpoint: str | Path, **options: Any) -> tuple[Any, Any]:
    """Load (model, tokenizer) by config.json of one place and weights of another.

    Args:
        model: as `load_quant`.
        checkpoint: the same.
        options: of `ropewalk.load`.

    Raises:
        what `ropewalk.load` raises.
    """
    from ropewalk.loader.load import load
    from ropewalk.loader.rope import context_length
    from ropewalk.loader.weight_files import find_weights

    weights = Path(checkpoint).expanduser()
    if weights.is_dir():
        weights = find_weights(weights).files[0]
    loaded, tokenizer = load(model, weights=weights, **options)
    loaded.seqlen = min(2048, context_length(loaded.config))  # the length that its scripts evaluate with
    return loaded, tokenizer


def _places(model: str | Path, given: Mapping[str, Any]) -> Any:
    """Return the device_map that the old arguments mean."""
    import torch

    if given.get("device_map") is not None:
        return given["device_map"]
    if given.get("device") is not None:
        return "cpu" if given["device"] in (-1, "cpu") else given["device"]
    if given.get("pre_layer") is None:
        return None
    if not torch.cuda.is_available():
        return "cpu"
    from ropewalk.loader.quantize_config import read_json
    from ropewalk.loader.source import find_source

    count = read_json(find_source(model).folder / "config.json")["num_hidden_layers"]
    around = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    return {**around, **{f"model.layers.{i}": 0 if i < given["pre_layer"] else "cpu" for i in range(count)}}


def make_quant(
    module: Any,
    names: Any,
    bits: int,
    groupsize: int = -1,
    faster: Any = False,
    name: str = "",
    kernel_switch_threshold: Any = 128,
) -> None:
    """Put `QuantLinear` in the places of linear layers, for a state dict to be loaded into; a whole model of
    transformers gets the rotary embedding that its config means, too, which scripts cannot know.

    Args:
        module: of torch; changed in place.
        names: of the layers, with `name` before each.
        bits, groupsize: as `load_quant`.
        faster, kernel_switch_threshold: without meaning here. Where `faster` is text, it is `name`: that came fifth in
            other branches.
        name: what stands before the names of the layers of `module`.
    """
    from ropewalk.loader.quant_linear import QuantLinear
    from ropewalk.loader.quantizer import install_rope

    name = faster if isinstance(faster, str) else name
    layers = {path: layer for path, layer in module.named_modules() if f"{name}.{path}".lstrip(".") in names}
    for path, layer in layers.items():
        packed = QuantLinear(
            bits, groupsize, layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device
        )
        parent, _, last = path.rpartition(".")
        setattr(module.get_submodule(parent), last, packed)
    if hasattr(module, "config"):
        install_rope(module)


def find_layers(module: Any, layers: Any = None, name: str = "") -> dict[str, Any]:
    """Return the layers of the given classes (by default linear ones and 2-D convolutions) by their names."""
    from torch import nn

    kinds = tuple(layers or (nn.Conv2d, nn.Linear))
    return {path: layer for path, layer in module.named_modules(prefix=name) if type(layer) in kinds}


def _nothing(model: Any, *_: Any, **__: Any) -> None:
    """Stand for what made a model faster there: fused layers and tuning by calls. Here it is done at loading."""


def _contents() -> dict[str, dict[str, Any]]:
    """Return what is in each module."""
    import torch

    from ropewalk.loader.quant_linear import QuantLinear

    plain: dict[str, Callable[..., Any]] = {"load_quant": load_quant, "find_layers": find_layers}
    fused = ("make_quant_attn", "make_quant_norm", "make_fused_mlp", "autotune_warmup_linear", "autotune_warmup_fused")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    quant = {"QuantLinear": QuantLinear, "make_quant": make_quant, "make_quant_linear": make_quant}
    return {
        "llama": {**plain, "make_quant": make_quant, "DEV": device},
        "llama_inference": {**plain, "make_quant": make_quant, "DEV": device},
        "llama_inference_dmapauto": {**plain, "DEV": device},
        "llama_inference_offload": {"load_quant": _load_quant_offload, "find_layers": find_layers, "DEV": device},
        "quant": {**quant, **dict.fromkeys(fused, _nothing)},
        "modelutils": {"find_layers": find_layers, "DEV": device},
    }


def apply() -> str:
    """Make the modules importable; return one line that says which. Doing it twice changes nothing."""
    others = []
    for name, content in _contents().items():
        if name in _put and sys.modules.get(name) is _put[name]:
            continue
        if _exists(name):
            others.append(name)
            continue
        _put[name] = sys.modules[name] = ModuleType(name, "A part of GPTQ-for-LLaMa, as ropewalk does it.")
        vars(_put[name]).update(content)
    found = f"; {', '.join(others)} can be imported without, and is left alone" if others else ""
    return f"GPTQ-for-LLaMa: {', '.join(_put) or 'none'} of its modules are ropewalk's{found}"


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was made by hand
        return True


def revert() -> str:
    """Take the modules out again; what scripts have imported from them stays with these."""
    for name, module in _put.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _put.clear()
    return "GPTQ-for-LLaMa: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}; it never was a package with versions."""
    return {
        "package": "GPTQ-for-LLaMa",
        "version": "any",
        "tested": "the signatures of its branches up to triton, and of text-generation-webui",
        "applied": bool(_put),
    }


def run_script(arguments: list[str]) -> None:
    """Run a script, which is the first of the arguments, as Python itself would, except that the modules are ours
    even where it would find others.

    Raises:
        UsageError: no such file; whatever the script raises.
    """
    if not arguments or not Path(arguments[0]).is_file():
        raise UsageError(f"gptq_for_llama: expected a script and its arguments, found {arguments[:1] or 'none'}")
    del sys.path[0]  # the working directory, which may have the modules themselves
    apply()
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    from ropewalk.patches import gptq_for_llama  # what `ropewalk.patch` knows, and not this copy of it

    try:
        gptq_for_llama.run_script(sys.argv[1:])
    except UsageError as error:
        sys.exit(str(error))
