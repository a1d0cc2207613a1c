"""How transformers builds and loads a packed model: its quantizer interface, filled in by us.

`RopewalkQuantizer` puts a QuantLinear in place of every linear layer that the checkpoint holds packed,
while the model is still on the meta device; transformers then loads the buffers as it loads anything.
It is registered under a name of its own, which `load` asks for, so transformers keeps its own quantizers;
`ropewalk.patch()` also puts it where transformers looks for "gptq".
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ropewalk.errors import FormatError, MissingTensorsError
from ropewalk.gptq.format import infer_features
from ropewalk.loader import apply_rotary
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.quantize_config import QuantizeConfig, parse_quantize_config
from ropewalk.loader.rope import RopeDecision, decide_rope
from ropewalk.loader.rotary import RopewalkRotaryEmbedding, register_rope_types
from ropewalk.loader.safetensors_file import TensorEntry, read_header

METHOD = "ropewalk"

# Families whose rotary module is Llama's by another name: half-rotated, one inv_freq for all layers.
ROTARY_CLASSES = frozenset(
    f"{family}RotaryEmbedding" for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe")
)


class RopewalkConfig(QuantizationConfigMixin):
    """A GPTQ config that makes transformers ask for our quantizer; it is saved as the "gptq" it came from."""

    def __init__(self, **raw: Any):
        raw.pop("quant_method", None)
        settings = parse_quantize_config({**raw, "quant_method": "gptq"}, "quantization_config")
        self.quant_method = METHOD
        self.bits, self.group_size = settings.bits, settings.group_size
        self.desc_act, self.sym = settings.desc_act, settings.sym
        self.checkpoint_format = settings.checkpoint_format
        self.raw = raw

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` gets: AutoGPTQ's keys, readable by every GPTQ program."""
        return {**copy.deepcopy(self.raw), "quant_method": "gptq"}


class RopewalkQuantizer(HfQuantizer):
    """Loads a checkpoint packed by GPTQ into QuantLinear layers, and settles its rotary embedding."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.settings = parse_quantize_config(quantization_config.to_dict() | {"quant_method": "gptq"}, "config.json")

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed besides this package."""

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Any floating dtype will do; the scales keep their own."""
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        replace_packed_layers(model, _headers(checkpoint_files or []), self.settings)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.post_init()
        install_rope(model)
        # From here on it is a GPTQ model to whoever asks (PEFT refuses to merge into one, for example).
        model.quantization_method = self.quantization_config.quant_method = QuantizationMethod.GPTQ
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the packed tensors as they were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on a packed base."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the model."""
        return True


def request(settings: QuantizeConfig) -> dict[str, Any]:
    """Return the `quantization_config` that makes transformers load with our quantizer."""
    known = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.desc_act,
        "checkpoint_format": settings.checkpoint_format,
        "quant_method": METHOD,
    }
    return {**settings.raw, **known}


def register() -> None:
    """Make transformers know the quantizer under the name "ropewalk". Calling it again changes nothing."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(RopewalkConfig)
        auto.register_quantizer(METHOD)(RopewalkQuantizer)
    register_rope_types()


def _headers(files: list[str]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        tensors.update(read_header(Path(file))[0])
    return tensors


def replace_packed_layers(model: Any, tensors: dict[str, TensorEntry], settings: QuantizeConfig) -> None:
    """Put a QuantLinear, on the meta device, wherever the checkpoint has a qweight.

    Raises:
        MissingTensorsError: a packed layer that the model does not have as a linear layer.
        FormatError: sizes that differ from the model's.
    """
    for name, entry in tensors.items():
        layer = name.removesuffix(".qweight")
        if layer == name:
            continue
        try:
            linear = model.get_submodule(layer)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            found = "none of that name" if linear is None else type(linear).__name__
            raise MissingTensorsError(entry.file, f"a linear layer {layer} in {type(model).__name__}", found)
        in_features, out_features = infer_features(entry.shape, settings.bits)
        if (in_features, out_features) != (linear.in_features, linear.out_features):
            expected = f"a layer of {linear.in_features} inputs and {linear.out_features} outputs (config.json)"
            raise FormatError(layer, expected, f"{in_features} and {out_features}", str(entry.file))
        parent, _, attribute = layer.rpartition(".")
        packed = QuantLinear(
            settings.bits,
            settings.group_size,
            in_features,
            out_features,
            f"{layer}.bias" in tensors,
            checkpoint_format=settings.checkpoint_format,
            device="meta",
        )
        if f"{layer}.g_idx" not in tensors:
            packed.drop_g_idx()
        setattr(model.get_submodule(parent), attribute, packed)


def install_rope(model: Any, decision: RopeDecision | None = None) -> None:
    """Give a loaded model its rotary embedding, and write it into the config; the rotation itself is then our
    operator wherever the model's family does it half-rotated (see apply_rotary.py).

    Args:
        model: of transformers, loaded.
        decision: which one; by default what the config means (see `ropewalk.loader.rope`).
    """
    config = model.config
    if getattr(config, "rope_parameters", None) is None:
        return
    for modeling in {type(module).__module__ for module in model.modules()}:
        apply_rotary.replace(modeling)
    if decision is None:
        decision = decide_rope(config.to_dict())
    config.rope_parameters = decision.parameters
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ROTARY_CLASSES or isinstance(module, RopewalkRotaryEmbedding):
            parent, _, attribute = name.rpartition(".")
            ours = RopewalkRotaryEmbedding(config, module.inv_freq.device)
            ours.modeling = module.modeling if hasattr(module, "modeling") else type(module).__module__
            if ours.modeling is not None:
                apply_rotary.expect_float32_tables(ours.modeling)
            setattr(model.get_submodule(parent), attribute, ours)
