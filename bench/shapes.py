"""Models by name, for all benchmarks: their sizes, what their tensors are called, and how they are packed."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ropewalk.errors import FormatError, UsageError
from ropewalk.gptq.format import expected_tensors


class Packing(NamedTuple):
    """How weights are packed."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool

    @property
    def act_order(self) -> bool:
        """Whether rows of a group lie apart; one group has no order to it."""
        return self.desc_act and self.group_size != -1

    @property
    def rows_per_group(self) -> float:
        """The group size, without end for -1."""
        return math.inf if self.group_size == -1 else self.group_size

    @property
    def name(self) -> str:
        """As --pack takes it: 4b-g128-act-asym, 3b-none."""
        groups = "none" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}b-{groups}{'-act' if self.desc_act else ''}{'' if self.sym else '-asym'}"

    def nbytes(self, k: int, n: int) -> int:
        """Return the fewest bytes a kernel must read of a weight [k, n] packed so: codes, scales, zero points unless
        symmetric, and order.
        """
        groups = 1 if self.group_size == -1 else -(-k // self.group_size)
        zeros = 0 if self.sym else groups * n * self.bits // 8
        return k * n * self.bits // 8 + 2 * groups * n + zeros + (4 * k if self.act_order else 0)


def parse_packing(text: str) -> Packing:
    """Return what a name such as 4b-g128-act says.

    Raises:
        UsageError: not such a name.
    """
    found = re.fullmatch(r"([2348])b-(?:g([1-9]\d*)|none)(-act)?(-asym)?", text)
    if found is None:
        raise UsageError(f"--pack: expected 4b-g128, 3b-g32-act, 8b-none-asym, …, found {text!r}")
    bits, group_size, act, asym = found.groups()
    return Packing(int(bits), int(group_size or -1), act is not None, asym is None)


@dataclass(frozen=True)
class Shape(ABC):
    """Sizes of a model.

    Attributes:
        embedding, head: what the input and output embeddings are called; the same where they are tied.
        longest: tokens of context that the architecture has positions for; None for any number.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    theta: float = 10000.0

    embedding: ClassVar[str] = "model.embed_tokens.weight"
    head: ClassVar[str] = "lm_head.weight"
    longest: ClassVar[int | None] = None

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The names of the embeddings, each once."""
        return tuple(dict.fromkeys((self.embedding, self.head)))

    @abstractmethod
    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, K, N) of the layers that are packed."""

    @abstractmethod
    def norms(self) -> list[str]:
        """Return the names of the norms' weights."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return config.json."""

    def routers(self) -> list[str]:
        """Return the names of the matrices [experts, hidden] that choose experts; they are not packed."""
        return []

    def share_read(self, layer: str, batch: int) -> float:
        """Return which share of a packed layer a step of `batch` sequences reads, on average."""
        return 1.0

    def dense_count(self, batch: int = 1) -> float:
        """Return how many numbers a step of `batch` sequences reads of the model unpacked."""
        linears = sum(k * n * self.share_read(name, batch) for name, k, n in self.linears())
        return linears + self.hidden * (self.vocab + len(self.norms())) + self.router_count()

    def router_count(self) -> int:
        """Return how many numbers there are in `routers`."""
        return 0

    def parameters(self) -> int:
        """Return how many numbers the model has."""
        linears = sum(k * n for _, k, n in self.linears())
        return linears + self.hidden * (self.vocab * len(self.embeddings) + len(self.norms())) + self.router_count()

    def kv_bytes(self, context: float, itemsize: int = 2) -> float:
        """Return the bytes of the keys and values of `context` tokens."""
        return 2 * itemsize * context * self.layers * self.kv_heads * self.head_dim

    def packed_bytes(self, packing: Packing) -> int:
        """Return the size of a checkpoint, within what its header and zero points take."""
        linears = sum(packing.nbytes(k, n) for _, k, n in self.linears())
        return linears + 2 * (
            self.hidden * (self.vocab * len(self.embeddings) + len(self.norms())) + self.router_count()
        )


@dataclass(frozen=True)
class Llama(Shape):
    """Llama and CodeLlama, which differ in theta and grouped queries."""

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield those of attention and of the MLP, layer by layer."""
        for i in range(self.layers):
            for name, (k, n) in (self._attention() | self._mlp()).items():
                yield f"model.layers.{i}.{name}", k, n

    def _attention(self) -> dict[str, tuple[int, int]]:
        kv = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
        }

    def _mlp(self) -> dict[str, tuple[int, int]]:
        return {
            "mlp.gate_proj": (self.hidden, self.ffn),
            "mlp.up_proj": (self.hidden, self.ffn),
            "mlp.down_proj": (self.ffn, self.hidden),
        }

    def norms(self) -> list[str]:
        """Two in each layer, and the last one."""
        names = ("input_layernorm", "post_attention_layernorm")
        return [f"model.layers.{i}.{name}.weight" for i in range(self.layers) for name in names] + ["model.norm.weight"]

    def config(self) -> dict[str, Any]:
        """As transformers' LlamaConfig has it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "max_position_embeddings": 2048 if self.theta == 10000 else 16384,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float16",
        }


@dataclass(frozen=True)
class Mixtral(Llama):
    """A Llama whose MLPs are mixtures: `top_k` of `experts` for each token."""

    theta: float = 1e6
    experts: int = 8
    top_k: int = 2

    def _mlp(self) -> dict[str, tuple[int, int]]:
        sizes = {"w1": (self.hidden, self.ffn), "w3": (self.hidden, self.ffn), "w2": (self.ffn, self.hidden)}
        names = ((e, name) for e in range(self.experts) for name in sizes)
        return {f"block_sparse_moe.experts.{e}.{name}": sizes[name] for e, name in names}

    def routers(self) -> list[str]:
        """One in each layer."""
        return [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(self.layers)]

    def router_count(self) -> int:
        """Of all layers."""
        return self.layers * self.experts * self.hidden

    def share_read(self, layer: str, batch: int) -> float:
        """An expert is read if any of the sequences' tokens has chosen it, each `top_k` independently."""
        return 1 - (1 - self.top_k / self.experts) ** batch if ".experts." in layer else 1.0

    def config(self) -> dict[str, Any]:
        """As transformers' MixtralConfig has it."""
        return {
            **super().config(),
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "max_position_embeddings": 32768,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        }


@dataclass(frozen=True)
class Mpt(Shape):
    """MPT: ALiBi instead of rotary embeddings, q, k and v in one layer, tied embeddings, LayerNorm without bias."""

    vocab: int = 50432

    embedding: ClassVar[str] = "transformer.wte.weight"
    head: ClassVar[str] = "transformer.wte.weight"
    longest: ClassVar[int | None] = 8192

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield four for each block."""
        inner = {
            "attn.Wqkv": (self.hidden, 3 * self.hidden),
            "attn.out_proj": (self.hidden, self.hidden),
            "ffn.up_proj": (self.hidden, self.ffn),
            "ffn.down_proj": (self.ffn, self.hidden),
        }
        for i in range(self.layers):
            for name, (k, n) in inner.items():
                yield f"transformer.blocks.{i}.{name}", k, n

    def norms(self) -> list[str]:
        """Two in each block, and the last one."""
        inner = [f"transformer.blocks.{i}.{name}.weight" for i in range(self.layers) for name in ("norm_1", "norm_2")]
        return [*inner, "transformer.norm_f.weight"]

    def config(self) -> dict[str, Any]:
        """As transformers' MptConfig has it."""
        return {
            "architectures": ["MPTForCausalLM"],
            "model_type": "mpt",
            "d_model": self.hidden,
            "n_heads": self.heads,
            "n_layers": self.layers,
            "expansion_ratio": self.ffn // self.hidden,
            "max_seq_len": self.longest,
            "vocab_size": self.vocab,
            "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_pdrop": 0, "attn_type": "multihead_attention"},
            "learned_pos_emb": True,
            "no_bias": True,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float16",
        }


SHAPES: dict[str, Shape] = {
    "llama-1b": Llama(22, 2048, 5632, 32, 4),  # TinyLlama-1.1B
    "llama-2-7b": Llama(32, 4096, 11008, 32, 32),
    "llama-2-13b": Llama(40, 5120, 13824, 40, 40),
    "codellama-34b": Llama(48, 8192, 22016, 64, 8, theta=1e6),
    "mpt-30b": Mpt(48, 7168, 28672, 64, 64),
    "mixtral-8x7b": Mixtral(32, 4096, 14336, 32, 8),
    "tiny": Llama(2, 128, 256, 4, 2, vocab=512),
    "tiny-codellama": Llama(2, 128, 256, 4, 1, vocab=512, theta=1e6),
    "tiny-mpt": Mpt(2, 128, 512, 4, 4, vocab=512),
    "tiny-mixtral": Mixtral(2, 128, 256, 4, 2, vocab=512, experts=4),
}
# Those whose layers the benchmarks of single kernels have.
MODELS = ("llama-2-13b", "codellama-34b", "mpt-30b", "mixtral-8x7b")

FORMS = {
    "llama": "LAYERSxHIDDENxFFNxHEADSxKV",
    "codellama": "LAYERSxHIDDENxFFNxHEADSxKV",
    "mpt": "LAYERSxHIDDENxHEADS",
    "mixtral": "LAYERSxHIDDENxFFNxHEADSxKVxEXPERTS",
}


def parse_shape(name: str, packing: Packing) -> Shape:
    """Return one of SHAPES or what a form says, as 20x4096x11008x32x32 or mixtral:2x128x256x4x2x4, if it can be
    packed so.

    Raises:
        UsageError: it is neither, or no such model, or does not fit the packing.
    """
    shape = SHAPES.get(name) or _parse(name)
    if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise UsageError(f"--shapes: expected heads of an even size, and heads of k that divide, found {name!r}")
    try:
        for _, k, n in shape.linears():
            expected_tensors(k, n, packing.bits, packing.group_size)
    except FormatError as error:
        raise UsageError(f"--shapes {name}, {packing.name}: {error}") from None
    return shape


def _parse(name: str) -> Shape:
    family, text = name.split(":", 1) if ":" in name else ("llama", name)
    sizes = parse_sizes(text, FORMS.get(family, "").count("x") + 1)
    if family not in FORMS or sizes is None:
        forms = ", ".join(f"{family}:{form}" for family, form in FORMS.items())
        raise UsageError(f"--shapes: expected one of {', '.join(SHAPES)} or {forms}, found {name!r}")
    if family == "mpt":
        layers, hidden, heads = sizes
        return Mpt(layers, hidden, 4 * hidden, heads, heads)
    layers, hidden, ffn, heads, kv_heads, *experts = sizes
    if family != "mixtral":
        return Llama(layers, hidden, ffn, heads, kv_heads, theta=1e6 if family == "codellama" else 10000.0)
    if experts[0] < 2:
        raise UsageError(f"--shapes: expected at least 2 experts, found {name!r}")
    return Mixtral(layers, hidden, ffn, heads, kv_heads, experts=experts[0])


def parse_sizes(text: str, count: int) -> tuple[int, ...] | None:
    """Return `count` whole numbers above 0 with x between them, or None if the text is something else."""
    parts = text.split("x")
    if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
        return None
    return tuple(map(int, parts))
