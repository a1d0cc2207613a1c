"""A Llama of random weights packed by our own tools, kept on disk: what `ropewalk bench decode` and `load` run on."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ropewalk
from ropewalk.bench.peers.weight import Weight, random_weight
from ropewalk.errors import FormatError, UsageError
from ropewalk.gptq.format import expected_tensors
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.write import write_json, write_weights

RECIPE = 1  # to count up when what is written changes, so that no old folder is taken for a new one


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


class Shape(NamedTuple):
    """Sizes of a Llama."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 32000

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, K, N) of the layers that are packed."""
        kv = self.kv_heads * self.head_dim
        inner = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.ffn),
            "mlp.up_proj": (self.hidden, self.ffn),
            "mlp.down_proj": (self.ffn, self.hidden),
        }
        for i in range(self.layers):
            for name, (k, n) in inner.items():
                yield f"model.layers.{i}.{name}", k, n

    def norms(self) -> list[str]:
        """Return the names of the norms' weights."""
        names = ("input_layernorm", "post_attention_layernorm")
        return [f"model.layers.{i}.{name}.weight" for i in range(self.layers) for name in names] + ["model.norm.weight"]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
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
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float16",
        }


SHAPES = {
    "llama-1b": Shape(22, 2048, 5632, 32, 4),  # TinyLlama-1.1B
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40),
    "tiny": Shape(2, 128, 256, 4, 2, vocab=512),
}


def parse_shape(name: str, packing: Packing) -> Shape:
    """Return one of SHAPES or what LAYERSxHIDDENxFFNxHEADSxKV says, if it can be packed so.

    Raises:
        UsageError: it is neither, or not a Llama, or does not fit the packing.
    """
    if name in SHAPES:
        shape = SHAPES[name]
    else:
        parts = name.split("x")
        if len(parts) != 5 or not all(part.isdecimal() and int(part) for part in parts):
            form = f"LAYERSxHIDDENxFFNxHEADSxKV or one of {', '.join(SHAPES)}"
            raise UsageError(f"--shape: expected {form}, found {name!r}")
        shape = Shape(*map(int, parts))
        if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
            raise UsageError(f"--shape: expected heads of an even size, and heads of k that divide, found {name!r}")
    try:
        for _, k, n in shape.linears():
            expected_tensors(k, n, packing.bits, packing.group_size)
    except FormatError as error:
        raise UsageError(f"--shape {name}, {packing.name}: {error}") from None
    return shape


@dataclass(frozen=True)
class PackedModel:
    """A packed Llama on disk.

    Attributes:
        name: of its shape, as --shape has it.
    """

    name: str
    shape: Shape
    packing: Packing
    folder: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        return open_checkpoint(self.folder)

    def weight(self, layer: str) -> Weight:
        """Read a packed layer."""
        parts = (self.checkpoint.read(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
        return Weight(*self.packing, *parts)

    def token_bytes(self, context: float) -> float:
        """Return the fewest bytes that a token needs read.

        They are the packed layers, the output embedding, the norms and a row of the embedding as the folder holds
        them, and keys and values of `context` tokens in 16 bits.
        """
        parts = ["qweight", "scales"]
        parts += [] if self.packing.sym else ["qzeros"]
        parts += ["g_idx"] if self.packing.act_order else []
        names = [f"{layer}.{part}" for layer, _, _ in self.shape.linears() for part in parts]
        names += [*self.shape.norms(), "lm_head.weight"]
        return sum(self.checkpoint.tensors[name].nbytes for name in names) + self.others_bytes(context)

    def others_bytes(self, context: float) -> float:
        """Return the bytes of a row of the embedding and of the keys and values of `context` tokens, in 16 bits."""
        shape = self.shape
        return 2 * shape.hidden + 4 * context * shape.layers * shape.kv_heads * shape.head_dim

    def dense_count(self) -> int:
        """Return how many numbers a token needs read of the same model unpacked."""
        shape = self.shape
        linears = sum(k * n for _, k, n in shape.linears())
        return linears + shape.hidden * (shape.vocab + len(shape.norms()))


def model_cache() -> Path:
    """Return where models are kept: bench in $ROPEWALK_CACHE, or ropewalk/bench in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("ROPEWALK_CACHE")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ropewalk"), "bench").expanduser()


def packed_model(name: str, packing: Packing, root: Path, device: torch.device, *, rounded: bool = True) -> PackedModel:
    """Return a model from the cache, or make it: round normal random weights to nearest, and write the folder.

    The model with 1.1e9 parameters takes about 100 s on two cores, and 800 MB.

    Args:
        root: the cache.
        device: where to round.
        rounded: False for codes that are random themselves, which takes a hundredth of the time.

    Raises:
        UsageError: as `parse_shape`.
    """
    shape = parse_shape(name, packing)
    folder = root / f"{name}-{packing.name}-{'' if rounded else 'random-'}{RECIPE}"
    make_once(folder, lambda work: _write(shape, packing, work, device, rounded))
    return PackedModel(name, shape, packing, folder)


def make_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a model's folder, unless it is there, by a function that writes into an empty one; a folder of that name
    is always whole.
    """
    if (folder / "config.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (work / "finished").mkdir()
        write(work / "finished")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "finished").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(shape: Shape, packing: Packing, folder: Path, device: torch.device, rounded: bool) -> None:
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

    def normal(rows: int, columns: int) -> Tensor:
        # transformers' 0.02 at a width of 2048. With it at a width of 128 every token would attend to all others
        # alike, and a wrong rotation would change next to nothing.
        return torch.randn(rows, columns, device=device, generator=generator) / math.sqrt(columns)

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, normal(shape.vocab, shape.hidden).to("cpu", torch.float16)
    for name in shape.norms():
        ones = torch.ones(shape.hidden, dtype=torch.float16)
        # Random codes have a mean that is not their zero point: without changes of sign all channels would become one.
        yield name, ones if rounded else ones - 2 * torch.randint(2, ones.shape, generator=signs)
    for seed, (layer, k, n) in enumerate(shape.linears()):
        if not rounded:
            weight = random_weight(k, n, **packing._asdict(), device=device, seed=seed)
            # A quarter of its size is that of `normal`.
            parts = {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales / 4}
            for part, tensor in {**parts, "g_idx": weight.g_idx}.items():
                yield f"{layer}.{part}", tensor.cpu()
            continue
        order = torch.randperm(k, device=device, generator=generator) if packing.desc_act else None
        packed = quantize_rtn(
            normal(n, k), bits=packing.bits, group_size=packing.group_size, sym=packing.sym, order=order
        )
        for part, tensor in packed.items():
            yield f"{layer}.{part}", tensor.cpu()
