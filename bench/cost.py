"""What a model costs on a device, by arithmetic: bytes that a token needs read, the tokens a second that a device's
memory allows at best, the memory that a context takes, and the longest that fits. Nothing is run.

A token of a batch of one reads every weight once (of experts those that are chosen), the output embedding, a row of the
input embedding, and the keys and values of all tokens before it, so

    tokens/s <= bandwidth / (packed layers + output embedding + norms, biases and routers + keys and values)

with b + 16 / g bits for a packed weight (b / g more where zero points differ, 32 / N more for act-order; as files hold
them, while our layout for the GPU keeps a zero point in 8 bits), and
2 * layers * heads of k * channels numbers for each token of context. Memory is the weights, the keys and values, and
what a prompt needs while it is computed (`Sizes.work_bytes`), which is an estimate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ropewalk.bench.devices import RESERVED, Device
from ropewalk.bench.known_models import Part, known_model, packed_bytes, parse_known, split
from ropewalk.bench.shapes import Packing
from ropewalk.gptq.format import is_symmetric
from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.reader import Reader
from ropewalk.loader.rope import RopeDecision, context_length
from ropewalk.terminal import size, table

LONGEST = 1 << 24  # tokens; no longer context is looked for
USEFUL = 1024  # tokens of context without which a model is of no use on a device

_EMBEDDING = re.compile(r"(?:.+\.)?(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)(?:\.weight)?")
_HEAD = re.compile(r"(?:.+\.)?(?:lm_head|embed_out)(?:\.weight)?")
_EXPERT = re.compile(r".+\.experts\.(\d+)\..+")
_UNUSED = re.compile(r".+rotary_emb\.inv_freq|.+\.(?:attn|attention)\.(?:masked_)?bias")  # computed afresh


@dataclass(frozen=True)
class Sizes:
    """What of a model takes memory and is read.

    Attributes:
        packing: in words of --pack, "float16", or "4b-g32-act and others" where layers differ.
        packed, packed_read: bytes of the linear layers of the blocks, all of them and those that a token reads.
        head: bytes of the output embedding.
        embedding: bytes of the input embedding, 0 where it is the output embedding.
        others: bytes of everything else.
        layers: of attention.
        window: tokens that the cache of a layer is limited to, or None.
        cached: numbers that a token adds to the cache of a layer: keys and values.
        hidden, widest: numbers of a token between the blocks, and in the widest layer (of all its experts together).
        largest: weights of the largest packed layer.
        score_heads: heads whose attention is written out, tokens by tokens; 0 with a fused attention.
        context: tokens that the model was made for.
    """

    packing: str
    packed: int
    packed_read: float
    head: int
    embedding: int
    others: int
    layers: int
    window: int | None
    cached: int
    hidden: int
    widest: int
    largest: int
    score_heads: int
    context: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.packed + self.head + self.embedding + self.others

    def cache_bytes(self, context: int, kv_bits: int = 16) -> int:
        """Return the bytes of keys and values of `context` tokens; scales that 8 bits may need are not counted."""
        return min(context, self.window or context) * self.layers * self.cached * kv_bits // 8

    def token_bytes(self, context: int, kv_bits: int = 16) -> float:
        """Return the fewest bytes that must be read for the token after `context` others."""
        return self.packed_read + self.head + self.others + 2 * self.hidden + self.cache_bytes(context, kv_bits)

    def work_bytes(self, tokens: int) -> int:
        """Estimate what so many tokens of a prompt, computed at once in 16 bits, need beside weights and cache.

        In the MLP of a block four results of the width between blocks and three of the widest layer are alive, for each
        token; in an attention that is not fused, 12 bytes for each score and six results of the width between blocks
        (tests/test_cost.py measures both). The largest packed layer is written out in 16 bits, as ours is for a prompt.
        """
        mlp = 2 * tokens * (4 * self.hidden + 3 * self.widest)
        attention = 12 * self.score_heads * tokens**2 + 2 * tokens * 6 * self.hidden
        return max(mlp, attention) + 2 * self.largest

    def memory(self, context: int, kv_bits: int = 16, chunk: int | None = None) -> int:
        """Return the bytes that a context of so many tokens needs, its prompt computed in parts of `chunk` tokens."""
        tokens = min(max(context, 1), chunk or LONGEST)
        return self.weights + self.cache_bytes(context, kv_bits) + self.work_bytes(tokens)

    def longest_context(self, nbytes: int, kv_bits: int = 16, chunk: int | None = None) -> int:
        """Return the most tokens of context that fit in so many bytes, up to LONGEST; 0 where not even one does."""
        fits, too_long = 0, LONGEST + 1
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.memory(middle, kv_bits, chunk) <= nbytes:
                fits = middle
            else:
                too_long = middle
        return fits


def sizes_of_known(text: str) -> Sizes | None:
    """Return the sizes of a model that is not here, as llama-2-13b:4b-g32; None where nothing is known by the name.

    Raises:
        UsageError: a packing that says nothing, or that the model does not fit.
    """
    found = parse_known(text)
    if found is None:
        return None
    config, parts = known_model(*found)
    return _sizes(config, parts, found[1].name if found[1] else "float16")


def sizes_of_checkpoint(checkpoint: Checkpoint, rope: RopeDecision) -> Sizes:
    """Return the sizes of a model from its headers and its config; only zero points are read, to see whether they
    differ.

    Raises:
        CheckpointError: a config that transformers does not take.
    """
    from ropewalk.loader.rotary import rope_types
    from ropewalk.loader.skeleton import model_config

    with rope_types():
        config = model_config(checkpoint, rope)
    parts, packings = [], set()
    with checkpoint.reader() as reader:
        for layer in checkpoint.layers.values():
            packing = _packing_of(layer, reader)
            packings.add(packing)
            nbytes = packed_bytes(layer.in_features, layer.out_features, packing)
            nbytes += 2 * layer.out_features if layer.has_bias else 0
            parts.append(Part(layer.name, (layer.out_features, layer.in_features), nbytes, True))
    for name in checkpoint.plain_tensors():
        for part, shape in split(name, checkpoint.tensors[name].shape):
            parts.append(Part(part, shape, 2 * math.prod(shape), False))
    names = sorted(packing.name for packing in packings) or ["float16"]
    return _sizes(config, parts, names[0] + (" and others" if len(names) > 1 else ""))


def _packing_of(layer: PackedLayer, reader: Reader) -> Packing:
    settings = layer.settings
    zeros = reader.read_zeros(layer)
    symmetric = is_symmetric(zeros, settings.bits, settings.checkpoint_format)
    return Packing(settings.bits, settings.group_size, bool(settings.desc_act and layer.has_g_idx), symmetric)


def _sizes(config: Any, parts: Iterable[Part], packing: str) -> Sizes:
    """Sort a model's parts by what they are for."""
    text = config.get_text_config()
    parts = [part for part in parts if not _UNUSED.fullmatch(part.name)]
    experts = max((int(found[1]) + 1 for part in parts if (found := _EXPERT.fullmatch(part.name))), default=1)
    chosen = min(getattr(text, "num_experts_per_tok", None) or experts, experts)
    embedding = sum(part.nbytes for part in parts if _EMBEDDING.fullmatch(part.name))
    head = sum(part.nbytes for part in parts if _HEAD.fullmatch(part.name))
    if config.tie_word_embeddings or not head:
        embedding, head = 0, embedding
    packed, read, others, widest, largest = 0, 0.0, 0, 0, 0
    for part in parts:
        if _EMBEDDING.fullmatch(part.name) or _HEAD.fullmatch(part.name):
            continue
        if len(part.shape) < 2 or (not part.packed and min(part.shape) < 64):  # norms, biases; routers and gates of one
            others += part.nbytes
            continue
        of_expert = _EXPERT.fullmatch(part.name) is not None
        packed, read = packed + part.nbytes, read + part.nbytes * (chosen / experts if of_expert else 1)
        widest = max(widest, max(part.shape) * (chosen if of_expert else 1))
        if part.packed:
            largest = max(largest, part.shape[0] * part.shape[1])
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        packing=packing,
        packed=packed,
        packed_read=read,
        head=head,
        embedding=embedding,
        others=others,
        layers=text.num_hidden_layers,
        window=_window(text),
        cached=2 * kv_heads * head_dim,
        hidden=text.hidden_size,
        widest=widest,
        largest=largest,
        score_heads=0 if _is_fused(config) else heads,
        context=context_length(text),
    )


def _window(text: Any) -> int | None:
    """Return the window that all layers' caches are limited to, or None where some layer sees everything."""
    kinds = getattr(text, "layer_types", None) or []
    return None if "full_attention" in kinds else getattr(text, "sliding_window", None) or None


def _is_fused(config: Any) -> bool:
    """Tell whether transformers computes the attention of a family without writing out its scores."""
    from transformers import AutoModelForCausalLM

    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(getattr(model_class, "_supports_sdpa", False))


def cost(
    sizes: Sizes, devices: Iterable[Device], contexts: Iterable[int], kv_bits: int = 16, chunk: int | None = None
) -> dict[str, Any]:
    """Return what a model costs on devices, as `ropewalk inspect --json` has it.

    Args:
        contexts: tokens.
        kv_bits: 16 or 8, of a number in the cache.
        chunk: tokens of a prompt that are computed at once; None for all.
    """
    contexts = list(contexts)
    return {
        "packing": sizes.packing,
        "bytes": {
            "packed": sizes.packed,
            "packed_of_a_token": sizes.packed_read,
            "output_embedding": sizes.head,
            "input_embedding": sizes.embedding,
            "other": sizes.others,
            "cache_of_a_token": sizes.cached * sizes.layers * kv_bits // 8,
        },
        "kv_bits": kv_bits,
        "prefill_chunk": chunk,
        "context": sizes.context,
        "devices": [_on(sizes, device, contexts, kv_bits, chunk) for device in devices],
    }


def _on(sizes: Sizes, device: Device, contexts: list[int], kv_bits: int, chunk: int | None) -> dict[str, Any]:
    room = device.memory_bytes - RESERVED
    rows = []
    for context in contexts:
        token, memory = sizes.token_bytes(context, kv_bits), sizes.memory(context, kv_bits, chunk)
        cache = sizes.cache_bytes(context, kv_bits)
        rows.append(
            {
                "context": context,
                "bytes_per_token": token,
                "limit_tokens_per_s": device.read_gb_per_s * 1e9 / token,
                "memory_bytes": memory,
                "cache_bytes": cache,
                "work_bytes": memory - cache - sizes.weights,
                "fits": memory <= room,
            }
        )
    longest = sizes.longest_context(room, kv_bits, chunk)
    return {**device._asdict(), "longest_context": longest, "contexts": rows}


def cost_table(found: dict[str, Any]) -> str:
    """Return what `ropewalk inspect --device` prints of one model: a line for each device and context."""
    lines = [("", "GB/s", "context", "GB a token", "tokens/s at most", "memory", "", "longest context")]
    for device in found["devices"]:
        for i, row in enumerate(device["contexts"]):
            first = i == 0
            lines.append(
                (
                    device["title"] if first else "",
                    f"{device['read_gb_per_s']:.0f}" if first else "",
                    f"{row['context']:,}",
                    _gigabytes(row["bytes_per_token"]),
                    _rounded(row["limit_tokens_per_s"]),
                    size(row["memory_bytes"]),
                    "fits" if row["fits"] else "too much",
                    f"{device['longest_context']:,}" if first else "",
                )
            )
    sources = (f"{device['name']} {device['source']}" for device in found["devices"])
    return f"{table(lines)}\nGB/s: {'; '.join(sources)}"


def models_table(costs: dict[str, dict[str, Any]], place: int) -> str:
    """Return tokens a second at most, a line for each model and a column for each device.

    "–" is where fewer than USEFUL tokens of context fit.

    Args:
        costs: model -> what --json has of it as "cost"; all with the same devices.
        place: which of the contexts.
    """
    devices = next(iter(costs.values()))["devices"]
    lines = [("", "GB a token", *(f"{device['name']} ({device['read_gb_per_s']:.0f} GB/s)" for device in devices))]
    for model, found in costs.items():
        cells = []
        for device in found["devices"]:
            row = device["contexts"][place]
            useful = device["longest_context"] >= max(USEFUL, row["context"])
            cells.append(_rounded(row["limit_tokens_per_s"]) if useful else "–")
        lines.append((model, _gigabytes(found["devices"][0]["contexts"][place]["bytes_per_token"]), *cells))
    return table(lines)


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}" if nbytes >= 1e9 else f"{nbytes / 1e9:.2g}"


def _rounded(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"
