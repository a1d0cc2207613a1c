"""Models of the Hub by name, from what their config.json say: for sums about models that are not here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ropewalk.bench.shapes import Packing, parse_packing
from ropewalk.errors import FormatError, UsageError
from ropewalk.gptq.format import expected_tensors
from ropewalk.loader.quantize import ROUTERS


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, context: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        **more,
    }


def _mpt(layers: int, width: int, heads: int, context: int) -> dict[str, Any]:
    sizes = {"n_layers": layers, "d_model": width, "n_heads": heads, "max_seq_len": context, "vocab_size": 50432}
    return {"model_type": "mpt", "expansion_ratio": 4, "no_bias": True, **sizes}


_MIXTURE = {"model_type": "mixtral", "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": _llama(22, 2048, 5632, 32, 4, 2048),
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32, 4096),
    "llama-2-13b": _llama(40, 5120, 13824, 40, 40, 4096),
    "airophin-13b": _llama(40, 5120, 13824, 40, 40, 16384),
    "codellama-34b": _llama(48, 8192, 22016, 64, 8, 16384),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8, 4096),
    "mistral-7b": _llama(32, 4096, 14336, 32, 8, 32768, model_type="mistral", sliding_window=4096),
    "mixtral-8x7b": _llama(32, 4096, 14336, 32, 8, 32768, **_MIXTURE),
    "mpt-7b": _mpt(32, 4096, 32, 2048),
    "mpt-30b": _mpt(48, 7168, 64, 8192),
}


class Part(NamedTuple):
    """A tensor of a model in 16 bits, or a packed layer: its name, shape ([N, K] of a layer), and how it is packed."""

    name: str
    shape: tuple[int, ...]
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept and read.

        Raises:
            FormatError: a packing that the layer does not fit.
        """
        if self.packing is None:
            return 2 * math.prod(self.shape)
        return packed_bytes(self.shape[1], self.shape[0], self.packing)


class Model(NamedTuple):
    """What is reckoned with: transformers' config, all parts, and the packing in words ("4b-g32-act and others")."""

    config: Any
    parts: list[Part]
    packing: str


def parse_known(text: str) -> tuple[str, Packing | None] | None:
    """Return what llama-2-13b:4b-g32 or llama-2-13b:float16 says, (name, packing); None where it names no such model.

    Raises:
        UsageError: one of CONFIGS with a packing that says nothing, or with none.
    """
    name, _, pack = text.partition(":")
    if name not in CONFIGS:
        return None
    if pack == "float16":
        return name, None
    try:
        return name, parse_packing(pack)
    except UsageError:
        raise UsageError(
            f"MODEL: expected a packing after {name}, as {name}:4b-g128, {name}:3b-g32-act-asym or {name}:float16, "
            f"found {text!r}"
        ) from None


def known_model(text: str) -> Model | None:
    """Return a model that is not here, as llama-2-13b:4b-g32; None where nothing is known by the name.

    All linear layers are packed but routers and the output embedding; nothing is allocated.

    Raises:
        UsageError: a packing that says nothing, or that the model does not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = parse_known(text)
    if found is None:
        return None
    name, packing = found
    config = CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts = list(_parts(model, packing))
    try:
        sum(part.nbytes for part in parts)
    except FormatError as error:
        raise UsageError(f"MODEL: {name} in {packing and packing.name}: {error}") from None
    return Model(config, parts, packing.name if packing else "float16")


def _parts(model: nn.Module, packing: Packing | None) -> Iterator[Part]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] not in ROUTERS
    }
    for name, tensor in model.named_parameters():
        for part, shape in split(name, tuple(tensor.shape)):
            if part in linear or part != name:
                yield Part(part.removesuffix(".weight"), shape, packing)
            else:
                yield Part(name, shape)


def split(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of a tensor, or of each layer of each expert where transformers makes one tensor of them."""
    stack, _, last = name.rpartition(".")
    if not stack.endswith(".experts") or len(shape) != 3:
        yield name, shape
        return
    halves = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    for expert in range(shape[0]):
        for half in halves:
            yield f"{stack}.{expert}.{half}", (shape[1] // len(halves), shape[2])


def packed_bytes(in_features: int, out_features: int, packing: Packing) -> int:
    """Return the bytes of a packed layer that are kept and read: codes, scales, zero points where they are not all the
    same, and the order of the rows where there is one.

    Raises:
        FormatError: a packing that the layer does not fit.
    """
    parts = ["qweight", "scales"]
    parts += [] if packing.sym else ["qzeros"]
    parts += ["g_idx"] if packing.act_order else []
    tensors = expected_tensors(in_features, out_features, packing.bits, packing.group_size)
    return sum(torch.Size(tensors[part][0]).numel() * tensors[part][1].itemsize for part in parts)
