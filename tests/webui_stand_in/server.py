"""Starts as webui does: arguments, then the model, then the extensions; then says what came of it in JSON."""

import json

from modules import shared, utils  # noqa: F401
from modules.LoRA import add_lora_to_model
from modules.models import load_model, unload_model
from modules.models_settings import get_model_metadata, update_model_parameters

if __name__ == "__main__":
    if shared.args.model is not None:
        shared.model_name = shared.args.model
        update_model_parameters(get_model_metadata(shared.model_name), initial=True)
        shared.model, shared.tokenizer = load_model(shared.model_name)
        if shared.args.lora:
            add_lora_to_model(shared.args.lora)
    shared.generation_lock = object()
    if shared.args.extensions:
        from modules import extensions, ui_model_menu

        extensions.load_extensions()
        ui_model_menu.create_ui()
    found = {
        "loader": shared.args.loader,
        "model": type(shared.model).__name__,
        "context": shared.settings["truncation_length"],
        "elements": sorted(shared.gradio),
    }
    unload_model()
    print(json.dumps(found))
