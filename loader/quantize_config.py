"""What a checkpoint says of its packing: quantize_config.json, or config.json's quantization_config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropewalk.errors import QuantizeConfigError
from ropewalk.gptq.format import BITS, FORMATS

# Where it may stand, first found wins; the last is the key of config.json.
FILES = ("quantize_config.json", "quant_config.json")
CONFIG_KEY = "quantization_config"

_SYNONYMS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size", "groupsize": "group_size"}


@dataclass(frozen=True)
class QuantizeConfig:
    """The settings that say how to read packed tensors.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: rows that share a scale, -1 for all.
        desc_act: whether rows were quantized in order of activation ("act-order").
        sym: whether zero points were meant to be symmetric; None where nothing says so.
        checkpoint_format: "gptq" (v1) or "gptq_v2".
        raw: the whole config as read, to be written back on saving.
        source: the file it was read from, or how it was inferred.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool | None
    checkpoint_format: str = "gptq"
    raw: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


def parse_quantize_config(raw: Any, source: object) -> QuantizeConfig:
    """Return the settings in a parsed JSON object.

    Raises:
        QuantizeConfigError: another method than GPTQ, or a value that GPTQ cannot hold.
    """
    if not isinstance(raw, dict):
        raise QuantizeConfigError(source, "a JSON object", type(raw).__name__)
    given = {_SYNONYMS.get(name, name): value for name, value in raw.items()}
    meta = given.get("meta")
    if isinstance(meta, dict):
        given = {**meta, **given}  # newer writers keep what does not matter for reading in there

    method = given.get("quant_method", "gptq")
    if method != "gptq":
        raise QuantizeConfigError(source, "quant_method gptq", repr(method))
    bits, group_size = given.get("bits"), given.get("group_size", -1)
    if isinstance(bits, bool) or bits not in BITS:
        raise QuantizeConfigError(source, f"bits {', '.join(map(str, BITS))}", repr(bits))
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise QuantizeConfigError(source, "group_size -1 or a positive number", repr(group_size))
    desc_act, sym = given.get("desc_act", False), given.get("sym")
    if not isinstance(desc_act, bool):
        raise QuantizeConfigError(source, "desc_act true or false", repr(desc_act))
    if sym is not None and not isinstance(sym, bool):
        raise QuantizeConfigError(source, "sym true or false", repr(sym))
    checkpoint_format = given.get("checkpoint_format") or given.get("format") or "gptq"
    if given.get("is_marlin_format") or checkpoint_format not in FORMATS:
        found = "marlin" if given.get("is_marlin_format") else checkpoint_format
        raise QuantizeConfigError(source, f"checkpoint_format {' or '.join(FORMATS)}", repr(found))
    return QuantizeConfig(bits, group_size, desc_act, sym, checkpoint_format, raw, str(source))


def read_quantize_config(folder: Path, config: Mapping[str, Any]) -> QuantizeConfig | None:
    """Return the settings of a folder, or None where nothing in it speaks of quantization.

    Raises:
        QuantizeConfigError: a file that cannot be read, or see `parse_quantize_config`.
    """
    for name in FILES:
        path = folder / name
        if path.is_file():
            return parse_quantize_config(read_json(path), path)
    if config.get(CONFIG_KEY) is not None:
        return parse_quantize_config(config[CONFIG_KEY], f"{folder / 'config.json'}: {CONFIG_KEY}")
    return None


def read_json(path: Path) -> Any:
    """Return a parsed JSON file.

    Raises:
        QuantizeConfigError: not UTF-8, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QuantizeConfigError(path, "a JSON file", error) from None
