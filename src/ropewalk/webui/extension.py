"""What webui sees in the extension's script.py: `params` and `setup`.

webui replaces the values of `params` by those of its settings.yaml, where `rope` is called `ropewalk-rope`; they are
what the options of the loader begin with. `model` is loaded once the extension is there, which is later than
webui's own `--model`: that wants the hook of `ropewalk webui run` or `install --at-start`.
"""

from __future__ import annotations

import importlib
from typing import Any

from ropewalk.errors import RopewalkError
from ropewalk.patches import webui
from ropewalk.patches.webui.options import OURS
from ropewalk.webui import install

params: dict[str, Any] = {"display_name": "Ropewalk", "model": "", **{name: value for name, (value, _) in OURS.items()}}


def setup() -> None:
    """Add the loader. What goes wrong is a line in webui's log, as webui runs without us, too."""
    logger = importlib.import_module("modules.logging_colors").logger
    try:
        logger.info(webui.apply())
        shared: Any = importlib.import_module("modules.shared")
        install.put_templates(shared.user_data_dir)
        _take_settings(shared)
        if params["model"] and shared.model is None and shared.model_name == "None":
            _load(shared, params["model"])
    except (RopewalkError, OSError) as error:
        logger.error(f"ropewalk: {error}")


def _take_settings(shared: Any) -> None:
    for name in OURS:
        if name not in shared.provided_arguments:
            setattr(shared.args, name, params[name])
            setattr(shared.original_args, name, params[name])


def _load(shared: Any, name: str) -> None:
    """Do what webui's server.py does for --model."""
    settings = importlib.import_module("modules.models_settings")
    models = importlib.import_module("modules.models")
    found = settings.get_model_metadata(name)
    settings.update_model_parameters(found, initial=True)
    if "instruction_template_str" in found:
        shared.settings["instruction_template_str"] = found["instruction_template_str"]
    shared.model, shared.tokenizer = models.load_model(name)
