"""Paths."""

from pathlib import Path

from modules import shared


def resolve_model_path(model_name_or_path, image_model=False):
    given = Path(model_name_or_path)
    return given if given.exists() else Path(shared.args.model_dir, model_name_or_path)
