"""Which files of a repository a model or an adapter needs, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
OTHER_MODELS = (".gguf", ".ggml", ".json", ".onnx", ".h5", ".msgpack")

# What a model needs besides its weights, by pattern; all of it at the root of a repository.
SIDE_FILES = (
    *(
        "config.json",
        "quantize_config.json",
        "quant_config.json",
        "generation_config.json",
        "adapter_config.json",
    ),
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "tekken.json",
    ),
    *("*.model", "*.tiktoken", "*.jinja"),
)
NEVER = (".py", ".gguf", ".ggml", ".msgpack", ".h5", ".onnx")
# Weights by their suffix, but not of the model; consolidated.safetensors has Mistral's own names, a second time.
NOT_WEIGHTS = (
    "adapter_model.*",
    "training_args.*",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
)
TWICE = "consolidated*"
SHARD = re.compile(r".+-\d{5}-of-\d{5}\.\w+")


@dataclass(frozen=True)
class Kind:
    """What is looked for.

    Attributes:
        what: for messages.
        marker: the file that shows that a folder has one.
        shelves: where text-generation-webui keeps them, below the current folder.
        choose: from the names in a repository to those that are needed.
    """

    what: str
    marker: str
    shelves: tuple[str, ...]
    choose: Callable[[Iterable[str]], list[str]]


def choose_model_files(names: Iterable[str]) -> list[str]:
    """Return the files of a repository that a model needs; without weights it has no file in it that `is_weights`.

    Args:
        names: paths in the repository.
    """
    flat = _at_the_root(names)
    side = [name for name in flat if any(fnmatchcase(name, pattern) for pattern in SIDE_FILES)]
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
        weights = [name for name in flat if is_weights(name) and name.endswith(suffixes)]
        indices = [name for name in flat if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        shards = [name for name in weights if SHARD.fullmatch(name)] if indices else []
        chosen = shards or [name for name in weights if not fnmatchcase(name, TWICE)] or weights
        if chosen:
            return list(dict.fromkeys([*side, *indices, *chosen]))
    return side


def choose_adapter_files(names: Iterable[str]) -> list[str]:
    """Return the files of a repository that a PEFT adapter needs."""
    flat = _at_the_root(names)
    weights = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in flat][:1]
    return [*(name for name in flat if name == ADAPTER.marker), *weights]


def is_weights(name: str) -> bool:
    """Tell whether a file of a repository may hold weights of a model, by its name."""
    return name.endswith(WEIGHTS) and not any(fnmatchcase(name, pattern) for pattern in NOT_WEIGHTS)


def _at_the_root(names: Iterable[str]) -> list[str]:
    """Return what is in no folder, since original/ and onnx/ hold the same weights once more; and no code."""
    return sorted(n for n in names if "/" not in n and "\\" not in n and n[:1] != "." and not n.endswith(NEVER))


MODEL = Kind(
    "a folder with a model (config.json and .safetensors)",
    "config.json",
    ("models", "user_data/models"),
    choose_model_files,
)
ADAPTER = Kind(
    "a PEFT adapter (adapter_config.json)",
    "adapter_config.json",
    ("loras", "user_data/loras"),
    choose_adapter_files,
)
