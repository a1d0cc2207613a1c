"""A packed model's weights unpacked to float16, in a folder beside it: for programs that hold no packed ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ropewalk.bench.model import RECIPE, PackedModel, make_once
from ropewalk.bench.random_model import write_tokenizer
from ropewalk.loader.write import write_json, write_weights
from ropewalk.terminal import size

FLOAT16_SHARD = 2_000_000_000  # bytes: the folder is made with one in memory


def float16_bytes(model: PackedModel) -> int:
    """Return the size of a model with its weights unpacked to float16."""
    return 2 * model.shape.parameters()


def no_disk_for_float16(model: PackedModel) -> str | None:
    """Return that the disk has no room for the folder, or None where it has, or the folder is there."""
    left = shutil.disk_usage(model.folder).free
    if _float16_path(model).is_dir() or 1.1 * float16_bytes(model) <= left:
        return None
    return f"needs {size(float16_bytes(model))} on the disk with the models; {size(left)} are left"


def float16_folder(model: PackedModel) -> Path:
    """Return the folder with a model's weights unpacked to float16; make it where it is not there."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        shape = model.shape
        for name in (*shape.embeddings, *shape.norms(), *shape.routers()):
            yield name, model.checkpoint.read(name)
        for layer, _, _ in model.shape.linears():
            yield f"{layer}.weight", model.weight(layer).dense().to(torch.float16).t().contiguous()

    def write(work: Path) -> None:
        write_weights(tensors(), work, FLOAT16_SHARD)
        write_tokenizer(model.shape, work)
        write_json(work / "config.json", model.shape.config())

    make_once(_float16_path(model), write)
    return _float16_path(model)


def _float16_path(model: PackedModel) -> Path:
    return model.folder.parent / f"{model.folder.name}-float16-{RECIPE}"
