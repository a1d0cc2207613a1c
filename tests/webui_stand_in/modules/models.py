"""Models."""

import gc

import modules.shared as shared
from modules.models_settings import get_model_metadata


class Theirs:
    """A model that webui has loaded without us."""

    def __init__(self, name):
        self.name = name


def load_model(model_name, loader=None):
    shared.model_name = model_name
    shared.args.loader = loader or shared.args.loader or get_model_metadata(model_name)["loader"]
    return {"Transformers": Theirs, "llama.cpp": Theirs}[shared.args.loader](model_name), "tokenizer"


def unload_model(keep_model_name=False):
    shared.model = shared.tokenizer = None
    shared.lora_names = []
    gc.collect()
    if not keep_model_name:
        shared.model_name = "None"


def reload_model():
    unload_model(keep_model_name=True)
    shared.model, shared.tokenizer = load_model(shared.model_name)
