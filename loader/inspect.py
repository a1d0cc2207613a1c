"""What is in a checkpoint, and what would be done with it; nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropewalk import cpu
from ropewalk.gptq.format import is_symmetric
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.rope import decide_rope


def inspect(model: str | Path, *, rope: str = "auto") -> dict[str, Any]:
    """Describe a checkpoint from its config and headers, after the same checks as `load` makes.

    Args:
        model: a local folder.
        rope: as `load` takes it.

    Returns:
        {"model", "format", "bits", "group_size", "desc_act", "sym", "architecture", "rope", "bytes", "kernels",
        "layers", "files", "warnings"}; format is "gptq", "gptq_v2" or "plain", and the four settings are
        None for "plain". Sizes are in bytes; "bits_per_weight" counts everything of the packed layers.

    Raises:
        CheckpointError, FormatError, RopeError: as `load` does.
    """
    checkpoint = open_checkpoint(model)
    decision = decide_rope(checkpoint.config, rope)
    settings = checkpoint.quantize_config
    layers = checkpoint.packed_layers()
    packed = sum(entry.nbytes for layer in layers for entry in checkpoint.layer_entries(layer).values())
    total = checkpoint.nbytes()
    architectures = checkpoint.config.get("architectures") or [checkpoint.config["model_type"]]
    return {
        "model": str(checkpoint.folder),
        "format": settings.checkpoint_format if settings else "plain",
        "bits": settings.bits if settings else None,
        "group_size": settings.group_size if settings else None,
        "desc_act": settings.desc_act if settings else None,
        "sym": _is_symmetric(checkpoint, layers) if settings else None,
        "architecture": architectures[0],
        "rope": decision.as_dict(),
        "bytes": {
            "total": total,
            "packed": packed,
            "other": total - packed,
            "bits_per_weight": round(packed * 8 / _weights(checkpoint, layers), 3) if layers else None,
        },
        "kernels": kernels(),
        "layers": {"packed": len(layers)},
        "files": [file.name for file in checkpoint.files],
        "warnings": [*checkpoint.warnings, *decision.warnings],
    }


def kernels() -> dict[str, str]:
    """Return which implementation serves a packed matmul and a rotary embedding on each device."""
    compiled = cpu.status()["state"] in ("loaded", "built", "not built")
    return {"cpu": "c++" if compiled else "torch", "cuda": "triton"}


def _weights(checkpoint: Checkpoint, layers: list[str]) -> int:
    """Return how many weights the packed layers hold: their words hold 32 bits each."""
    assert checkpoint.quantize_config is not None
    words = 0
    for layer in layers:
        rows, columns = checkpoint.tensors[f"{layer}.qweight"].shape
        words += rows * columns
    return words * 32 // checkpoint.quantize_config.bits


def _is_symmetric(checkpoint: Checkpoint, layers: list[str]) -> bool:
    """Tell what the zero points say, whatever the config does."""
    settings = checkpoint.quantize_config
    assert settings is not None
    return all(
        is_symmetric(checkpoint.read(f"{layer}.qzeros"), settings.bits, settings.checkpoint_format) for layer in layers
    )
