"""What is known of a model before it is loaded."""

import json

from modules import loaders, shared
from modules.utils import resolve_model_path


def get_model_metadata(model):
    folder = resolve_model_path(model)
    config = folder / "config.json"
    stated = json.loads(config.read_text()) if config.exists() else {}
    method = (stated.get("quantization_config") or {}).get("quant_method")
    found = {"ctx_size": 8192, "truncation_length_info": shared.settings["truncation_length"]}
    found["loader"] = infer_loader(model, found, hf_quant_method=method)
    longest = stated.get("max_position_embeddings")
    if longest:
        found.update(truncation_length=longest, truncation_length_info=longest, ctx_size=min(longest, 8192))
    found["instruction_template"] = "Alpaca"
    found.update(shared.user_config.get(model, {}))
    found["instruction_template_str"] = load_instruction_template(found["instruction_template"])
    return found


def load_instruction_template(template):
    file = shared.user_data_dir / "instruction-templates" / f"{template}.yaml"
    return file.read_text() if file.is_file() else ""


def infer_loader(model_name, model_settings, hf_quant_method=None):
    folder = resolve_model_path(model_name)
    if not folder.exists():
        return None
    return "llama.cpp" if list(folder.glob("*.gguf")) else "Transformers"


def update_model_parameters(state, initial=False):
    for element in loaders.list_model_elements():
        if element in state and not (initial and element in shared.provided_arguments):
            setattr(shared.args, element, state[element])
