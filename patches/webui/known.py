"""What is known of text-generation-webui: the functions that are replaced or called, and how its version is found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ropewalk.errors import PatchError
from ropewalk.patches.replace import expect_arguments
from ropewalk.patches.webui.options import NAME

PACKAGE = "text-generation-webui"
TESTED = "4.7.3"

# module -> function -> the arguments that it begins with
SIGNATURES: dict[str, dict[str, list[str]]] = {
    "models": {"load_model": ["model_name", "loader"], "unload_model": []},
    "models_settings": {
        "infer_loader": ["model_name", "model_settings", "hf_quant_method"],
        "get_model_metadata": ["model"],
        "load_instruction_template": ["template"],
    },
    "LoRA": {"add_lora_transformers": ["lora_names"], "get_lora_path": ["lora_name"]},
    "loaders": {"list_model_elements": [], "get_all_params": [], "list_all_samplers": []},
    "shared": {"fix_loader_name": ["name"]},
    "utils": {"resolve_model_path": ["model_name_or_path"]},
}
ATTRIBUTES = ("args", "original_args", "args_defaults", "provided_arguments", "settings", "gradio", "generation_lock")
TABLES = {"loaders_and_params": "Transformers", "loaders_samplers": "Transformers"}
# of the module ui_model_menu, which is there only where there is a page
PAGE: dict[str, list[str]] = {
    "create_ui": [],
    "load_model_wrapper": ["selected_model", "loader", "autoload"],
    "load_lora_wrapper": ["selected_loras"],
    "update_truncation_length": ["current_length", "state"],
}


def check(modules: dict[str, Any]) -> None:
    """Compare webui with what is known of it.

    Raises:
        PatchError: a function or table that is not there, or is another.
    """
    for module, functions in SIGNATURES.items():
        for function, arguments in functions.items():
            expect_function(modules[module], function, arguments)
    for name in ATTRIBUTES:
        if not hasattr(modules["shared"], name):
            raise PatchError(known_as(), f"modules.shared.{name}", "none")
    for table, key in TABLES.items():
        found = getattr(modules["loaders"], table, None)
        if not isinstance(found, dict) or key not in found:
            raise PatchError(known_as(), f"modules.loaders.{table} with {key!r}", type(found).__name__)
        if NAME in found:
            raise PatchError(known_as(), f"no loader named {NAME} yet", f"one in modules.loaders.{table}")


def expect_function(module: Any, name: str, arguments: list[str]) -> None:
    """See that a module of webui has a function with the arguments that are known here.

    Raises:
        PatchError: it has not.
    """
    function = getattr(module, name, None)
    if not callable(function):
        raise PatchError(known_as(), f"a function {module.__name__}.{name}", "none")
    expect_arguments(known_as(), f"{module.__name__}.{name}", function, arguments)


def known_as() -> str:
    """Return webui's name with its version, for messages."""
    return f"{PACKAGE} {version() or ''}".strip()


def version() -> str | None:
    """Return webui's version: the tag or else the commit that its git folder names; no file of its own has one."""
    shared = sys.modules.get("modules.shared")
    root = Path(shared.__file__).parents[1] if shared is not None and shared.__file__ else Path()
    if not is_webui(root):
        return None
    try:
        head = (root / ".git/HEAD").read_text(encoding="ascii").strip()
        packed = root / ".git/packed-refs"
        lines = [line.split() for line in packed.read_text(encoding="utf-8").splitlines()] if packed.is_file() else []
        refs = {line[1]: line[0] for line in lines if len(line) == 2}
        if head.startswith("ref: "):
            name = head.removeprefix("ref: ")
            loose = root / ".git" / name
            head = loose.read_text(encoding="ascii").strip() if loose.is_file() else refs[name]
        tags = [name for name, commit in refs.items() if commit == head and name.startswith("refs/tags/v")]
        return tags[-1].removeprefix("refs/tags/v") if tags else head[:8]
    except (OSError, KeyError, ValueError):
        return "of an unknown version"


def is_webui(folder: Path) -> bool:
    """Tell whether a folder is that of a webui."""
    return (folder / "server.py").is_file() and (folder / "modules/shared.py").is_file()
