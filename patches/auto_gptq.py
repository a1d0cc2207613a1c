"""AutoGPTQ 0.7.1: `AutoGPTQForCausalLM.from_quantized` computes with our layers, and the rope is what the config means.

It needs transformers 4, and so an environment of its own (`make test-autogptq`), where ropewalk is installed without
what it requires. What is changed, all of it undone by `revert`:

    dynamically_import_QuantLinear   chooses the class of packed layers, by arguments that name kernels (use_triton,
                                     disable_exllama, ...); it is ours now, for models that are loaded and for models
                                     that are packed. use_marlin and use_qigen still mean AutoGPTQ's own.
    from_quantized                   of the base of all models: once one is loaded, its layers are made ready and its
                                     rotary embedding is settled. Fused attention and MLPs, which are made for
                                     AutoGPTQ's own layers, are left out with a warning.
    get_gptq_peft_model              puts PEFT's own LoRA on our layers; AutoGPTQ's own fails with peft 0.17.
"""

from __future__ import annotations

import functools
import inspect
import logging
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ropewalk.errors import MissingPackageError, UsageError
from ropewalk.patches.replace import Replacements, absent, expect_arguments, installed

log = logging.getLogger("ropewalk")

CHOOSE = "dynamically_import_QuantLinear"
PEFT = "get_gptq_peft_model"

# Options of from_quantized that are left out with a warning.
_LEFT_OUT = {
    "inject_fused_attention": "q, k and v stay layers of their own",
    "inject_fused_mlp": "gate and up stay layers of their own",
    "warmup_triton": "AutoGPTQ's Triton kernels are not what computes",
}

_replaced = Replacements()
# Whether AutoGPTQ is to choose for itself in this call, since a kernel of its own was asked for by name.
_by_itself: ContextVar[bool] = ContextVar("by_itself", default=False)


def apply() -> str:
    """Patch AutoGPTQ; return one line that says what was done. Doing it twice changes nothing.

    Raises:
        MissingPackageError: AutoGPTQ is not installed, or cannot be imported beside this transformers.
        PatchError: functions with other arguments than are known here; nothing is changed then.
    """
    if not _replaced:
        try:
            import auto_gptq
            from auto_gptq.modeling import _base, _utils
            from auto_gptq.utils import import_utils, peft_utils
        except ImportError as error:
            raise MissingPackageError(f"patch: expected the package auto-gptq and transformers 4, {error}") from error
        choose, peft = getattr(import_utils, CHOOSE, absent), getattr(peft_utils, PEFT, absent)
        from_quantized = _base.BaseGPTQForCausalLM.from_quantized.__func__
        known = ["use_triton", "desc_act", "group_size", "bits", "disable_exllama", "disable_exllamav2", "use_qigen"]
        expect_arguments("auto_gptq", CHOOSE, choose, [*known, "disable_marlin"])
        expect_arguments("auto_gptq", "from_quantized", from_quantized, ["cls", "model_name_or_path"])
        known = ["model", "peft_config", "model_id", "adapter_name", "auto_find_all_linears", "train_mode"]
        expect_arguments("auto_gptq", PEFT, peft, known)
        chosen = _choose(choose)
        for module in (import_utils, _base, _utils):
            _replaced.put(module, CHOOSE, chosen)
        _replaced.put(_base.BaseGPTQForCausalLM, "from_quantized", classmethod(_from_quantized(from_quantized)))
        ours = _get_peft_model(peft)
        for module in (peft_utils, auto_gptq):
            _replaced.put(module, PEFT, ours)
    return "auto_gptq: AutoGPTQForCausalLM.from_quantized computes with ropewalk's layers"


def _choose(original: Any) -> Any:
    from ropewalk.loader.quant_linear import QuantLinear

    signature = inspect.signature(original)

    @functools.wraps(original)
    def dynamically_import_QuantLinear(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if _by_itself.get() or given.arguments["use_qigen"] or not given.arguments["disable_marlin"]:
            return original(*args, **kwargs)
        return QuantLinear

    return dynamically_import_QuantLinear


def _from_quantized(original: Any) -> Any:
    @functools.wraps(original)
    def from_quantized(cls: Any, model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        from ropewalk.loader import peft_hook
        from ropewalk.loader.quantizer import settle_rope

        given = inspect.signature(original).bind(cls, model_name_or_path, *args, **kwargs).arguments
        by_itself = bool(given.get("use_marlin") or given.get("use_qigen"))
        if by_itself:
            log.info("auto_gptq: a kernel of its own was asked for (use_marlin or use_qigen), and computes")
        else:
            for name, why in _LEFT_OUT.items():
                if given.get(name):
                    log.warning("auto_gptq: %s is left out with ropewalk's layers: %s", name, why)
                    given[name] = False
        further = given.pop("kwargs", {})
        token = _by_itself.set(by_itself)
        try:
            loaded = original(**given, **further)
        finally:
            _by_itself.reset(token)
        if not by_itself:
            _make_ready(loaded.model, model_name_or_path)
            peft_hook.enable()
        settle_rope(loaded.model)
        return loaded

    return from_quantized


def _make_ready(model: Any, name: Any) -> None:
    """Have our layers derive what they compute with, of zero points as v1 stores them.

    Raises:
        FormatError: a group number out of range, or scales that are not finite.
    """
    from ropewalk.gptq.format import zeros_v2_to_v1
    from ropewalk.loader.quant_linear import QuantLinear

    v2 = "gptq_v2" in _formats_stated(model, Path(str(name)))
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            if v2:
                # AutoGPTQ does not know this format: it reads it as v1, one off, and will save it under v1's name.
                layer.qzeros = zeros_v2_to_v1(layer.qzeros, layer.bits)
            layer.post_init()


def _formats_stated(model: Any, folder: Path) -> set[Any]:
    from ropewalk.loader.quantize_config import CONFIG_KEY, FILES, read_json

    stated = [read_json(folder / name) for name in FILES if (folder / name).is_file()]
    stated.append(getattr(model.config, CONFIG_KEY, None))
    found = [config for config in stated if isinstance(config, dict)]
    return {config.get(key) for config in found for key in ("checkpoint_format", "format")}


def _get_peft_model(original: Any) -> Any:
    @functools.wraps(original)
    def get_gptq_peft_model(
        model: Any,
        peft_config: Any = None,
        model_id: Any = None,
        adapter_name: str = "default",
        auto_find_all_linears: bool = True,
        train_mode: bool = False,
    ) -> Any:
        from ropewalk.loader import peft_hook

        if not peft_hook.has_packed_layers(model):
            return original(model, peft_config, model_id, adapter_name, auto_find_all_linears, train_mode)
        given = peft_config if train_mode else model_id
        if given is None:
            wanted = "peft_config, the adapter to train" if train_mode else "model_id, the adapter to load"
            raise UsageError(f"{PEFT}: expected {wanted} (train_mode is {train_mode}), found none")
        peft_hook.require()
        from peft import PeftModel, get_peft_model

        if not train_mode:
            return PeftModel.from_pretrained(model.model, model_id, adapter_name)
        if auto_find_all_linears and hasattr(peft_config, "target_modules"):
            peft_config.target_modules = "all-linear"
        return get_peft_model(model.model, peft_config, adapter_name=adapter_name)

    return get_gptq_peft_model


def revert() -> str:
    """Give AutoGPTQ its own functions back; models that are loaded keep their layers."""
    _replaced.restore()
    return "auto_gptq: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}."""
    tested = "0.7.1, with transformers 4.57.6"
    return {"package": "auto_gptq", "version": installed("auto_gptq"), "tested": tested, "applied": bool(_replaced)}
