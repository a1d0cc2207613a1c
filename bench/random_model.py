"""The tensors of a model of random weights, written as a GPTQ folder.

A mixture's router is made so that a token chooses its experts by a wide margin: with random numbers in it, what rounds
a little differently would now and then choose another expert, and logits would say nothing about who computes right.
As many channels of the residual as there are experts hold a permutation of evenly spaced numbers that belongs to the
token; no layer writes to them, and each layer's router reads them in an order of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import ropewalk
from ropewalk.bench.peers.weight import random_weight
from ropewalk.bench.shapes import Mixtral, Packing, Shape
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.write import write_json, write_weights

# What adds to the residual, by the end of a layer's name.
_WRITERS = ("self_attn.o_proj", ".w2")
_SHARP = 2.0  # how strongly a router reads the channels that choose


def write_random(shape: Shape, packing: Packing, folder: Path, device: torch.device, rounded: bool) -> None:
    """Write the folder of a model; see `model.packed_model`."""
    write_weights(_tensors(shape, packing, device, rounded), folder)
    settings = {
        "bits": packing.bits,
        "group_size": packing.group_size,
        "desc_act": packing.desc_act,
        "static_groups": False,
        "sym": packing.sym,
        "checkpoint_format": "gptq",
        "quant_method": "gptq",
        "meta": {"quantizer": [f"ropewalk:{ropewalk.__version__}"]},
    }
    write_json(folder / "quantize_config.json", {**settings, "model_file_base_name": "model"})
    write_tokenizer(shape, folder)
    write_json(folder / "config.json", {**shape.config(), "quantization_config": settings})


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """Write a tokenizer of one word for each token: benchmarks give ids, but GPTQModel loads no folder without one."""
    words = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(shape.vocab)}, "unk_token": "t0"}
    write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": words})
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t1", "eos_token": "t2", "unk_token": "t0"},
    )


def _tensors(shape: Shape, packing: Packing, device: torch.device, rounded: bool) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    signs = torch.Generator().manual_seed(0)
    channels = shape.experts if isinstance(shape, Mixtral) else 0  # that choose experts

    def normal(rows: int, columns: int) -> Tensor:
        # transformers' 0.02 at a width of 2048. With it at a width of 128 every token would attend to all others
        # alike, and a wrong rotation would change next to nothing.
        return torch.randn(rows, columns, device=device, generator=generator) / math.sqrt(columns)

    for name in shape.embeddings:
        matrix = normal(shape.vocab, shape.hidden)
        if channels and name == shape.embedding:
            # Numbers of the size of those that choose; the norm above takes any size.
            matrix *= math.sqrt(shape.hidden)
            matrix[:, :channels] = _choices(shape.vocab, channels).to(device)
        yield name, matrix.to("cpu", torch.float16)
    gains = {}
    for name in shape.norms():
        ones = torch.ones(shape.hidden, dtype=torch.float16)
        # Random codes have a mean that is not their zero point: without changes of sign all channels would become one.
        gains[name] = ones if rounded else ones - 2 * torch.randint(2, ones.shape, generator=signs)
        yield name, gains[name]
    for i, name in enumerate(shape.routers()):
        gain = gains[f"model.layers.{i}.post_attention_layernorm.weight"]
        yield name, _router(channels, i, gain)
    orders: dict[str, Tensor] = {}
    for seed, (layer, k, n) in enumerate(shape.linears()):
        order = None
        if packing.desc_act:
            group = _same_inputs(layer)
            if group not in orders:
                orders = {group: torch.randperm(k, device=device, generator=generator)}  # they come one after the other
            order = orders[group]
        if rounded:
            packed = quantize_rtn(
                normal(n, k), bits=packing.bits, group_size=packing.group_size, sym=packing.sym, order=order
            )
        else:
            packed = _random_codes(k, n, packing, order, device, seed)
        if channels and layer.endswith(_WRITERS):
            packed["scales"][:, :channels] = 0
        for part, tensor in packed.items():
            yield f"{layer}.{part}", tensor.cpu()


def _same_inputs(layer: str) -> str:
    """Return a name that layers share which were quantized on the same inputs, and so have one act-order."""
    parent, _, name = layer.rpartition(".")
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate-up", "up_proj": "gate-up"}
    return f"{parent}.{(groups | {'w1': 'gate-up', 'w3': 'gate-up'}).get(name, name)}"


def _random_codes(
    k: int, n: int, packing: Packing, order: Tensor | None, device: torch.device, seed: int
) -> dict[str, Tensor]:
    weight = random_weight(k, n, **packing._replace(desc_act=False)._asdict(), device=device, seed=seed)
    g_idx = weight.g_idx if order is None else weight.g_idx[order]
    # A quarter of its size is that of normal random numbers.
    return {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales / 4, "g_idx": g_idx}


def _choices(tokens: int, experts: int) -> Tensor:
    """Return for each token a permutation of evenly spaced numbers around 0, one apart, [tokens, experts]."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, experts, generator=generator).argsort(1).float() - (experts - 1) / 2


def _router(experts: int, layer: int, gain: Tensor) -> Tensor:
    """Return a router's weight [experts, hidden], given the gain of the norm before it: expert e follows channel
    e + layer.
    """
    matrix = torch.zeros(experts, len(gain), dtype=torch.float16)
    expert = torch.arange(experts)
    channel = (expert + layer) % experts
    matrix[expert, channel] = _SHARP * gain[channel]
    return matrix
