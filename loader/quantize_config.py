"""What a checkpoint says of its packing: quantize_config.json, quant_config.json, config.json's quantization_config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ropewalk.errors import QuantizeConfigError
from ropewalk.gptq.format import BITS
from ropewalk.loader.dynamic import Rule, parse_dynamic
from ropewalk.loader.safetensors_file import MAX_HEADER, is_moderate

# Where it may stand; the last is the key of config.json.
FILES = ("quantize_config.json", "quant_config.json")
CONFIG_KEY = "quantization_config"

_SYNONYMS = {
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "groupsize": "group_size",
    "method": "quant_method",
    "format": "checkpoint_format",
}
# checkpoint_format -> (encoding on disk, the version of the zero points once they are read).
_FORMATS = {"gptq": ("gptq", "gptq"), "gptq_v2": ("gptq", "gptq_v2")}
_FORMATS |= {"gptq_p": ("gptq_p", "gptq_v2"), "marlin": ("marlin", "gptq")}
_AWQ = ("gemm", "gemv", "gemv_fast", "llm-awq")  # what AutoAWQ calls its `version`
_PER_LAYER = ("bits", "group_size", "desc_act", "sym")


@dataclass(frozen=True)
class QuantizeConfig:
    """The settings that say how to read packed tensors.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: rows that share a scale, -1 for all.
        desc_act: whether rows were quantized in order of activation ("act-order").
        sym: whether zero points were meant to be symmetric; None where nothing says so.
        checkpoint_format: "gptq" (v1) or "gptq_v2", of the zero points as they are when a layer has been read.
        raw: the whole config, to be written back on saving, in the words of the layout that layers are read into.
        source: the file it was read from, or how it was inferred.
        encoding: how layers lie on disk by this config, a key of `ropewalk.loader.encodings.ENCODINGS`.
        static_groups: whether act-order left the rows in their groups, so that g_idx is sequential.
        lm_head: whether the output layer is said to be packed.
        dynamic: what differs between layers.
        stated: names of the attributes that the config gives, rather than leaves to their defaults.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool | None
    checkpoint_format: str = "gptq"
    raw: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    encoding: str = "gptq"
    static_groups: bool = False
    lm_head: bool = False
    dynamic: tuple[Rule, ...] = ()
    stated: frozenset[str] = frozenset()


def parse_quantize_config(raw: Any, source: object) -> QuantizeConfig:
    """Return the settings in a parsed JSON object.

    Raises:
        QuantizeConfigError: another method than GPTQ, a value that GPTQ cannot hold, or two names of one setting
            with different values.
    """
    if not isinstance(raw, dict):
        raise QuantizeConfigError(source, "a JSON object", type(raw).__name__)
    given = _by_one_name(raw, source)
    written_as = _format(given, source)
    encoding, checkpoint_format = _FORMATS[written_as]
    pack_dtype = given.get("pack_dtype")
    if pack_dtype is not None and str(pack_dtype).removeprefix("torch.") != "int32":
        raise QuantizeConfigError(source, "pack_dtype int32, the words that GPTQ checkpoints use", repr(pack_dtype))

    stated = {name for name in (*_PER_LAYER, "checkpoint_format") if given.get(name) is not None}
    given.setdefault("group_size", -1)
    values = {name: _value(name, given.get(name), source) for name in _PER_LAYER}
    meta = given.get("meta")
    static_groups = given.get("static_groups", meta.get("static_groups") if isinstance(meta, dict) else None)
    if encoding == "marlin":
        _check_marlin(values, source)
        values["sym"] = True
    dynamic = parse_dynamic(given.get("dynamic"), source)
    for rule in dynamic:
        where = f"{source}: dynamic {rule.text!r}"
        _check_overrides(rule.overrides, written_as, where)
    settings = QuantizeConfig(
        **values,
        checkpoint_format=checkpoint_format,
        raw={name: value for name, value in raw.items() if _SYNONYMS.get(name) not in ("bits", "group_size")},
        source=str(source),
        encoding=encoding,
        static_groups=static_groups is True,
        lm_head=given.get("lm_head") is True,
        dynamic=dynamic,
        stated=frozenset(stated),
    )
    return with_values(settings)


def with_values(settings: QuantizeConfig, **changes: Any) -> QuantizeConfig:
    """Return settings with some of them changed, in the attributes and in `raw`.

    Args:
        changes: bits, group_size, desc_act, sym, checkpoint_format, source.
    """
    settings = replace(settings, **changes)
    raw = dict(settings.raw)
    raw["bits"], raw["group_size"] = settings.bits, settings.group_size
    for name in ("desc_act", "sym"):
        if name in changes or (name in raw and raw[name] is None) or settings.encoding == "marlin":
            raw[name] = getattr(settings, name)
    for name in ("checkpoint_format", "format"):
        if name in raw or (name == "checkpoint_format" and settings.checkpoint_format != "gptq"):
            raw[name] = settings.checkpoint_format
    if raw.get("is_marlin_format"):
        del raw["is_marlin_format"]
    for name in ("quant_method", "method"):
        if name in raw:
            raw[name] = "gptq"
    return replace(settings, raw=raw)


def for_layer(settings: QuantizeConfig, rule: Rule) -> QuantizeConfig:
    """Return the settings of a layer that a rule of `dynamic` is about; `raw` stays the checkpoint's."""
    changes = {name: rule.overrides[name] for name in _PER_LAYER if rule.overrides.get(name) is not None}
    return replace(settings, **changes)


def _by_one_name(raw: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return the config with one name for each setting."""
    given: dict[str, Any] = {}
    said_as: dict[str, str] = {}
    for name, value in raw.items():
        one = _SYNONYMS.get(name, name)
        if one in given and value is not None and given[one] is not None and given[one] != value:
            found = f"{said_as[one]} {given[one]!r} and {name} {value!r}"
            raise QuantizeConfigError(source, f"one value for {one}", found)
        if given.get(one) is None:
            given[one], said_as[one] = value, name
    return given


def _format(given: Mapping[str, Any], source: object) -> str:
    """Return the checkpoint format that a config names."""
    method = given.get("quant_method", "gptq")
    version = given.get("version")
    if isinstance(version, str) and version.lower() in _AWQ:
        raise QuantizeConfigError(source, "quant_method gptq", f"AWQ's version {version!r}")
    method = method.lower() if isinstance(method, str) else method
    if method not in ("gptq", "marlin", None):
        raise QuantizeConfigError(source, "quant_method gptq", repr(method))
    name = given.get("checkpoint_format") or "gptq"
    if given.get("is_marlin_format") or method == "marlin":
        if name not in ("gptq", "marlin"):  # AutoGPTQ writes "gptq" beside is_marlin_format
            raise QuantizeConfigError(source, "one checkpoint_format", f"{name!r} and is_marlin_format")
        name = "marlin"
    if not isinstance(name, str) or name.lower() not in _FORMATS:
        raise QuantizeConfigError(source, f"checkpoint_format {', '.join(_FORMATS)}", repr(name))
    return name.lower()


def _value(name: str, value: Any, source: object) -> Any:
    """Return a checked setting."""
    if name == "bits" and (type(value) is not int or value not in BITS):
        raise QuantizeConfigError(source, f"bits {', '.join(map(str, BITS))}", repr(value))
    if name == "group_size" and (type(value) is not int or (value < 1 and value != -1)):
        raise QuantizeConfigError(source, "group_size -1 or a positive number", repr(value))
    if name in ("desc_act", "sym") and value is not None and not isinstance(value, bool):
        raise QuantizeConfigError(source, f"{name} true or false", repr(value))
    return bool(value) if name == "desc_act" else value


def _check_overrides(overrides: Mapping[str, Any], written_as: str, where: str) -> None:
    for name in _PER_LAYER:
        if overrides.get(name) is not None:
            _value(name, overrides[name], where)
    other = [n for n in ("format", "checkpoint_format") if overrides.get(n) not in (None, written_as)]
    if other or str(overrides.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        name = other[0] if other else "pack_dtype"
        raise QuantizeConfigError(where, f"the same {name} for every layer", repr(overrides[name]))


def _check_marlin(values: Mapping[str, Any], source: object) -> None:
    if values["bits"] != 4:
        raise QuantizeConfigError(source, "bits 4 in a Marlin checkpoint", values["bits"])
    if values["sym"] is False:
        raise QuantizeConfigError(source, "sym true in a Marlin checkpoint, which holds no zero points", "false")


def read_quantize_configs(folder: Path, config: Mapping[str, Any]) -> tuple[list[QuantizeConfig], list[str]]:
    """Return the settings of every place in a folder that has some, those that count most first; and warnings of
    files that are not JSON, which count as missing.

    Raises:
        QuantizeConfigError: settings that cannot be, see `parse_quantize_config`.
    """
    found, warnings = [], []
    for path in (folder / name for name in FILES):
        if not path.is_file():
            continue
        try:
            raw = read_json(path)
            if not isinstance(raw, dict):
                raise QuantizeConfigError(path, "a JSON object", type(raw).__name__)
        except QuantizeConfigError as error:
            warnings.append(f"{error}; the file is not used")
        else:
            found.append(parse_quantize_config(raw, path))
    if config.get(CONFIG_KEY) is not None:
        found.append(parse_quantize_config(config[CONFIG_KEY], f"{folder / 'config.json'}: {CONFIG_KEY}"))
    return found, warnings


def read_json(path: Path) -> Any:
    """Return a parsed JSON file.

    Raises:
        QuantizeConfigError: not a file that can be read, not UTF-8, not JSON, or more of it than there should be.
    """
    try:
        if not path.is_file():
            raise QuantizeConfigError(path, "a JSON file", "none that is an ordinary file")
        size = path.stat().st_size
        if size > MAX_HEADER:
            raise QuantizeConfigError(path, f"a JSON file of at most {MAX_HEADER} bytes", size)
        text = path.read_bytes()
        if not is_moderate(text):
            raise QuantizeConfigError(path, "a JSON file of a moderate number of values", "one of more")
        return json.loads(text.decode("utf-8"))
    except OSError as error:
        raise QuantizeConfigError(path, "a JSON file that can be read", error.strerror) from None
    except QuantizeConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise QuantizeConfigError(path, "a JSON file", error) from None
