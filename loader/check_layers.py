"""Whether the packed layers of a checkpoint are what its settings say, tensor by tensor; nothing large is read."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ropewalk.errors import FormatError
from ropewalk.gptq.format import is_symmetric, sequential_g_idx
from ropewalk.loader.dynamic import match_rules
from ropewalk.loader.encodings import ENCODINGS, shapes_of
from ropewalk.loader.gptq_for_llama import check_float_zeros, whole_zeros
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.quantize_config import QuantizeConfig, with_values
from ropewalk.loader.reader import Reader
from ropewalk.loader.safetensors_file import TensorEntry
from ropewalk.loader.settle import Layers, encoding_of, layer_settings

# As (encoding, version of the zero points), the readings of words that do not tell which they are.
_READINGS = (("gptq", "gptq"), ("gptq", "gptq_v2"), ("gptq_p", "gptq_v2"))


def check_format(settings: QuantizeConfig, layers: Layers, reader: Reader) -> tuple[QuantizeConfig, list[str]]:
    """Correct the format where the tensors prove it wrong; return (settings, warnings).

    Where all zero points are symmetric, the words themselves tell v1 from v2 and planar; believe them.
    """
    found = {encoding for encoding, _ in layers.values()}
    if settings.encoding == "marlin" and "marlin" not in found:
        settings = replace(settings, encoding="gptq")
        return settings, [
            f"{settings.source} says marlin, but there are no Marlin tensors (B and s); those are followed"
        ]
    warnings = []
    if settings.encoding != "marlin" and "marlin" in found:
        settings = with_values(settings, checkpoint_format="gptq", sym=True)
        warnings.append(f"{settings.source} does not say marlin, but the tensors are Marlin's (B and s)")
    of_layer, _ = layer_settings(settings, layers)
    if "gptq-for-llama" in found:
        return _with_version_for(settings, layers, of_layer, reader), warnings
    for name, (encoding, entries) in layers.items():
        entry, bits = entries.get("qzeros"), of_layer[name].bits
        if encoding == "gptq" and entry is not None and entry.dtype_name == "I32" and len(entry.shape) == 2:
            changed = _format_by(reader.read(entry.name), bits, settings)
            if changed is not None:
                said = settings.encoding if settings.encoding != "gptq" else settings.checkpoint_format
                names = changed[0] if changed[0] != "gptq" else changed[1]
                warnings.append(f"checkpoint_format is {said}, but the zero points are {names}'s; {names} is used")
                settings = with_values(settings, encoding=changed[0], checkpoint_format=changed[1])
            break
    return settings, warnings


def _format_by(qzeros: Tensor, bits: int, settings: QuantizeConfig) -> tuple[str, str] | None:
    """Return the reading by which zero points are symmetric, if it is not the one that the settings name."""
    if qzeros.numel() == 0 or (bits == 3 and qzeros.shape[1] % 3):
        return None
    stated = (settings.encoding, settings.checkpoint_format)
    readings = sorted(_READINGS, key=lambda reading: reading != stated)
    for encoding, version in readings:
        if encoding == "gptq_p" and bits != 3 and stated != (encoding, version):
            continue  # the words are v2's
        if encoding == "gptq_p" and bits == 3:
            symmetric = bool((qzeros == _planar_zeros(qzeros.shape[1])).all())
        else:
            symmetric = is_symmetric(qzeros, bits, version)
        if symmetric:
            return None if (encoding, version) == stated else (encoding, version)
    return None


def _with_version_for(
    settings: QuantizeConfig, layers: Layers, of_layer: Mapping[str, QuantizeConfig], reader: Reader
) -> QuantizeConfig:
    """Return settings in which zero points that were floating point can be stored: v1, unless one of them is 0."""
    low, symmetric = 1, True
    for name, (encoding, entries) in layers.items():
        if encoding == "gptq-for-llama":
            bits, place = of_layer[name].bits, (f"{name}.", str(entries["zeros"].file))
            check_float_zeros(shapes_of(entries), of_layer[name], *place)
            parts = reader.read_together((part, entries[part]) for part in ("scales", "zeros"))
            zeros = whole_zeros(parts, bits, *place)
            low = min(low, int(zeros.min()))
            symmetric = symmetric and bool((zeros == 1 << (bits - 1)).all())
    return with_values(settings, checkpoint_format="gptq" if low else "gptq_v2", sym=symmetric)


@functools.lru_cache(maxsize=16)
def _planar_zeros(words: int) -> Tensor:
    """Return a row of planar words in which every zero point is 4: of three words the third has all bits."""
    return torch.tensor([0, 0, -1], dtype=torch.int32).repeat(words // 3)


def check_layers(
    settings: QuantizeConfig, layers: Layers, tensors: Mapping[str, TensorEntry], reader: Reader
) -> tuple[dict[str, PackedLayer], list[str]]:
    """Return (name -> packed layer, warnings).

    Raises:
        FormatError: the first tensor that is not what the settings say.
    """
    of_layer, excluded = layer_settings(settings, layers)
    checked: dict[str, PackedLayer] = {}
    out_of_order = []
    for name, (found, entries) in layers.items():
        own = of_layer[name]
        encoding = ENCODINGS[encoding_of(settings, found)]
        prefix, file = f"{name}.", str(entries[encoding.parts[0]].file)
        if f"{name}.weight" in tensors:
            both = f"both {encoding.parts[0]} and weight"
            raise FormatError(f"{name}.weight", "a layer that is either packed or not", both, file)
        in_features, out_features = encoding.check(shapes_of(entries), own, prefix, file)
        values = reader.read_together((part, entries[part]) for part in encoding.small if part in entries)
        encoding.check_values(values, own, prefix, file)
        g_idx = values.get("g_idx")
        if g_idx is not None and not own.desc_act and not torch.equal(g_idx, _sequential(in_features, own.group_size)):
            out_of_order.append(name)
        checked[name] = PackedLayer(
            name, own, in_features, out_features, "bias" in entries, "g_idx" in entries, entries, encoding.name
        )
    warnings = _oddities(settings, tensors, checked, excluded)
    if out_of_order:
        warnings.append(
            f"desc_act is false, but {out_of_order[0]}.g_idx is not sequential ({len(out_of_order)} such layers); "
            "the tensors are followed"
        )
    return checked, warnings


@functools.lru_cache(maxsize=16)
def _sequential(in_features: int, group_size: int) -> Tensor:
    return sequential_g_idx(in_features, group_size)


def _oddities(
    settings: QuantizeConfig,
    tensors: Mapping[str, TensorEntry],
    layers: Mapping[str, PackedLayer],
    excluded: list[str],
) -> list[str]:
    """Return what the config says of which layers are packed and the tensors contradict; those are followed."""
    warnings = []
    if excluded:
        warnings.append(
            f"dynamic says that {excluded[0]} is not packed ({len(excluded)} such layers), but it is; "
            "the tensors are followed"
        )
    if settings.lm_head and not any(name.split(".")[-1] in ("lm_head", "embed_out") for name in layers):
        warnings.append("lm_head is true, but the output layer is not packed; the tensors are followed")
    kinds = {_kind(name) for name in layers}
    plain = [n.removesuffix(".weight") for n, e in tensors.items() if n.endswith(".weight") and len(e.shape) == 2]
    plain = [name for name in plain if _kind(name) in kinds]
    if plain and settings.dynamic:
        ruled = match_rules(settings.dynamic, plain, settings.source)
        plain = [name for name in plain if name not in ruled or not ruled[name].excludes]
    if plain:
        warnings.append(
            f"{plain[0]} is not packed, unlike its like in other blocks ({len(plain)} such layers); "
            "the tensors are followed"
        )
    return warnings


def _kind(name: str) -> str:
    """Return a layer's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name)
