"""A packed Llama as a GGUF file for llama.cpp: the same codes and scales in blocks of Q4_0.

The layout is that of the GGUF specification, version 3 (ggml/docs/gguf.md); names of keys and tensors are those of
llama.cpp's "llama" architecture. It takes q and k for rotating neighbouring channels, so their rows are reordered as
its convert_hf_to_gguf.py does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.llamacpp import q4_0

_ALIGNMENT = 32
_BLOCK = 32  # numbers in a block of Q4_0 or Q8_0

# name -> (ggml_type, bytes of a block, numbers in it)
TYPES = {"F32": (0, 4, 1), "F16": (1, 2, 1), "Q4_0": (2, 18, _BLOCK), "Q8_0": (8, 34, _BLOCK)}

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
}


class Entry(NamedTuple):
    """A tensor of the file: rows x columns (rows None for a vector), and a function that returns its bytes, uint8."""

    name: str
    kind: str
    rows: int | None
    columns: int
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size."""
        _, size, numbers = TYPES[self.kind]
        return (self.rows or 1) * self.columns // numbers * size


def write_gguf(model: PackedModel, path: Path, head: str = "F16") -> None:
    """Write a model of 4 bits, symmetric and without act-order, whose groups blocks of 32 divide.

    Args:
        head: how the output embedding is kept: "F16" as in the folder, or rounded to "Q8_0".
    """
    part = path.with_name(path.name + ".part")
    _write(part, _metadata(model), list(_entries(model, head)))
    part.replace(path)


def q8_0(matrix: Tensor) -> Tensor:
    """Round [N, K] to ggml's blocks, uint8 [N, K / 32, 34]: a float16 scale, then 32 signed bytes."""
    blocks = matrix.float().reshape(matrix.shape[0], -1, _BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / torch.where(scales == 0, 1, scales)).to(torch.int8)
    return torch.cat([scales.to(torch.float16).view(torch.uint8), codes.view(torch.uint8)], -1)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder the first dimension for a rotation of neighbours: channels i and i + head_dim / 2 come side by side."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _metadata(model: PackedModel) -> dict[str, Any]:
    shape, config = model.shape, model.checkpoint.config
    return {
        "general.architecture": "llama",
        "general.name": f"{model.name}, random",
        "general.alignment": _ALIGNMENT,
        "general.file_type": 2,  # mostly Q4_0
        "llama.vocab_size": shape.vocab,
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": shape.hidden,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.ffn,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "tokenizer.ggml.model": "no_vocab",  # it is given token ids
    }


def _entries(model: PackedModel, head: str) -> Iterable[Entry]:
    shape, read = model.shape, model.checkpoint.read

    def raw(name: str, dtype: torch.dtype) -> Tensor:
        return read(name).to(dtype).view(torch.uint8)

    def packed(layer: str) -> Tensor:
        blocks = q4_0(model.weight(layer))
        heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(layer.rpartition(".")[2])
        return interleaved(blocks, heads) if heads else blocks

    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    yield Entry("token_embd.weight", "F16", shape.vocab, shape.hidden, lambda: raw(embedding, torch.float16))
    yield Entry(
        "output.weight",
        head,
        shape.vocab,
        shape.hidden,
        lambda: q8_0(read(output)) if head == "Q8_0" else raw(output, torch.float16),
    )
    for name in shape.norms():
        own = "output_norm.weight" if name == "model.norm.weight" else _own_name(name)
        yield Entry(own, "F32", None, shape.hidden, lambda name=name: raw(name, torch.float32))  # type: ignore[misc]
    for layer, k, n in shape.linears():
        yield Entry(_own_name(layer), "Q4_0", n, k, lambda layer=layer: packed(layer))  # type: ignore[misc]


def _own_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of a block."""
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{_NAMES[rest]}.weight"


def _write(path: Path, metadata: dict[str, Any], entries: list[Entry]) -> None:
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        head += _string(key)
        if isinstance(value, str):
            head += struct.pack("<I", 8) + _string(value)
        elif isinstance(value, float):
            head += struct.pack("<If", 6, value)
        else:
            head += struct.pack("<II", 4, value)
    offset = 0
    for entry in entries:
        sizes = (entry.columns,) if entry.rows is None else (entry.columns, entry.rows)  # the fastest one first
        head += _string(entry.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", TYPES[entry.kind][0], offset)
        offset += entry.nbytes + -entry.nbytes % _ALIGNMENT
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        for entry in entries:
            data = entry.read().contiguous().numpy().tobytes()
            assert len(data) == entry.nbytes, entry.name
            file.write(data + bytes(-len(data) % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
