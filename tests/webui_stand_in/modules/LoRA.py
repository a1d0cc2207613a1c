"""Adapters."""

from pathlib import Path

import modules.shared as shared


def add_lora_to_model(lora_names):
    add_lora_transformers(lora_names)


def get_lora_path(lora_name):
    return Path(shared.args.lora_dir, Path(lora_name).name)


def add_lora_transformers(lora_names):
    shared.lora_names = ["theirs", *lora_names]
