"""What the loader can be told: options of webui's own that mean the same here, and a few more.

Ours stand in `shared.args` like webui's own: they can be given on the command line where the hook of `start.py` is
there, in the page, in "args" of /v1/internal/model/load, and in user_data/models/config-user.yaml.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

NAME = "Ropewalk"

# name -> (what it is by default, what --help and the page say of it)
OURS: dict[str, tuple[Any, str]] = {
    "rope": (
        "auto",
        "Rotary embedding: auto follows the model; or none, linear:2, ntk:2.5, dynamic:2, yarn:4, "
        "partial-ntk:factor=4,original=4096.",
    ),
    "device_map": (
        "",
        "Where the model goes: auto, balanced, sequential, cpu, cuda:1 or a JSON object from modules to devices. "
        "Empty: the GPU if there is one; auto where gpu-split or the CPU memory is given.",
    ),
    "cpu_layers": (0, "So many of the last layers compute on the CPU, the others on the GPU."),
    "cpu_mode": (
        os.environ.get("ROPEWALK_CPU_MODE", "int8"),
        "Packed layers on the CPU: int8 rounds activations to 8 bits in blocks of 32, exact does not.",
    ),
}
# Adapters to put on while the model is loaded: in the page what is chosen in webui's own list of LoRAs.
LORAS = "loras"

# What of the page belongs to the loader: ours and webui's own of the same meaning.
PARAMETERS = (*OURS, "ctx_size", "gpu_split", "cpu_memory", "attn_implementation", "load_in_4bit", "bf16", "cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ours to webui's parser, unless they are there."""
    if "ropewalk" in vars(parser):
        return
    vars(parser)["ropewalk"] = True
    group = parser.add_argument_group(NAME)
    for name, (default, text) in OURS.items():
        choices = ("int8", "exact") if name == "cpu_mode" else None
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=type(default), default=default, choices=choices, help=text)
    parser.set_defaults(**{LORAS: []})


def add_to(shared: Any) -> Callable[[], None]:
    """Put ours into `shared.args` and its copies where the command line has not; return what undoes that."""
    added = []
    for namespace in (shared.args, shared.original_args, shared.args_defaults):
        for name, value in {**{name: default for name, (default, _) in OURS.items()}, LORAS: []}.items():
            if not hasattr(namespace, name):
                setattr(namespace, name, value)
                added.append((namespace, name))

    def remove() -> None:
        for namespace, name in added:
            if hasattr(namespace, name):
                delattr(namespace, name)

    return remove


def list_model_elements(original: Any) -> Any:
    """Wrap the function that names the options of the Model tab."""

    @functools.wraps(original)
    def list_model_elements() -> list[str]:
        return [*original(), *OURS, LORAS]

    return list_model_elements


def fix_loader_name(original: Any) -> Any:
    """Wrap the function that knows the spellings of loaders, and turns what it does not know into None."""

    @functools.wraps(original)
    def fix_loader_name(name: Any) -> Any:
        return NAME if is_ours(name) else original(name)

    return fix_loader_name


def is_ours(name: Any) -> bool:
    """Tell whether a --loader means ours."""
    return isinstance(name, str) and name.lower() == NAME.lower()
