"""Whether a name that transformers was given means a model that GPTQ packed, found out before anything of it is read.

A folder is asked by its configs, and where these say nothing by the headers of its weights; a repository of the Hub by
its config.json, and else by the names of its files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ropewalk.errors import RopewalkError
from ropewalk.loader import hub
from ropewalk.loader.encodings import find_layers
from ropewalk.loader.quantize_config import CONFIG_KEY, FILES, read_json
from ropewalk.loader.repository_files import MODEL, is_weights
from ropewalk.loader.source import HUB_NAME, Source, find_source
from ropewalk.loader.weight_files import bits_and_group_in, find_weights, read_tensors

# What transformers itself looks for. A pickle of that name is as large as a model, and takes long to look into.
_STANDARD = ("model.safetensors", "model.safetensors.index.json")
_STANDARD_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# What of a call to transformers says where on the Hub.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


def find_packed(name: Any, arguments: Mapping[str, Any], config: Any = None) -> Source | None:
    """Return where a packed model is on this machine, downloaded if it is one of the Hub; None for any other model.

    Args:
        name: a folder or user/name, as `from_pretrained` takes it.
        arguments: the others of that call.
        config: transformers' config of that model, where there is one already.

    Raises:
        HubError: a packed model that the Hub does not give.
    """
    if not is_packed(name, arguments, config):
        return None
    if Path(name).is_dir():
        return find_source(Path(name, arguments.get("subfolder") or ""))
    return find_source(str(name), **_of_hub(arguments))


def is_packed(name: Any, arguments: Mapping[str, Any], config: Any = None) -> bool:
    """Tell whether a name means a packed model; the arguments are those of `find_packed`."""
    if name == "":  # not the folder we are in
        return False
    try:
        path = Path(name)
        if path.is_dir():
            return _is_packed_folder(path / (arguments.get("subfolder") or ""))
        if path.exists() or not HUB_NAME.fullmatch(str(name)) or arguments.get("subfolder"):
            return False
        return _is_packed_repository(str(name), arguments, config)
    except (TypeError, OSError, ValueError, RopewalkError):
        return False  # whatever is wrong with it, transformers says so


def _is_packed_folder(folder: Path) -> bool:
    if any((folder / name).is_file() for name in FILES):
        return True
    config = read_json(folder / "config.json")
    stated = _stated(config)
    if stated is not None:
        return stated
    source = find_source(folder)
    weights = find_weights(folder, file=source.file)
    if any(file.name.startswith("pytorch_model") for file in weights.files):
        return False
    # A pickle takes long to look into, and such a name is that of a packed model.
    pickles = [file for file in weights.files if file.suffix != ".safetensors"]
    if any(bits_and_group_in(file.stem)[0] is not None for file in pickles):
        return True
    return bool(find_layers(read_tensors(weights)[0]))


def _stated(config: Any) -> bool | None:
    """Return whether a config.json says that GPTQ packed it; None where it says nothing."""
    stated = config.get(CONFIG_KEY) if isinstance(config, dict) else getattr(config, CONFIG_KEY, None)
    if stated is None:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return bool(str(getattr(method, "value", method)) == "gptq")


def _is_packed_repository(name: str, arguments: Mapping[str, Any], config: Any) -> bool:
    if config is None:
        from transformers.utils.hub import cached_file

        file = cached_file(
            name,
            "config.json",
            **_of_hub(arguments),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        config = None if file is None else read_json(Path(file))
        if config is None:
            return False
    stated = _stated(config)
    if stated is not None:
        return stated
    given = {key: value for key, value in _of_hub(arguments).items() if key != "revision"}
    options = {"token": None, "cache_dir": None, "local_files_only": None, "progress": False} | given
    return _look_packed(hub.names(hub.make_request(name, arguments.get("revision"), MODEL, **options)))


def _look_packed(names: Iterable[str]) -> bool:
    """Tell whether the files of a repository are those of a packed model of 2023, by their names."""
    names = [name for name in names if "/" not in name]
    if any(name in FILES for name in names):
        return True
    if any(name in (*_STANDARD, *_STANDARD_PICKLES) for name in names):
        return False
    return any(is_weights(name) and bits_and_group_in(Path(name).stem)[0] is not None for name in names)


def _of_hub(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
