"""What is in a checkpoint, and what would be done with it; nothing is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropewalk import cpu
from ropewalk.gptq import few_tokens
from ropewalk.gptq.format import is_symmetric
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.rope import RopeDecision, decide_rope
from ropewalk.loader.source import find_source


def inspect(
    model: str | Path,
    *,
    rope: str = "auto",
    bits: int | None = None,
    group_size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint from its config and headers, after the same checks as `load` makes.

    Args:
        model, revision, token, cache_dir, local_files_only: as `load` takes them.
        rope, bits, group_size: as `load` takes them.

    Returns:
        {"model", "format", "bits", "group_size", "desc_act", "sym", "architecture", "rope", "bytes", "kernels",
        "layers", "files", "warnings"}; format is how it lies on disk: "gptq", "gptq_v2", "gptq_p", "marlin",
        "gptq-for-llama" (zero points in floating point) or "plain", and the four settings are None for "plain".
        Sizes are in bytes; "bits_per_weight" counts everything of the packed layers.

    Raises:
        CheckpointError, FormatError, RopeError: as `load` does.
    """
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return describe(*open_model(model, rope=rope, bits=bits, group_size=group_size, **where))


def open_model(
    model: str | Path, *, rope: str = "auto", bits: int | None = None, group_size: int | None = None, **where: Any
) -> tuple[Checkpoint, RopeDecision]:
    """Return a checkpoint, checked, and its rope; arguments and errors are those of `inspect`."""
    source = find_source(model, **where)
    checkpoint = open_checkpoint(source.folder, file=source.file, bits=bits, group_size=group_size)
    return checkpoint, decide_rope(checkpoint.config, rope, checkpoint.folder / "config.json")


def describe(checkpoint: Checkpoint, decision: RopeDecision) -> dict[str, Any]:
    """Return what `inspect` returns, of a checkpoint that is open."""
    settings = checkpoint.quantize_config
    packed = sum(layer.nbytes() for layer in checkpoint.layers.values())
    total = checkpoint.nbytes()
    return {
        "model": str(checkpoint.folder),
        "format": _format(checkpoint),
        "bits": settings.bits if settings else None,
        "group_size": settings.group_size if settings else None,
        "desc_act": settings.desc_act if settings else None,
        "sym": _is_symmetric(checkpoint) if settings else None,
        "architecture": _architecture(checkpoint.config),
        "rope": decision.as_dict(),
        "bytes": {
            "total": total,
            "packed": packed,
            "other": total - packed,
            "bits_per_weight": round(packed * 8 / _weights(checkpoint), 3) if checkpoint.layers else None,
        },
        "kernels": kernels(),
        "layers": {"packed": len(checkpoint.layers)},
        "files": [file.name for file in checkpoint.files],
        "warnings": [*checkpoint.warnings, *decision.warnings],
    }


def kernels() -> dict[str, str]:
    """Return which implementation serves a packed matmul and a rotary embedding on each device."""
    compiled = cpu.status()["state"] in ("loaded", "built", "not built")
    return {"cpu": "c++" if compiled else "torch", "cuda": "triton, cuda c++" if few_tokens.available() else "triton"}


def _weights(checkpoint: Checkpoint) -> int:
    """Return how many weights the packed layers hold."""
    return sum(layer.in_features * layer.out_features for layer in checkpoint.layers.values())


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the first of the classes that a config names, or its type where it names none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config["model_type"])


def _format(checkpoint: Checkpoint) -> str:
    """Return how most packed layers lie on disk."""
    if checkpoint.quantize_config is None:
        return "plain"
    encoding = Counter(layer.encoding for layer in checkpoint.layers.values()).most_common(1)[0][0]
    return checkpoint.quantize_config.checkpoint_format if encoding == "gptq" else encoding


def _is_symmetric(checkpoint: Checkpoint) -> bool:
    """Tell what the zero points say, whatever the config does."""
    with checkpoint.reader() as reader:
        return all(
            is_symmetric(reader.read_zeros(layer), layer.settings.bits, layer.settings.checkpoint_format)
            for layer in checkpoint.layers.values()
        )
