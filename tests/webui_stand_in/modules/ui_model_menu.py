"""The Model tab."""

import traceback
from functools import partial

import gradio as gr
from modules import shared
from modules.LoRA import add_lora_to_model
from modules.models import load_model, unload_model
from modules.models_settings import get_model_metadata


def create_ui():
    with gr.Tab("Model"), gr.Column("options"):
        for name in ("ctx_size", "gpu_split", "cpu_memory", "cpu", "bf16", "load_in_4bit", "attn_implementation"):
            shared.gradio[name] = gr.Number(label=name, info="said of it.")
        shared.gradio["lora_menu"] = gr.Dropdown(label="LoRA(s)")
    shared.gradio["load_model"] = partial(load_model_wrapper, autoload=True)


def load_model_wrapper(selected_model, loader, autoload=False):
    settings = get_model_metadata(selected_model)
    if not autoload:
        yield f"{selected_model}: {settings['truncation_length_info']}"
        return
    try:
        unload_model()
        shared.model, shared.tokenizer = load_model(selected_model, loader)
        yield "loaded"
    except Exception:
        yield traceback.format_exc()


def load_lora_wrapper(selected_loras):
    add_lora_to_model(selected_loras)
    yield "applied"


def update_truncation_length(current_length, state):
    return current_length
