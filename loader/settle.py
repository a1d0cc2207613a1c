"""Which settings a checkpoint is read by: what its configs say, what the user says, and what its tensors prove."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ropewalk.errors import FormatError, QuantizeConfigError
from ropewalk.gptq.format import BITS, infer_features, is_sequential, is_symmetric
from ropewalk.loader.dynamic import match_rules
from ropewalk.loader.encodings import ENCODINGS, shapes_of
from ropewalk.loader.quantize_config import QuantizeConfig, for_layer, parse_quantize_config, with_values
from ropewalk.loader.safetensors_file import TensorEntry
from ropewalk.loader.weight_files import bits_and_group_in

Layers = Mapping[str, tuple[str, dict[str, TensorEntry]]]  # as `find_layers` returns them
Read = Callable[[str], Tensor]

_COMMON = (16, 32, 64, 128, 256, 512, 1024)  # group sizes that people use
# Keys of config.json whose values are how many inputs a linear layer has.
_SIZES = ("hidden_size", "intermediate_size", "ffn_dim", "n_embd", "n_inner", "d_model", "d_ff")


def layer_settings(settings: QuantizeConfig, layers: Layers) -> tuple[dict[str, QuantizeConfig], list[str]]:
    """Return (layer -> its settings, with what `dynamic` changes; the layers that `dynamic` excludes).

    Raises:
        QuantizeConfigError: patterns that cannot be matched.
    """
    ruled = match_rules(settings.dynamic, layers, settings.source) if settings.dynamic else {}
    changed = {rule.text: for_layer(settings, rule) for rule in settings.dynamic if not rule.excludes}
    of_layer = {name: changed.get(ruled[name].text, settings) if name in ruled else settings for name in layers}
    return of_layer, [name for name, rule in ruled.items() if rule.excludes]


def encoding_of(settings: QuantizeConfig, found: str) -> str:
    """Return the encoding of a layer: as its tensors are called, and where they do not tell, as the config says."""
    return "gptq_p" if found == "gptq" and settings.encoding == "gptq_p" else found


def settle(
    sources: Sequence[QuantizeConfig], layers: Layers, bits: int | None, group_size: int | None
) -> tuple[QuantizeConfig, list[str]]:
    """Return (the settings that count, warnings).

    Args:
        sources: what each config says, the first counts most; at least one.
        bits, group_size: what the user says, which counts more.

    Raises:
        QuantizeConfigError: configs that differ in what the tensors do not tell.
    """
    settings, warnings = sources[0], []
    asked = {"bits": bits, "group_size": group_size}
    for other in sources[1:]:
        if "checkpoint_format" in settings.stated & other.stated and _said(settings) != _said(other):
            if "marlin" not in (_said(settings), _said(other)):  # the tensors' names tell that
                expected = f"checkpoint_format {_said(settings)}, as in {settings.source}"
                raise QuantizeConfigError(other.source, expected, _said(other))
            warnings.append(f"{settings.source} says {_said(settings)}, {other.source} {_said(other)}")
        if _fits(other, layers) and not _fits(settings, layers):
            settings, other = other, settings
        for name in ("bits", "group_size", "desc_act"):
            ours, theirs = getattr(settings, name), getattr(other, name)
            if name in settings.stated & other.stated and ours != theirs and asked.get(name) is None:
                used = f"{name} {ours} of {settings.source} is used"
                warnings.append(f"the configs differ: {used}, not {theirs} of {other.source}")
    for name, value in asked.items():
        if value is not None and value != getattr(settings, name):
            warnings.append(f"{name} {value} was asked for; {settings.source} says {getattr(settings, name)}")
            settings = with_values(settings, **{name: value})
    return settings, warnings


def _said(settings: QuantizeConfig) -> str:
    return settings.encoding if settings.encoding != "gptq" else settings.checkpoint_format


def _fits(settings: QuantizeConfig, layers: Layers) -> bool:
    of_layer, _ = layer_settings(settings, layers)
    try:
        for name, (found, entries) in layers.items():
            ENCODINGS[encoding_of(settings, found)].check(shapes_of(entries), of_layer[name], "", "")
    except FormatError:
        return False
    return True


def infer(
    layers: Layers, config: Mapping[str, Any], read: Read, bits: int | None, group_size: int | None
) -> tuple[QuantizeConfig, list[str]]:
    """Draw the settings from the tensors, where they leave no choice, and else from the name of the file.

    Args:
        layers: at least one.
        config: config.json.
        read: returns a tensor by its name.
        bits, group_size: what the user says.

    Returns:
        (settings, warnings).

    Raises:
        QuantizeConfigError: what would have to be guessed.
        FormatError: no layer that has all its tensors.
    """
    layers = _whole_layers(layers)
    name, (encoding, entries) = next(iter(layers.items()))
    file = next(iter(entries.values())).file
    named = file.name if bits_and_group_in(file.stem)[0] else file.parent.name
    named_bits, named_group = bits_and_group_in(Path(named).stem if named == file.name else named)
    why = []
    if bits is None:
        bits, how = _infer_bits(layers, config, named_bits, file)
        why.append(f"bits {bits} ({how or f'by the name {named}'})")
    if group_size is None:
        group_size, how = _infer_group_size(layers, bits, named_group, file, read)
        why.append(f"group_size {group_size} ({how or f'by the name {named}'})")
    sequential = all(
        "g_idx" not in parts or is_sequential(read(f"{layer}.g_idx"), group_size)
        for layer, (_, parts) in layers.items()
    )
    symmetric = {"gptq": True, "gptq_v2": False}
    if encoding == "gptq" and "qzeros" in entries:
        qzeros = read(f"{name}.qzeros")
        symmetric = {version: is_symmetric(qzeros, bits, version) for version in symmetric}
    version = "gptq_v2" if symmetric["gptq_v2"] and not symmetric["gptq"] else "gptq"
    raw = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": not sequential,
        "sym": any(symmetric.values()),
        "checkpoint_format": "marlin" if encoding == "marlin" else version,
        "quant_method": "gptq",
    }
    why.append(f"desc_act {str(not sequential).lower()}")
    if not any(symmetric.values()):
        why.append("zero points stored less one, as in v1")
    settings = replace(parse_quantize_config(raw, file), source=f"inferred from {file.name}")
    return settings, [f"no quantize_config.json: {', '.join(why)} inferred from {name}"] if why else []


def _whole_layers(layers: Layers) -> Layers:
    """Return the layers with all their tensors, which alone tell something; what the others lack is said later.

    Raises:
        FormatError: there are none.
    """
    faults = {}
    for name, (encoding, parts) in layers.items():
        needed = [part for part in ENCODINGS[encoding].parts if part not in ("g_idx", "bias")]
        expected = dict.fromkeys(needed, 2) | ({"g_idx": 1} if "g_idx" in parts else {})
        for part, dims in expected.items():
            shape = parts[part].shape if part in parts else None
            if shape is None or len(shape) != dims or 0 in shape:
                faults[name] = FormatError(
                    f"{name}.{part}",
                    f"a tensor of {dims} dimensions" if dims > 1 else "a vector",
                    "none" if shape is None else f"shape {list(shape)}",
                    str(next(iter(parts.values())).file),
                )
    if len(faults) == len(layers):
        raise next(iter(faults.values()))
    return {name: layer for name, layer in layers.items() if name not in faults}


def _infer_bits(layers: Layers, config: Mapping[str, Any], named: int | None, file: Path) -> tuple[int, str]:
    """Return the bits, and how they are known; "" for by a name."""
    encoding, entries = next(iter(layers.values()))
    if encoding == "marlin":
        return 4, "as ever in Marlin checkpoints"
    expected = "a quantize_config.json, or bits="
    if encoding == "gptq":
        columns, words = (entries[part].shape[1] for part in ("scales", "qzeros"))
        found_bits = next((b for b in BITS if columns * b == words * 32), None)
        if found_bits is None:
            found = f"none, and {words} words of zero points for {columns} columns in {file.name}"
            raise QuantizeConfigError(file.parent, expected, found)
        return found_bits, "by the shapes"
    # Zero points in floating point: only the number of inputs tells how many codes are in a word.
    sizes = {size for key in _SIZES if type(size := config.get(key)) is int}
    rows = {parts["qweight"].shape[0] for _, parts in layers.values() if "qweight" in parts}
    possible = [b for b in BITS if sizes and all(n * 32 % b == 0 and n * 32 // b in sizes for n in rows)]
    if named is not None and (named in possible or not possible):
        return named, ""
    if len(possible) == 1:
        return possible[0], "by the sizes in config.json"
    raise QuantizeConfigError(file.parent, expected, f"none, and a choice of {possible or list(BITS)} for {file.name}")


def _infer_group_size(layers: Layers, bits: int, named: int | None, file: Path, read: Read) -> tuple[int, str]:
    """Return the group size, and how it is known; "" for by a name."""
    sizes = set()  # (rows, groups)
    ordered = None  # the first layer whose g_idx tells
    for name, (encoding, parts) in layers.items():
        if encoding == "gptq-for-llama":
            continue
        if encoding == "marlin":
            rows, groups = parts["B"].shape[0] * 16, parts["s"].shape[0]
        else:
            try:
                rows, groups = infer_features(parts["qweight"].shape, bits)[0], parts["scales"].shape[0]
            except FormatError as error:
                raise FormatError(f"{name}.qweight", error.expected, error.found, str(file)) from None
            if groups > 1 and "g_idx" in parts and parts["g_idx"].dtype_name == "I32":
                ordered = ordered or name
        sizes.add((rows, groups))
    if all(groups == 1 for _, groups in sizes):
        return -1, "one row of scales"

    def fits(group_size: int) -> bool:
        return group_size > 0 and all(math.ceil(rows / group_size) == groups for rows, groups in sizes)

    if ordered is not None:
        g_idx = read(f"{ordered}.g_idx")
        counted = int((g_idx == 0).sum())  # of the groups only the last may have fewer rows
        if fits(counted):
            return counted, "by g_idx"
    if named is not None and fits(named):
        return named, ""
    whole = {rows // groups for rows, groups in sizes if groups > 1 and rows % groups == 0}
    fitting = [g for g in sorted(whole | set(_COMMON)) if fits(g)]
    even = [g for g in fitting if g in _COMMON and all(rows % g == 0 for rows, groups in sizes if groups > 1)]
    if len(even or fitting) != 1:
        rows, groups = next((rows, groups) for rows, groups in sizes if groups > 1)
        expected = "a quantize_config.json, or group_size="
        raise QuantizeConfigError(file.parent, expected, f"none, and {groups} groups of {rows} rows in {file.name}")
    return (even or fitting)[0], "by the shapes"
