"""The quantization method "ropewalk": which layers of a checkpoint are packed, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from ropewalk.errors import FormatError, PatchError, QuantizeConfigError, RopewalkError
from ropewalk.gptq.format import is_sequential
from ropewalk.gptq.layout import has_even_groups, row_order
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.dynamic import Rule, match_rules
from ropewalk.loader.quantize_config import FILES, QuantizeConfig, for_layer, parse_quantize_config

# A layer whose rows may be shared out in their sorted order, by the columns of the one before it, in families where
# nothing is between them but an activation, channel by channel.
DOWN, GATE_UP = ".down_proj", ".gate_up_proj"
_PLAIN_MLP = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
# What `quantization` may be for a GPTQ checkpoint to be ours.
_ASKED = (None, "ropewalk")


@dataclass(frozen=True)
class Packing:
    """How a layer is packed.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: rows that share a scale, -1 for all.
        desc_act: whether the rows of a group lie anywhere, as far as that is known.
        checkpoint_format: "gptq" (v1) or "gptq_v2".
        scales: dtype of the scales on disk.
    """

    bits: int
    group_size: int
    desc_act: bool
    checkpoint_format: str
    scales: torch.dtype = torch.float16

    @classmethod
    def of(cls, settings: QuantizeConfig) -> Packing:
        """Return that of a config, or of one layer's settings."""
        in_order = settings.static_groups or settings.group_size == -1
        desc_act = settings.desc_act and not in_order
        return cls(settings.bits, settings.group_size, desc_act, settings.checkpoint_format)


class RopewalkConfig(QuantizationConfig):
    """What a GPTQ checkpoint says of its packing, as vLLM wants it.

    Args:
        settings: of the whole checkpoint.

    Attributes:
        is_wanted: whether GPTQ checkpoints are taken that nobody has named a method for.
        layers: name -> its packing, for all packed layers, where the files were here to be looked at; else None, and
            the config and its rules are believed.
        orders: name -> int32 [K], the order that sorts its rows by group, of the layers below that have one.
    """

    is_wanted: ClassVar[bool] = False

    def __init__(self, settings: QuantizeConfig):
        super().__init__()
        self.settings = settings
        self.layers: dict[str, Packing] | None = None
        self.orders: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"RopewalkConfig({Packing.of(self.settings)}, layers={self.layers and len(self.layers)})"

    @classmethod
    def get_name(cls) -> str:
        """Return "ropewalk"."""
        return "ropewalk"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that our operators take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU that the kernels are for."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return where a checkpoint of 2023 says it."""
        return list(FILES)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RopewalkConfig:
        """Return the config of a parsed quantize_config.json or `quantization_config`.

        Raises:
            QuantizeConfigError: another method than GPTQ, or values that it cannot have.
        """
        return cls(parse_quantize_config(dict(config), "quantization_config"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return our name for a GPTQ checkpoint, unless the user has named another method."""
        asked = user_quant in _ASKED and (cls.is_wanted or user_quant is not None)
        if not asked or str(hf_quant_cfg.get("quant_method")).lower() != "gptq":
            return None
        try:
            encoding = parse_quantize_config(dict(hf_quant_cfg), "quantization_config").encoding
        except RopewalkError:
            return None if user_quant is None else cls.get_name()  # whoever asked for us is told why not, later
        return cls.get_name() if encoding == "gptq" or user_quant is not None else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Return one that keeps all tensors; vLLM's own drops g_idx."""
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Have the names of layers follow those of vLLM's modules."""
        if self.layers is not None:
            self.layers = dict(hf_to_vllm_mapper.apply_dict(self.layers))
            self.orders = dict(hf_to_vllm_mapper.apply_dict(self.orders))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look at a checkpoint that is here, before anything of it is read: which layers are packed, and how.

        Raises:
            CheckpointError, FormatError: a file at fault.
            QuantizeConfigError: layers that lie on disk in another way than GPTQ's.
        """
        if not Path(model_name).is_dir():
            return
        checkpoint = open_checkpoint(model_name)
        others = sorted({layer.encoding for layer in checkpoint.layers.values()} - {"gptq"})
        if others or any(file.suffix != ".safetensors" for file in checkpoint.files):
            found = others[0] if others else checkpoint.files[0].name
            raise QuantizeConfigError(
                model_name, f"safetensors of GPTQ layers (`ropewalk convert {model_name} OUT` writes them)", found
            )
        self.layers = {}
        plain = checkpoint.config["model_type"] in _PLAIN_MLP
        with checkpoint.reader() as reader:
            for name, layer in checkpoint.layers.items():
                packing = replace(Packing.of(layer.settings), scales=layer.entries["scales"].dtype)
                if layer.has_g_idx:  # it knows better than the config whether rows were moved
                    g_idx = reader.read(layer.entries["g_idx"].name)
                    packing = replace(packing, desc_act=not is_sequential(g_idx, packing.group_size))
                    if name.endswith(DOWN) and plain and has_even_groups(g_idx, packing.group_size):
                        order = row_order(g_idx, packing.group_size)
                        if order is not None:
                            self.orders[name] = order
                self.layers[name] = packing

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method of a layer, or None for what is no linear layer.

        Raises:
            FormatError: layers that vLLM takes as one, but which are not packed alike.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from ropewalk.patches.vllm.experts import RopewalkExpertsMethod
        from ropewalk.patches.vllm.linear import RopewalkLinearMethod

        if isinstance(layer, RoutedExperts):
            packing = self._of_experts(prefix)
            return None if packing is None else RopewalkExpertsMethod(packing, layer.moe_config, prefix)
        if isinstance(layer, ParallelLMHead):
            packing = self._agreed(prefix, [prefix]) if self.layers is not None or self.settings.lm_head else None
            return None if packing is None else RopewalkLinearMethod(packing, prefix)
        if isinstance(layer, LinearBase):
            parent, dot, name = prefix.rpartition(".")
            names = [parent + dot + each for each in self.packed_modules_mapping.get(name, [name])]
            if self.layers is not None and prefix in self.layers:
                names = [prefix]  # one weight on disk already
            packing = self._agreed(prefix, names)
            if packing is None:
                return UnquantizedLinearMethod()
            return RopewalkLinearMethod(packing, prefix, self._order_between(prefix))
        return None

    def _order_between(self, prefix: str) -> torch.Tensor | None:
        """Return the order of a down's rows, for it and for the gate and up before it."""
        parent = next((prefix.removesuffix(end) for end in (DOWN, GATE_UP) if prefix.endswith(end)), None)
        if parent is None or not any(
            f"{parent}.{gate}" in (self.layers or {}) for gate in ("gate_proj", "gate_up_proj")
        ):
            return None
        return self.orders.get(parent + DOWN)

    def _of_experts(self, prefix: str) -> Packing | None:
        if self.layers is None:
            return Packing.of(self.settings)
        return self._agreed(prefix, [name for name in self.layers if name.startswith(f"{prefix}.")] or [prefix])

    def _agreed(self, prefix: str, names: Sequence[str]) -> Packing | None:
        """Return the packing that layers share, or None where none of them is packed."""
        if self.layers is not None:
            found = [self.layers.get(name) for name in names]
        else:
            rules = match_rules(self.settings.dynamic, names, self.settings.source)
            found = [self._by_rule(rules.get(name)) for name in names]
        kinds = {each and replace(each, desc_act=False) for each in found}
        if len(kinds) > 1:
            listed = ", ".join(f"{name}: {_words(each)}" for name, each in zip(names, found, strict=True))
            raise FormatError(prefix, "layers that vLLM takes as one packed alike", listed[:400])
        first = found[0]
        desc_act = any(each is not None and each.desc_act for each in found)
        return None if first is None else replace(first, desc_act=desc_act)

    def _by_rule(self, rule: Rule | None) -> Packing | None:
        if rule is None:
            return Packing.of(self.settings)
        return None if rule.excludes else Packing.of(for_layer(self.settings, rule))


def _words(packing: Packing | None) -> str:
    return "not packed" if packing is None else f"{packing.bits} bits, group_size {packing.group_size}"


def check_methods() -> None:
    """Look at the classes that the methods build on, so that what has moved is found when vLLM starts, not later.

    Raises:
        PatchError: one that is not as it is known here.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    for name in ("create_weights", "apply", "process_weights_after_loading"):
        if not hasattr(QuantizeMethodBase, name):
            raise PatchError("vllm", f"QuantizeMethodBase.{name}", "none")
    for name in ("get_checkpoint_weight_mapper", "maybe_update_config", "apply_vllm_mapper"):
        if not hasattr(QuantizationConfig, name):
            raise PatchError("vllm", f"QuantizationConfig.{name}", "none")
