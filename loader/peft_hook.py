"""PEFT puts LoRA on packed layers by itself: `get_peft_model`, `load_adapter`, transformers' `add_adapter`.

PEFT goes by the class of a layer, and does not know ours. What is changed, all of it undone by `disable`, are two
methods of PEFT's LoraModel:

    _prepare_model        is called before an adapter is put on a model. Ours registers `PackedLoraLinear` for
                          QuantLinear in the adapter's config, the way that PEFT has for layers it does not know,
                          lets target_modules="all-linear" mean packed layers, too, and refuses to train what
                          cannot be.
    _check_merge_allowed  is called before adapters are merged into the weights. Ours says why packed ones cannot be.

Importing PEFT takes longer than loading a small model, so that is not done here: where it is not imported yet, it
is changed when it is.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ropewalk.errors import MergeError, UsageError
from ropewalk.loader.quant_linear import QuantLinear

log = logging.getLogger("ropewalk")

MODULE = "peft.tuners.lora.model"
SIGNATURES = {"_prepare_model": ["self", "peft_config", "model"], "_check_merge_allowed": ["self"]}

# name of a method of LoraModel -> the one it came with
_originals: dict[str, Any] = {}


def enable() -> bool:
    """Have PEFT know packed layers, now if it is imported, else when it is. Doing it twice changes nothing.

    Returns:
        whether that is so; it is not for a PEFT in which the methods above are others.
    """
    if hasattr(sys.modules.get(MODULE), "LoraModel"):
        _register(sys.modules[MODULE])
        return is_enabled()
    if _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)
    return True


def disable() -> None:
    """Give PEFT its own methods back; models that have adapters keep them."""
    if _watch in sys.meta_path:
        sys.meta_path.remove(_watch)
    for name, original in _originals.items():
        setattr(sys.modules[MODULE].LoraModel, name, original)
    _originals.clear()


def is_enabled() -> bool:
    """Return whether PEFT is imported and knows packed layers."""
    return bool(_originals)


def is_waiting() -> bool:
    """Return whether PEFT will know packed layers once it is imported."""
    return _watch in sys.meta_path


def require() -> None:
    """Import PEFT, and have it know packed layers.

    Raises:
        ImportError: PEFT is not installed, or does not go with what is.
        UsageError: a PEFT in which the methods above are others.
    """
    enable()
    importlib.import_module(MODULE)
    if not is_enabled():
        raise UsageError(_unknown_peft(sys.modules[MODULE]))


def has_packed_layers(model: Any) -> bool:
    """Return whether a model has a layer whose weight is packed."""
    return any(isinstance(module, QuantLinear) for module in model.modules())


class _Watch:
    """A finder of modules that finds one, when it is imported, and then has it changed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)  # the others shall find it, and once is enough
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_watch = _Watch()


def _register(module: ModuleType) -> None:
    """Put our methods into PEFT's LoraModel, unless its own are not those that are known here: that is no reason
    for `import peft` to fail, so it is only said.
    """
    if _originals:
        return
    model_class: Any = module.LoraModel
    for name, parameters in SIGNATURES.items():
        if list(inspect.signature(getattr(model_class, name, lambda: None)).parameters) != parameters:
            log.warning(_unknown_peft(module))
            return
    _originals.update({name: getattr(model_class, name) for name in SIGNATURES})
    prepare_model, check_merge_allowed = (_originals[name] for name in SIGNATURES)

    @functools.wraps(prepare_model)
    def ours_prepare(self: Any, peft_config: Any, model: Any) -> None:
        _check_can_train(model, peft_config)
        prepare_model(self, peft_config, model)
        if has_packed_layers(model):
            peft_config._register_custom_module({QuantLinear: packed_lora_linear()})
            if str(peft_config.target_modules).lower() == "all-linear":
                peft_config.target_modules = _all_linear(model)

    @functools.wraps(check_merge_allowed)
    def ours_check(self: Any) -> None:
        for layer in self.model.modules():
            if isinstance(layer, QuantLinear):
                raise MergeError(_no_merge(layer))
        check_merge_allowed(self)

    model_class._prepare_model = ours_prepare
    model_class._check_merge_allowed = ours_check
    log.debug("peft: LoRA goes on packed layers")


def _check_can_train(model: Any, config: Any) -> None:
    """Refuse to train whole modules whose weights are no parameters: PEFT would copy them, and train nothing."""
    wanted = () if config.inference_mode else (config.modules_to_save or ())
    for name, module in model.named_modules():
        if name.endswith(tuple(wanted)) and "weight" in module._buffers:
            raise UsageError(
                f"modules_to_save: expected modules with a gradient, found {name}, which keeps its 16 bits here "
                f"({type(module).__name__}); put an adapter on it (target_modules) instead"
            )


def _unknown_peft(module: ModuleType) -> str:
    expected = ", ".join(f"{name}({', '.join(parameters)})" for name, parameters in SIGNATURES.items())
    version = getattr(sys.modules.get("peft"), "__version__", "of an unknown version")
    return f"peft: expected a LoraModel with {expected} to put LoRA on packed layers, found another in peft {version}"


def _no_merge(layer: Any) -> str:
    return (
        f"merging: the weights are packed, and codes of {layer.bits} bits cannot hold what an adapter adds to them; "
        "keep the adapter beside the base, or merge it into the float16 model and quantize that (ropewalk quantize)"
    )


def _all_linear(model: Any) -> set[str]:
    """Return the names of all linear layers but the output embedding, as PEFT's "all-linear" means them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name
        for name, module in modules.items()
        if isinstance(getattr(module, "base_layer", module), (nn.Linear, QuantLinear))
        and module is not head
        and not name.startswith(inside)
    }


@functools.cache
def packed_lora_linear() -> Any:
    """Return the class that PEFT wraps packed layers in, a GPTQLoraLinear of PEFT: it calls the base layer, whatever
    that is, and adds to what comes out.
    """
    from peft.tuners.lora.gptq import GPTQLoraLinear

    class PackedLoraLinear(GPTQLoraLinear):
        """PEFT's layer for GPTQ, with the base layer in it once, and a merge that is refused."""

        def __init__(self, base_layer: Any, adapter_name: str, *args: Any, **kwargs: Any):
            super().__init__(base_layer, adapter_name, *args, **kwargs)
            # PEFT's also has it by its former name, so that moving the model would repack every layer twice.
            del self._modules["quant_linear_module"]

        @property
        def quant_linear_module(self) -> Any:
            """The base layer, by PEFT's former name for it."""
            return self.base_layer

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            """Return what an adapter adds to the weight, [N, K]; PEFT combines adapters by it (svd)."""
            a: Any = self.lora_A[adapter]
            b: Any = self.lora_B[adapter]
            return b.weight @ a.weight * self.scaling[adapter]

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """Refuse.

            Raises:
                MergeError: always.
            """
            raise MergeError(_no_merge(self.get_base_layer()))

        def unmerge(self) -> None:
            """Do nothing: nothing is merged."""

    return PackedLoraLinear
