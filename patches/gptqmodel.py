"""GPTQModel: `GPTQModel.load` computes with our layers, and gives a model the rotary embedding that its config means.

GPTQModel has no registration for kernels. It chooses them from a table, `AUTO_BACKEND_KERNEL_MAPPING`, in which each
format has its classes in order of preference, and asks each class whether it takes the settings, the device and the
sizes. What is changed, all of it undone by `revert`:

    the table                     has our class before the others for the formats gptq and gptq_v2, so that
                                  backend="auto", the default, finds it first. A backend that is named is left alone,
                                  and so is what quantizes and packs.
    load_checkpoint_in_model...   rounds scales and biases to the model's dtype, which is bfloat16 on a CPU by default;
                                  our layers get them from the file again, in its 16 bits.
    gptqmodel_post_init           is called when a model is loaded; ours then settles its rotary embedding.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from ropewalk.errors import MissingPackageError, PatchError
from ropewalk.patches.replace import Replacements, absent, expect_arguments, installed

TABLE = "AUTO_BACKEND_KERNEL_MAPPING"
LOAD = "load_checkpoint_in_model_then_tie_weights"
POST_INIT = "gptqmodel_post_init"

_replaced = Replacements()


def apply() -> str:
    """Patch GPTQModel; return one line that says what was done. Doing it twice changes nothing.

    Raises:
        MissingPackageError: GPTQModel is not installed.
        PatchError: a GPTQModel that is not as it is known here; nothing is changed then.
    """
    from ropewalk.loader.rotary import register_rope_types

    if not _replaced:
        try:
            import gptqmodel  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(f"patch: expected the package gptqmodel, {error}") from error
        try:
            from gptqmodel.models import loader
            from gptqmodel.utils import importer

            from ropewalk.patches.gptqmodel_layer import RopewalkLinear
        except ImportError as error:
            raise PatchError(_package(), "modules as 7.6 has them", error) from error
        table = _with_first(RopewalkLinear, importer)
        for name in (LOAD, POST_INIT):
            expect_arguments("gptqmodel", name, getattr(loader, name, absent), ["model"])
        register_rope_types("gptqmodel")
        _replaced.put(importer, TABLE, table)
        _replaced.put(loader, LOAD, _load(getattr(loader, LOAD)))
        _replaced.put(loader, POST_INIT, _post_init(getattr(loader, POST_INIT)))
    return "gptqmodel: GPTQModel.load computes with ropewalk's layers (backend auto, formats gptq and gptq_v2)"


def _package() -> str:
    return f"gptqmodel {installed('gptqmodel')}"


def _with_first(ours: Any, importer: Any) -> Any:
    """Return GPTQModel's table with our class before the others."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.backend import BACKEND

    expect_arguments("gptqmodel", "_validate", BaseQuantLinear._validate, ["bits", "group_size", "desc_act", "sym"])
    table = getattr(importer, TABLE, None)
    expected = f"{TABLE}: method -> format -> classes in order"
    if not isinstance(table, dict) or not isinstance(table.get(METHOD.GPTQ), dict):
        raise PatchError(_package(), expected, type(table).__name__)
    of_gptq = dict(table[METHOD.GPTQ])
    for name in (FORMAT.GPTQ, FORMAT.GPTQ_V2):
        classes = of_gptq.get(name)
        if not classes or not all(isinstance(c, type) and issubclass(c, BaseQuantLinear) for c in classes.values()):
            raise PatchError(_package(), expected, f"other things for {name.value}")
        of_gptq[name] = OrderedDict([(BACKEND.AUTO, ours), *classes.items()])
    return {**table, METHOD.GPTQ: of_gptq}


def _load(original: Any) -> Any:
    @functools.wraps(original)
    def load_checkpoint(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        checkpoint = kwargs.get("checkpoint", args[0] if args else None)
        if checkpoint is not None:
            _read_floats_again(model, Path(checkpoint))
        return result

    return load_checkpoint


def _read_floats_again(model: Any, checkpoint: Path) -> None:
    """Give our layers the scales and biases of the file, where they were rounded on the way."""
    from safetensors import safe_open

    from ropewalk.loader.quant_linear import QuantLinear

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    if not layers:
        return
    files = [checkpoint]
    if checkpoint.name.endswith(".index.json"):
        shards = json.loads(checkpoint.read_text())["weight_map"]
        files = [checkpoint.with_name(name) for name in sorted(set(shards.values()))]
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                name, _, part = key.rpartition(".")
                if name in layers and part in ("scales", "bias"):
                    loaded = getattr(layers[name], part)
                    tensor = tensors.get_tensor(key)
                    if loaded is not None and loaded.dtype != tensor.dtype:
                        setattr(layers[name], part, tensor.to(loaded.device))


def _post_init(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(model: Any, *args: Any, **kwargs: Any) -> Any:
        from ropewalk.loader import peft_hook
        from ropewalk.loader.quantizer import settle_rope

        model = original(model, *args, **kwargs)
        settle_rope(model)
        if peft_hook.has_packed_layers(model):
            peft_hook.enable()
        return model

    return post_init


def revert() -> str:
    """Give GPTQModel its own table and functions back, and transformers its rotation of q and k unless that is patched
    as well; models that are loaded keep their layers.
    """
    from ropewalk.loader import apply_rotary
    from ropewalk.loader.rotary import unregister_rope_types
    from ropewalk.patches import transformers

    _replaced.restore()
    unregister_rope_types("gptqmodel")
    if not transformers.status()["applied"]:
        apply_rotary.restore()
    return "gptqmodel: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}."""
    return {"package": "gptqmodel", "version": installed("gptqmodel"), "tested": "7.6.0", "applied": bool(_replaced)}
