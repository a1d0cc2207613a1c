"""What of a model takes memory and is read for a token, from the sizes of its parts. Nothing is run.

A step of a batch reads every weight once (of experts those that are chosen), the output embedding, a row of the input
embedding for each sequence, and the keys and values of all tokens before it, each sequence its own: b + 16 / g bits
for a packed weight (b / g more where zero points differ, 32 / N more for act-order; as files hold them, while our
layout for the GPU keeps a zero point in 8 bits), and 2 * layers * heads of k * channels numbers for each token of
context. Memory is the weights, the keys and values, and what a prompt needs while it is computed (`Sizes.work_bytes`),
which is an estimate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any

from ropewalk.bench.known_models import Model, Part, split
from ropewalk.bench.shapes import Packing
from ropewalk.gptq.format import is_symmetric
from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.reader import Reader
from ropewalk.loader.rope import RopeDecision, context_length

LONGEST = 1 << 24  # tokens; no longer context is looked for

EMBEDDING = re.compile(r"(?:.+\.)?(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)(?:\.weight)?")
HEAD = re.compile(r"(?:.+\.)?(?:lm_head|embed_out)(?:\.weight)?")
EXPERT = re.compile(r".+\.experts\.(\d+)\..+")
_UNUSED = re.compile(r".+rotary_emb\.inv_freq|.+\.(?:attn|attention)\.(?:masked_)?bias")  # computed afresh


@dataclass(frozen=True)
class Sizes:
    """What of a model, or of the share of it that one GPU holds, takes memory and is read.

    Attributes:
        packing: in words of --pack, "float16", or "4b-g32-act and others" where layers differ.
        dense, experts: bytes of the linear layers of the blocks outside of experts and in them.
        expert_count, chosen: experts of a block, and how many of them a token needs.
        expert_ranks: GPUs that the experts of a block are dealt out to; this is one of those with the most.
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
    dense: int
    experts: int
    expert_count: int
    chosen: int
    expert_ranks: int
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
    def packed(self) -> int:
        """Bytes of the linear layers of the blocks."""
        return self.dense + self.experts

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.packed + self.head + self.embedding + self.others

    def packed_read(self, batch: int = 1) -> float:
        """Return the bytes of the linear layers that a step of `batch` sequences reads, experts on average."""
        if not self.experts:
            return float(self.dense)
        held = -(-self.expert_count // self.expert_ranks)
        touched = experts_touched(self.expert_count, self.chosen, batch, self.expert_ranks)
        return self.dense + self.experts * touched / held

    def cache_bytes(self, context: int, kv_bits: int = 16) -> int:
        """Return the bytes of keys and values of `context` tokens; scales that 8 bits may need are not counted."""
        return min(context, self.window or context) * self.layers * self.cached * kv_bits // 8

    def step_bytes(self, context: int, kv_bits: int = 16, batch: int = 1) -> float:
        """Return the fewest bytes that must be read for a token of each of `batch` sequences after `context` others."""
        rows = batch * (2 * self.hidden + self.cache_bytes(context, kv_bits))
        return self.packed_read(batch) + self.head + self.others + rows

    def work_bytes(self, tokens: int) -> int:
        """Estimate what so many tokens, computed at once in 16 bits, need beside weights and cache.

        In the MLP of a block four results of the width between blocks and three of the widest layer are alive, for each
        token; in an attention that is not fused, 12 bytes for each score and six results of the width between blocks
        (tests/test_cost.py measures both). The largest packed layer is written out in 16 bits, as ours is for a prompt.
        """
        mlp = 2 * tokens * (4 * self.hidden + 3 * self.widest)
        attention = 12 * self.score_heads * tokens**2 + 2 * tokens * 6 * self.hidden
        return max(mlp, attention) + 2 * self.largest

    def memory(self, context: int, kv_bits: int = 16, chunk: int | None = None, batch: int = 1) -> int:
        """Return the bytes that `batch` sequences of `context` tokens need, their prompts computed one after the other
        in parts of `chunk` tokens.
        """
        tokens = max(min(max(context, 1), chunk or LONGEST), batch)
        return self.weights + batch * self.cache_bytes(context, kv_bits) + self.work_bytes(tokens)

    def longest_context(self, nbytes: int, kv_bits: int = 16, chunk: int | None = None, batch: int = 1) -> int:
        """Return the most tokens of context of each of `batch` sequences that fit in so many bytes, up to LONGEST; 0
        where not even one does.
        """
        fits, too_long = 0, LONGEST + 1
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.memory(middle, kv_bits, chunk, batch) <= nbytes:
                fits = middle
            else:
                too_long = middle
        return fits


@cache
def experts_touched(experts: int, chosen: int, tokens: int, ranks: int = 1) -> float:
    """Return how many different experts so many tokens choose of those that one GPU holds, on average, and of the GPU
    with the most of them where the experts are dealt out to several, since the others wait for it.

    Every choice is taken for equally likely: a router that likes some experts more chooses fewer different ones. With
    one GPU that is E * (1 - (1 - k / E)**tokens). With several, the number t of different experts follows from token to
    token by the hypergeometric distribution, and of the C(E, t) sets those with at most m on each GPU are counted.

    Args:
        experts, chosen: E and k of a block.
        ranks: GPUs; the first ones hold one expert more where the number does not divide, as in vLLM.
    """
    if ranks == 1:
        return experts * (1 - (1 - chosen / experts) ** tokens)
    held = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    most = 0.0
    sets_up_to = [_sets_up_to(held, m) for m in range(max(held))]
    for t, p in enumerate(_different(experts, chosen, tokens)):
        most += p * sum(1 - counts[t] / comb(experts, t) for counts in sets_up_to)  # E[x] = sum of P(x > m)
    return most


def _different(experts: int, chosen: int, tokens: int) -> list[float]:
    """Return the probability of each number of different experts, from 0 to all, that so many tokens choose."""
    chances = [1.0] + [0.0] * experts
    for _ in range(tokens):
        after = [0.0] * (experts + 1)
        for t, p in enumerate(chances):
            for new in range(min(chosen, experts - t) + 1 if p else 0):
                ways = comb(t, chosen - new) * comb(experts - t, new)
                after[t + new] += p * ways / comb(experts, chosen)
        chances = after
    return chances


def _sets_up_to(held: list[int], most: int) -> list[int]:
    """Return how many sets of each size, from 0 to all, have at most so many experts on each GPU."""
    counts = [1]
    for here in held:
        after = [0] * (len(counts) + here)
        for t, sets in enumerate(counts):
            for more in range(min(most, here) + 1):
                after[t + more] += sets * comb(here, more)
        counts = after
    return counts


def model_of_checkpoint(checkpoint: Checkpoint, rope: RopeDecision) -> Model:
    """Return the parts of a model from its headers and its config; only zero points are read, to see whether they
    differ.

    Raises:
        CheckpointError: a config that transformers does not take.
    """
    from ropewalk.loader.rotary import rope_types
    from ropewalk.loader.skeleton import model_config

    with rope_types():
        config = model_config(checkpoint, rope)
    parts = []
    with checkpoint.reader() as reader:
        for layer in checkpoint.layers.values():
            parts.append(Part(layer.name, (layer.out_features, layer.in_features), _packing_of(layer, reader)))
            if layer.has_bias:
                parts.append(Part(f"{layer.name}.bias", (layer.out_features,)))
    for name in checkpoint.plain_tensors():
        parts += [Part(part, shape) for part, shape in split(name, checkpoint.tensors[name].shape)]
    names = sorted({part.packing.name for part in parts if part.packing}) or ["float16"]
    return Model(config, parts, names[0] + (" and others" if len(names) > 1 else ""))


def _packing_of(layer: PackedLayer, reader: Reader) -> Packing:
    settings = layer.settings
    zeros = reader.read_zeros(layer)
    symmetric = is_symmetric(zeros, settings.bits, settings.checkpoint_format)
    return Packing(settings.bits, settings.group_size, bool(settings.desc_act and layer.has_g_idx), symmetric)


def kv_heads(text: Any) -> int:
    """Return the heads of keys and values of a config."""
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def is_tied(model: Model) -> bool:
    """Tell whether the input embedding is the output embedding, too."""
    return bool(model.config.tie_word_embeddings) or not any(HEAD.fullmatch(part.name) for part in model.parts)


def expert_count(model: Model) -> int:
    """Return the experts of a block, 1 where there are none."""
    return max((int(found[1]) + 1 for part in model.parts if (found := EXPERT.fullmatch(part.name))), default=1)


def sizes_of(model: Model, tied: bool | None = None) -> Sizes:
    """Sort a model's parts by what they are for.

    Args:
        tied: whether the input embedding among them is read as the output embedding; None where the model says so.
    """
    text = model.config.get_text_config()
    parts = [part for part in model.parts if not _UNUSED.fullmatch(part.name)]
    experts = expert_count(model)
    chosen = min(getattr(text, "num_experts_per_tok", None) or experts, experts)
    embedding = sum(part.nbytes for part in parts if EMBEDDING.fullmatch(part.name))
    head = sum(part.nbytes for part in parts if HEAD.fullmatch(part.name))
    if is_tied(model) if tied is None else tied:
        embedding, head = 0, embedding
    dense, in_experts, others, widest, largest = 0, 0, 0, 0, 0
    for part in parts:
        if EMBEDDING.fullmatch(part.name) or HEAD.fullmatch(part.name):
            continue
        if is_small(part):
            others += part.nbytes
            continue
        of_expert = EXPERT.fullmatch(part.name) is not None
        dense, in_experts = dense + part.nbytes * (not of_expert), in_experts + part.nbytes * of_expert
        widest = max(widest, max(part.shape) * (chosen if of_expert else 1))
        if part.packing is not None:
            largest = max(largest, part.shape[0] * part.shape[1])
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        packing=model.packing,
        dense=dense,
        experts=in_experts,
        expert_count=experts,
        chosen=chosen,
        expert_ranks=1,
        head=head,
        embedding=embedding,
        others=others,
        layers=text.num_hidden_layers,
        window=_window(text),
        cached=2 * kv_heads(text) * head_dim,
        hidden=text.hidden_size,
        widest=widest,
        largest=largest,
        score_heads=0 if _is_fused(model.config) else heads,
        context=context_length(text),
    )


def is_small(part: Part) -> bool:
    """Tell norms, biases, routers and gates of one from linear layers."""
    return len(part.shape) < 2 or (part.packing is None and min(part.shape) < 64)


def _window(text: Any) -> int | None:
    """Return the window that all layers' caches are limited to, or None where some layer sees everything."""
    kinds = getattr(text, "layer_types", None) or []
    return None if "full_attention" in kinds else getattr(text, "sliding_window", None) or None


def _is_fused(config: Any) -> bool:
    """Tell whether transformers computes the attention of a family without writing out its scores."""
    from transformers import AutoModelForCausalLM

    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(getattr(model_class, "_supports_sdpa", False))
