"""What makes a loaded model one that transformers, PEFT and the like know as a GPTQ model, and its rotary embedding.

transformers asks a quantized model's `hf_quantizer` whether it can be saved, trained and compiled, and what its
`state_dict` is; ours is attached to what `ropewalk.load` has built.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ropewalk.loader import apply_rotary
from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.rope import RopeDecision, decide_rope
from ropewalk.loader.rotary import RopewalkRotaryEmbedding

log = logging.getLogger("ropewalk")

# Families whose rotary module is Llama's by another name: half-rotated, one inv_freq for all layers.
ROTARY_CLASSES = frozenset(
    f"{family}RotaryEmbedding" for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe")
)


class RopewalkConfig(QuantizationConfigMixin):
    """The GPTQ settings of a model, in AutoGPTQ's keys, as config.json has them.

    Args:
        raw: as they were read.
        known: what was found out besides.
    """

    def __init__(self, raw: dict[str, Any], **known: Any):
        self.quant_method = QuantizationMethod.GPTQ
        self.raw = {**raw, **known}
        self.bits, self.group_size = known["bits"], known["group_size"]
        self.desc_act, self.sym = known["desc_act"], raw.get("sym")
        self.checkpoint_format = known["checkpoint_format"]

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` gets, readable by every GPTQ program."""
        return {**copy.deepcopy(self.raw), "quant_method": "gptq"}


class RopewalkQuantizer(HfQuantizer):
    """Answers transformers' questions about a model that is loaded already.

    Args:
        quantization_config: its settings.
        dtypes: name of a parameter -> its dtype in the checkpoint.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, dtypes: dict[str, torch.dtype] | None = None, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._dtypes = dtypes or {}

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what is saved: tensors that were widened when they were read have the file's dtype again, unless
        they have changed since.
        """
        return {name: self._as_read(name, tensor) for name, tensor in model.state_dict().items()}, {}

    def _as_read(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self._dtypes.get(name, tensor.dtype)
        if dtype == tensor.dtype:
            return tensor
        narrow = tensor.to(dtype)
        return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor

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


def attach(model: Any, checkpoint: Checkpoint, dtypes: dict[str, torch.dtype]) -> None:
    """Make a loaded model a GPTQ model to whoever asks (PEFT refuses to merge into one, for example).

    Args:
        dtypes: name of a parameter -> its dtype in the checkpoint.
    """
    settings = checkpoint.quantize_config
    assert settings is not None
    config = RopewalkConfig(
        dict(settings.raw),
        bits=settings.bits,
        group_size=settings.group_size,
        desc_act=settings.desc_act,
        checkpoint_format=settings.checkpoint_format,
    )
    model.hf_quantizer = RopewalkQuantizer(config, dtypes, pre_quantized=True)
    model.config.quantization_config = config
    model.quantization_method = QuantizationMethod.GPTQ
    model.is_quantized = True


def install_rope(model: Any, decision: RopeDecision | None = None) -> None:
    """Give a loaded model its rotary embedding, and write it into the config; the rotation itself is then our
    operator wherever the model's family does it half-rotated (see apply_rotary.py).

    Args:
        model: of transformers, loaded.
        decision: which one; by default what the config means (see `ropewalk.loader.rope`).
    """
    config = model.config
    if getattr(config, "rope_parameters", {}) is None:
        return
    if decision is None:
        decision = decide_rope(config.to_dict())
    if not decision.parameters:
        return
    for modeling in {type(module).__module__ for module in model.modules()}:
        apply_rotary.replace(modeling)
    config.rope_parameters = decision.parameters
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ROTARY_CLASSES or isinstance(module, RopewalkRotaryEmbedding):
            parent, _, attribute = name.rpartition(".")
            ours = RopewalkRotaryEmbedding(config, module.inv_freq.device)
            ours.modeling = module.modeling if hasattr(module, "modeling") else type(module).__module__
            if ours.modeling is not None:
                apply_rotary.expect_float32_tables(ours.modeling)
            setattr(model.get_submodule(parent), attribute, ours)


def settle_rope(model: Any) -> None:
    """Give a model that another program has loaded the rotary embedding that its config means, and say which that is.

    Raises:
        RopeError: a config that names an unknown type or impossible parameters.
    """
    decision = decide_rope(model.config.to_dict())
    install_rope(model, decision)
    log.info("rope: %s, since %s", decision, decision.why)
    for warning in decision.warnings:
        log.warning("rope: %s", warning)
