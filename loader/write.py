"""Write tensors and JSON into a model's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5_000_000_000


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or, above `shard_bytes`, several files and their index; one is in memory at a time."""
    shards: list[tuple[Path, list[str]]] = []
    batch: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(batch, path, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; a model is as public as its folder.
        path.chmod(folder.stat().st_mode & 0o666)
        shards.append((path, list(batch)))
        batch.clear()

    for name, tensor in tensors:
        if batch and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        batch[name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for i, (path, names) in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        path.rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as transformers does: indented, with a line's end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
