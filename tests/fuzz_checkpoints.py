"""Checkpoints with faults, made by the thousand: each is loaded, or refused by an error of ropewalk's own.

    python tests/fuzz_checkpoints.py --count 50000 --workers 2
    python tests/fuzz_checkpoints.py --seed 4711 --count 1 --keep /tmp/case     one of them again, and its files

An input is one of a dozen small checkpoints with one to three faults (a bit of a header, a value of a config, a file
that is another), all drawn from its seed. It goes through `ropewalk.inspect` and `ropewalk.load`, and one model in
four through a forward pass. Everything but success and a RopewalkError is a failure: another exception, a crash, more
than 10 seconds of the processor's time, 300 MB, a file left open, something of torch or transformers left changed,
`load` and `inspect` of different opinions. Workers are forked, so that one may crash; the inputs lie in memory.
"""

from __future__ import annotations

import argparse
import builtins
import copy
import faulthandler
import gc
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch and tokenizers start threads, which a fork would lose
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

import ropewalk
from ropewalk.errors import RopewalkError
from ropewalk.gptq.format import unpack, zeros_v1_to_v2
from ropewalk.loader.safetensors_file import DTYPES as DTYPES_OF
from ropewalk.shipped import FOLDER

CPU_SECONDS = 10.0
IDLE_SECONDS = 240.0  # of the clock, without a result: it waits for something that never comes
MAX_GROWTH = 300 << 20
MAX_MESSAGE = 12_000

Files = dict[str, Any]  # name -> bytes, or one of the two below


@dataclass(frozen=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


@dataclass(frozen=True)
class Other:
    """Something else in place of a file: "folder" or "pipe"."""

    kind: str


# The checkpoints that faults are put into


def _conftest() -> Any:
    spec = importlib.util.spec_from_file_location("conftest_of_the_fuzzer", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_bases() -> dict[str, Files]:
    """Return name -> files of sound checkpoints."""
    shared = _conftest()
    pack, plain = shared.make_checkpoint.__wrapped__(), shared.make_plain.__wrapped__()
    with tempfile.TemporaryDirectory(dir=_memory()) as name:
        top = Path(name)
        pack(top / "llama")
        pack(top / "three", "codellama", bits=3, group_size=64, sym=False, checkpoint_format="gptq_v2")
        pack(top / "bias", "qwen2", bits=8, config_in="config.json", desc_act=False)
        pack(top / "bare", "mistral", bits=4, group_size=32, config_in="", file="x-4bit-32g.safetensors")
        pack(top / "mixtral", "mixtral", sizes={"num_hidden_layers": 1, "num_local_experts": 3})
        pack(top / "mpt", "mpt", sizes={"n_layers": 1})
        pack(top / "tokenizer", sizes={"num_hidden_layers": 1})
        pack(top / "old", group_size=-1, desc_act=False, with_g_idx=False, config_in="")
        pack(top / "marlin", group_size=-1, desc_act=False, with_g_idx=False, sizes={"intermediate_size": 128})
        (top / "plain").mkdir()
        plain(top / "plain")
        bases = {folder.name: {p.name: p.read_bytes() for p in folder.iterdir()} for folder in top.iterdir()}
    bases["shards"] = _in_shards(bases["llama"])
    for file in FOLDER.iterdir():
        if "token" in file.name or file.name in ("generation_config.json", "chat_template.jinja"):
            bases["tokenizer"][file.name] = file.read_bytes()
    old = bases["old"]
    old["llama-7b-4bit.pt"] = _saved(dict(_with_float_zeros(load_bytes(old.pop("model.safetensors")))))
    bases["marlin"]["model.safetensors"] = save_bytes(_to_marlin(load_bytes(bases["marlin"]["model.safetensors"])))
    settings = json.loads(bases["marlin"]["quantize_config.json"]) | {"is_marlin_format": True}
    bases["marlin"]["quantize_config.json"] = _json(settings)
    rules = {r"+:.*\.1\..*down_proj": {"group_size": 32}, r"-:.*embed": {}, r"lm_head": {"bits": 8}}
    bases["dynamic"] = bases["llama"] | {
        "quantize_config.json": _json(json.loads(bases["llama"]["quantize_config.json"]) | {"dynamic": rules})
    }
    return dict(sorted(bases.items()))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _saved(tensors: Any, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def _in_shards(files: Files) -> Files:
    tensors = load_bytes(files["model.safetensors"])
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        shards.setdefault(f"model-0000{i % 3 + 1}-of-00003.safetensors", {})[name] = tensor
    weight_map = {name: file for file, part in shards.items() for name in part}
    found = {name: content for name, content in files.items() if name != "model.safetensors"}
    found["model.safetensors.index.json"] = _json({"metadata": {"total_size": 1}, "weight_map": weight_map})
    return found | {file: save_bytes(part) for file, part in shards.items()}


def _with_float_zeros(tensors: dict[str, torch.Tensor]) -> Any:
    """Yield the tensors of a layer without groups as GPTQ-for-LLaMa had them until March 2023."""
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qzeros":
            zeros = unpack(zeros_v1_to_v2(tensor, 4), 4, dim=1)
            yield f"{layer}.zeros", (zeros * tensors[f"{layer}.scales"].float()).t().contiguous()
        elif part == "scales":
            yield name, tensor.float().t().contiguous()
        else:
            yield name, tensor


def _to_marlin(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return packed layers without groups as Marlin has them: see the bits in `ropewalk.loader.marlin`."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            codes = unpack(tensor, 4).numpy().astype(np.uint32)
            k, n = np.indices(codes.shape)
            words = np.zeros((codes.shape[0] // 16, codes.shape[1] * 2), dtype=np.uint32)
            lane, slot = n % 8 * 4 + k % 8 // 2, k % 2 * 4 + n // 8 % 2 * 2 + k // 8 % 2
            np.bitwise_or.at(words, (k // 16, n // 64 * 128 + lane * 4 + n // 16 % 4), codes << (4 * slot))
            found[f"{layer}.B"] = torch.from_numpy(words.view(np.int32))
        elif part == "scales":
            column = torch.arange(tensor.shape[1])
            at = column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2
            found[f"{layer}.s"] = torch.empty_like(tensor).index_copy_(1, at, tensor)
        elif part not in ("qzeros", "g_idx"):
            found[name] = tensor
    return found


# Faults: each changes the files that it is given

Rng = random.Random
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 4, 5, 7, 8, 31, 32, 63, 64, 65, 96, 100, 127, 128, 255, 1000, 4096, -128),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**12, 10**15, 10**30, 10**400, -(2**63)),
    *(0.0, 0.5, 1.0, 1.5, -0.5, 2.0, 4.0, 32.0, 1e-30, 1e30, 1e308, 1e-320, -1e308, 10000.0),
    *(float("nan"), float("inf"), float("-inf")),
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "4",
    "null",
    "float16",
    "gptq",
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    "x" * 4000,
)
NAMES = (
    *("", ".", "..", "/", "\0", "\ud800", "é", "a" * 300, "a" * 5000, "../model", "/etc/passwd", "__metadata__"),
    *("qweight", ".qweight", "model.qweight", "lm_head.qweight", "lm_head.weight", "B", "x.B", "x.s", "x.zeros"),
    *("model.layers.0.self_attn.q_proj.weight", "model.layers.00.mlp.up_proj.qweight", "model.layers.-1.x.qweight"),
    *("model.layers.99999999999.mlp.up_proj.qweight", "model.layers.0.block_sparse_moe.experts.7.w1.qweight"),
    *("model.layers.0.block_sparse_moe.experts.1.w1.weight", "model.rotary_emb.inv_freq", "transformer.wte.weight"),
    *("model.layers.0.mlp.experts.1.gate_proj.weight", "model.layers.0.mlp.experts.gate_up_proj", "x.attn.bias"),
)
DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "U16", "C64", "", "i32")
CONFIG_KEYS = (
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling"),
    *("rope_parameters", "original_max_position_embeddings", "partial_rotary_factor", "torch_dtype", "dtype"),
    *("hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "auto_map", "attn_implementation"),
    *("_attn_implementation", "initializer_range", "attention_dropout", "pretraining_tp", "layer_types", "num_experts"),
    *("num_local_experts", "num_experts_per_tok", "d_model", "n_heads", "n_layers", "expansion_ratio", "attn_config"),
    *("max_seq_len", "learned_pos_emb", "no_bias", "logit_scale", "norm_type", "is_encoder_decoder", "id2label"),
    *(
        "num_labels",
        "problem_type",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
    ),
    *("transformers_weights", "name_or_path", "_name_or_path", "transformers_version", "use_sliding_window"),
    *("max_window_layers", "pruned_heads", "text_config", "gradient_checkpointing", "cross_attention_hidden_size"),
    *("is_decoder", "tokenizer_class", "base_model_tp_plan", "custom_pipelines", "ntk_alpha", "mscale", "rotary_pct"),
)
MODEL_TYPES = (
    *(
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen2_moe",
        "mpt",
        "gpt_neox",
        "gptj",
        "opt",
        "bloom",
        "falcon",
    ),
    *(
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "stablelm",
        "bert",
        "t5",
        "whisper",
        "vit",
        "clip",
        "deepseek_v3",
    ),
    *("gpt2", "mamba", "gpt_bigcode", "cohere", "olmoe", "granite", "", "no-such-model", "..", "llama4", "auto"),
)
ROPES = (
    *("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "ntk", "partial-ntk", "ntk-by-parts", "x", 7),
    *("proportional", None, [], ""),
)
ROPE_KEYS = (
    *("type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "alpha"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor", "mscale", "rope_theta"),
    *(
        "mscale_all_dim",
        "partial_rotary_factor",
        "max_position_embeddings",
        "beta_0",
        "gamma_0",
        "truncate",
        "finetuned",
    ),
)
QUANT_KEYS = (
    *("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "quant_method", "method", "w_bit"),
    *("q_group_size", "groupsize", "wbits", "version", "is_marlin_format", "pack_dtype", "static_groups", "lm_head"),
    *("dynamic", "meta", "model_file_base_name", "damp_percent", "true_sequential", "zero_point", "modules_in_block"),
)
QUANT_VALUES = (
    *("gptq", "gptq_v2", "gptq_p", "marlin", "awq", "gemm", "GPTQ", "bitsandbytes", "int32", "torch.int64", "int16"),
    *("../model", "model", "\0", "a" * 300, "x-4bit-32g", "config"),
)
PATTERNS = (
    *("", "-:", "+:", ".*", "-:.*", "(", "[", "(?P<a>x)(?P<a>y)", "a" * 600, "x{99999}", "(.*)*(.*)*Q", "\\", "(?R)"),
    *("+:.*down", ".*up_proj", "(?i)MODEL", "((((((((((a))))))))))", "x{4294967296}", "^$", "(?s:.)" * 90, "\ud800"),
)
ODD_FILES: tuple[Any, ...] = (
    b"",
    b"\0" * 7,
    b"\0" * 4096,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"<!DOCTYPE html><html><body>not found</body></html>",
    b"PK\x03\x04" + b"\0" * 60,
    b"\x80\x02}q\x00.",
    b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x93.",
    b"cos\nsystem\n(S'true'\ntR.",
    b"GGUF\x03\x00\x00\x00" + b"\0" * 64,
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"[" * 200_000,
    b'{"a":' * 50_000,
    b"9" * 6000,
    b"1e999",
    b"NaN",
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    b"{'single': 1}",
    b'{"model_type": "llama"}',
    b"\x1f\x8b" + b"\0" * 100,
    Other("folder"),
    Other("pipe"),
    Link("/etc/hostname"),
    Link("/dev/zero"),
    Link("no-such-file"),
    Link("config.json"),
    Link(".."),
)


def _value(rng: Rng, old: Any = None) -> Any:
    """Return a value to put in place of another."""
    kind = rng.random()
    if isinstance(old, bool) and kind < 0.5:
        return not old
    if isinstance(old, (int, float)) and not isinstance(old, bool) and kind < 0.4 and abs(old) < 1e300:
        return rng.choice((old + 1, old - 1, old * 2, old // 2 if isinstance(old, int) else old / 2, -old, float(old)))
    return copy.deepcopy(rng.choice(NUMBERS if kind < 0.75 else OTHERS))


def _noise(rng: Rng, data: bytes, low: int = 0, high: int | None = None) -> bytes:
    """Change, insert or remove a few bytes between two places."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        high_now = min(len(found), len(data) if high is None else high)
        if high_now <= low:
            break
        at = rng.randrange(low, high_now)
        kind = rng.random()
        if kind < 0.6:
            found[at] = rng.choice((found[at] ^ (1 << rng.randrange(8)), rng.randrange(256), *b'0"{}[],:-.9e'))
        elif kind < 0.8:
            found[at:at] = rng.choice((b"\0", b"-", b"9", b'"', b",", b"null", b"true", rng.randbytes(4)))
        else:
            del found[at : at + rng.choice((1, 1, 4, 30))]
    return bytes(found)


def _of_kind(rng: Rng, files: Files, *suffixes: str) -> str | None:
    names = sorted(name for name, content in files.items() if name.endswith(suffixes) and isinstance(content, bytes))
    return rng.choice(names) if names else None


def _split(data: bytes) -> tuple[list[tuple[str, Any]], bytes]:
    """Return (header as pairs, tensors' bytes) of a sound .safetensors file."""
    length = struct.unpack("<q", data[:8])[0]
    return list(json.loads(data[8 : 8 + length]).items()), data[8 + length :]


def _joined(pairs: list[tuple[str, Any]], data: bytes) -> bytes:
    text = b"{" + b",".join(_json(name) + b":" + _json(entry) for name, entry in pairs) + b"}"
    return struct.pack("<q", len(text)) + text + data


def header_bytes(rng: Rng, files: Files) -> None:
    """Bytes of a header."""
    name = _of_kind(rng, files, ".safetensors")
    if name is not None:
        data = files[name]
        length = min(struct.unpack("<q", data[:8].ljust(8, b"\0"))[0], len(data))
        changed = _noise(rng, data, 8, max(8 + length, 8))
        if rng.random() < 0.7:  # with the length that the header has now
            changed = struct.pack("<q", max(length + len(changed) - len(data), 0)) + changed[8:]
        files[name] = changed


def header_length(rng: Rng, files: Files) -> None:
    """The length of a header."""
    name = _of_kind(rng, files, ".safetensors")
    if name is not None:
        data = files[name]
        length = struct.unpack("<q", data[:8].ljust(8, b"\0"))[0]
        odd = (0, 1, 2, -1, length + 1, length - 1, length + 8, len(data), len(data) - 8, 100_000_000, 100_000_001)
        odd += (2**31, 2**62, 2**63 - 1, -(2**63), rng.getrandbits(63), rng.randrange(2 * len(data) + 1))
        files[name] = struct.pack("<Q", rng.choice(odd) % 2**64) + data[8:]


def header_entries(rng: Rng, files: Files) -> None:
    """What a header says of some tensors, with the tensors as they are."""
    name = _of_kind(rng, files, ".safetensors")
    if name is None:
        return
    try:
        pairs, data = _split(files[name])
    except (ValueError, struct.error, AttributeError, RecursionError):
        return
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not pairs:
            break
        at = rng.randrange(len(pairs))
        key, entry = pairs[at]
        if not isinstance(entry, dict) or "shape" not in entry or not isinstance(entry["shape"], list):
            continue
        entry = copy.deepcopy(entry)
        shape, offsets = entry["shape"], entry.get("data_offsets")
        kind = rng.randrange(11)
        if kind == 0:
            entry["dtype"] = rng.choice((*DTYPES, _value(rng)))
        elif kind == 1:
            entry["shape"] = rng.choice((shape[::-1], [*shape, 1], shape[1:], [1, *shape], [], [_product(shape)], 7))
        elif kind == 2 and shape:
            shape[rng.randrange(len(shape))] = _value(rng, shape[0])
        elif kind == 3 and isinstance(offsets, list) and offsets:
            offsets[rng.randrange(len(offsets))] = _value(rng, offsets[0])
        elif kind == 4 and isinstance(offsets, list):
            step = rng.choice((1, 2, 4, 64, 10**6))
            entry["data_offsets"] = rng.choice(
                (offsets[::-1], [*offsets, 0], [o + step for o in offsets if isinstance(o, int)], offsets[:1])
            )
        elif kind == 5:
            key = rng.choice((*NAMES, key + ".x", key[:-1], key.upper(), pairs[rng.randrange(len(pairs))][0]))
        elif kind == 6:
            pairs.insert(rng.randrange(len(pairs) + 1), (rng.choice(NAMES), copy.deepcopy(entry)))
        elif kind == 7:
            del pairs[at]
            continue
        elif kind == 8:
            other = rng.randrange(len(pairs))
            pairs[other], (key, entry) = (pairs[other][0], entry), (key, pairs[other][1])
        elif kind == 9:
            entry = rng.choice((_value(rng), {**entry, "x": 1}, {k: v for k, v in entry.items() if k != "dtype"}))
        else:
            pairs.append(("__metadata__", rng.choice(({"format": "pt"}, {"a": 1}, [], 7, None, entry))))
        pairs[at if at < len(pairs) else -1] = (key, entry)
    files[name] = _joined(pairs, data)


def _safetensors(found: dict[str, torch.Tensor]) -> bytes:
    """Return a file of tensors, whatever their names."""
    pairs, parts, at = [], [], 0
    for name, tensor in found.items():
        kind = next((key for key, dtype in DTYPES_OF.items() if dtype == tensor.dtype), "F8_E4M3")
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        entry = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + len(parts[-1])]}
        pairs.append((name, entry))
        at += len(parts[-1])
    return _joined(pairs, b"".join(parts))


def _product(shape: list[Any]) -> Any:
    product = 1
    for n in shape:
        product *= n if isinstance(n, int) else 1
    return product


def tensors(rng: Rng, files: Files) -> None:
    """Tensors themselves, in a file whose header says what they are."""
    name = _of_kind(rng, files, ".safetensors", ".pt", ".bin")
    if name is None:
        return
    safe = name.endswith(".safetensors")
    try:
        found = dict(load_bytes(files[name]) if safe else torch.load(io.BytesIO(files[name]), weights_only=True))
    except Exception:  # another fault was here before
        return
    if not all(
        isinstance(t, torch.Tensor) and t.layout == torch.strided and t.numel() < 1 << 20 for t in found.values()
    ):
        return
    for _ in range(rng.choice((1, 1, 1, 2, 6))):
        _change_tensor(rng, found)
    if safe:
        files[name] = _safetensors(found)
        return
    content: Any = found
    kind = rng.randrange(14)
    key = rng.choice(sorted(found)) if found else "x"
    odd: tuple[Callable[[], Any], ...] = (
        lambda: {"state_dict": found},
        lambda: {"model": found, "x": 1},
        lambda: [found],
        lambda: found | {key: torch.ones(1).expand(1 << 40)},
        lambda: found | {key: torch.ones(4).to_sparse()},
        lambda: found | {key: torch.ones(4, dtype=torch.complex64)},
        lambda: found | {key: torch.ones(4, 4).t()},
        lambda: found | {key: np.ones(4)},
        lambda: found | {key: torch.empty(1 << 40, device="meta")},
        lambda: found | {7: torch.ones(1), key: "text", "t": (torch.ones(1),)},
        lambda: found | {key: torch.nn.Linear(1, 1)},
        lambda: torch.ones(3),
    )
    if kind < len(odd):
        content = odd[kind]()
    files[name] = _saved(content, old=rng.random() < 0.3)


def _change_tensor(rng: Rng, found: dict[str, torch.Tensor]) -> None:
    if not found:
        return
    key = rng.choice(sorted(found))
    if rng.random() < 0.6:  # most tensors are plain; those of packed layers are more of a target
        packed = [n for n in found if n.endswith(("qweight", "qzeros", "scales", "g_idx", "zeros", ".B", ".s"))]
        key = rng.choice(sorted(packed)) if packed else key
    tensor = found[key]
    kind = rng.randrange(12)
    if kind == 0:
        del found[key]
    elif kind == 1:
        found[rng.choice((*NAMES[5:], key + "2", key.replace("0", "1")))] = found.pop(key)
    elif kind == 2:
        to = (torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16, torch.uint8, torch.float64)
        found[key] = tensor.to(rng.choice((*to, torch.bool, torch.int16)))
    elif kind == 3 and tensor.ndim:
        dim = rng.randrange(tensor.ndim)
        found[key] = tensor.narrow(dim, 0, rng.choice((0, tensor.shape[dim] // 2, max(tensor.shape[dim] - 1, 0))))
    elif kind == 4 and tensor.ndim:
        found[key] = torch.cat((tensor, tensor[:1]))
    elif kind == 5:
        found[key] = rng.choice((tensor.reshape(-1), tensor[None], tensor.reshape(-1)[:1].reshape(()) if tensor.numel()
                                 else tensor, tensor.transpose(0, -1) if tensor.ndim else tensor))  # fmt: skip
    elif kind == 6 and tensor.is_floating_point() and tensor.numel():
        odd = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 6e-8, 65504.0, -65504.0)
        _set_one(rng, found, key, rng.choice(odd))
    elif kind in (6, 7) and not tensor.is_floating_point() and tensor.numel() and tensor.dtype != torch.bool:
        low, high = torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max
        _set_one(rng, found, key, rng.choice((0, 1, 2, 3, 99, high, low, max(low, -1), high - 1)))
    elif kind == 8:
        noise = np.frombuffer(rng.randbytes(tensor.numel() * tensor.itemsize), dtype=np.uint8).copy()
        if tensor.numel() and tensor.dtype != torch.bool:
            found[key] = torch.from_numpy(noise).view(tensor.dtype).reshape(tensor.shape)
    elif kind == 9:
        other = rng.choice(sorted(found))
        found[key], found[other] = found[other], found[key]
    elif kind == 10:
        found[rng.choice(NAMES[5:])] = tensor.clone()
    elif kind == 11:
        found[key.rpartition(".")[0] + rng.choice((".weight", ".bias", ".qzeros", ".zeros", ".B", ".s"))] = (
            tensor.clone()
        )


def _set_one(rng: Rng, found: dict[str, torch.Tensor], key: str, value: Any) -> None:
    flat = found[key].reshape(-1).clone()
    flat[rng.randrange(len(flat)) if rng.random() < 0.7 else slice(None)] = value
    found[key] = flat.reshape(found[key].shape)


def _edit_json(rng: Rng, files: Files, name: str | None, change: Callable[[Any], None]) -> None:
    if name is None or not isinstance(files.get(name), bytes):
        return
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict):
        change(content)
        files[name] = _json(content)


def _rope(rng: Rng) -> Any:
    found = {rng.choice(("rope_type", "type")): rng.choice(ROPES)}
    for key in rng.sample(ROPE_KEYS, rng.randrange(5)):
        long = key.endswith("_factor") and rng.random() < 0.4
        found[key] = [_value(rng) if rng.random() < 0.1 else 1.5] * rng.choice((0, 1, 16, 32)) if long else _value(rng)
    return found if rng.random() < 0.9 else {"full_attention": found, "sliding_attention": found}


def config(rng: Rng, files: Files) -> None:
    """Values of config.json."""

    def change(content: dict[str, Any]) -> None:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            key = rng.choice(sorted(content) if content and rng.random() < 0.5 else CONFIG_KEYS)
            kind = rng.random()
            if key == "model_type":
                content[key] = rng.choice(MODEL_TYPES) if kind < 0.9 else _value(rng)
            elif key in ("rope_scaling", "rope_parameters") and kind < 0.8:
                content[key] = _rope(rng)
            elif key == "quantization_config" and kind < 0.8:
                content[key] = _quantization(rng, {"bits": 4, "group_size": 32, "quant_method": "gptq"})
            elif key in ("hidden_act", "dtype", "torch_dtype", "layer_types") and kind < 0.6:
                odd = ("gelu", "silu", "relu2", "xyz", "int8", "float64", "torch.float16", "full_attention")
                content[key] = rng.choice((*odd, ["full_attention"] * 2, ["sliding_attention"] * 2, ["x"]))
            elif isinstance(content.get(key), dict) and content[key] and kind < 0.8:
                content[key][rng.choice(sorted(content[key]))] = _value(rng)
            elif kind < 0.15:
                content.pop(key, None)
            else:
                content[key] = _value(rng, content.get(key))

    _edit_json(rng, files, "config.json", change)


def _quantization(rng: Rng, content: dict[str, Any]) -> dict[str, Any]:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key, kind = rng.choice(QUANT_KEYS), rng.random()
        if key == "dynamic" and kind < 0.9:
            chosen = rng.sample(PATTERNS, rng.randrange(1, 4))
            content[key] = {p: rng.choice(({}, _quantization(rng, {}), {"bits": 8}, _value(rng))) for p in chosen}
        elif kind < 0.15:
            content.pop(key, None)
        elif kind < 0.45:
            content[key] = rng.choice(QUANT_VALUES)
        else:
            content[key] = _value(rng, content.get(key))
    return content


def quantize_config(rng: Rng, files: Files) -> None:
    """Values of a quantize_config.json, or one beside it."""
    name = rng.choice(("quantize_config.json", "quantize_config.json", "quantize_config.json", "quant_config.json"))
    if name not in files and rng.random() < 0.5:
        files[name] = _json({"bits": 4, "group_size": 32, "desc_act": True, "sym": True})
    _edit_json(rng, files, name, lambda content: content.update(_quantization(rng, content)))


def index(rng: Rng, files: Files) -> None:
    """Values of an index of shards, or one that was not there."""
    name = "model.safetensors.index.json"
    if name not in files:
        files[name] = _json({"weight_map": dict.fromkeys(rng.sample(NAMES, 3), "model.safetensors")})

    def change(content: dict[str, Any]) -> None:
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or rng.random() < 0.1:
            content["weight_map"] = _value(rng)
            return
        key = rng.choice(sorted(weight_map))
        to = ("../x.safetensors", "/etc/passwd", "config.json", ".x.safetensors", "no.safetensors", "a/b.safetensors")
        to += (
            "model.safetensors",
            "C:x.safetensors",
            "a" * 300 + ".safetensors",
            "\0.safetensors",
            "\ud800.bin",
            ".bin",
        )
        to += ("x.bin", "x.pt", *sorted(set(map(str, weight_map.values()))))
        kind = rng.randrange(5)
        if kind == 0:
            del weight_map[key]
        elif kind == 1:
            weight_map[rng.choice(NAMES)] = weight_map[key]
        elif kind == 2:
            weight_map[key] = _value(rng)
        else:
            weight_map[key] = rng.choice(to)

    _edit_json(rng, files, name, change)


def json_bytes(rng: Rng, files: Files) -> None:
    """Bytes of a config."""
    name = _of_kind(rng, files, ".json", ".jinja")
    if name is not None:
        files[name] = _noise(rng, files[name])


def file_bytes(rng: Rng, files: Files) -> None:
    """Bytes of any file: some changed, the end cut off, more at the end."""
    name = _of_kind(rng, files, "")
    if name is not None:
        data, kind = files[name], rng.random()
        if kind < 0.4:
            files[name] = _noise(rng, data, 0, rng.choice((None, 64, 4096)))
        elif kind < 0.8:
            files[name] = data[: rng.choice((rng.randrange(len(data) + 1), rng.randrange(16), max(len(data) - 1, 0)))]
        else:
            files[name] = data + rng.choice((b"\0", b"\n", rng.randbytes(50), data[:100]))


def pickle_bytes(rng: Rng, files: Files) -> None:
    """Bytes of the instructions of a pickle."""
    name = _of_kind(rng, files, ".pt", ".bin")
    if name is not None:
        at = max(files[name].find(b"data.pkl"), 0)
        files[name] = _noise(rng, files[name], at, at + rng.choice((64, 1500, 12_000)))


def another_file(rng: Rng, files: Files) -> None:
    """A file that is something else, another file, or nothing."""
    name = rng.choice(sorted(files))
    kind = rng.randrange(7)
    if kind <= 2:
        files[name] = rng.choice(ODD_FILES)
    elif kind == 3:
        del files[name]
    elif kind == 4:
        other = rng.choice(sorted(files))
        files[name], files[other] = files[other], files[name]
    elif kind == 5:
        new = ("model.safetensors", "model.pt", "pytorch_model.bin", "y.safetensors", "x.bin", "config.json", "a.gguf")
        files[rng.choice(new)] = files.pop(name)
    else:
        new = ("y.safetensors", "adapter_model.safetensors", "training_args.bin", "model.safetensors.index.json")
        files[rng.choice((*new, "pytorch_model.bin.index.json", "quant_config.json", "x-4bit.pt"))] = files[name]


def beside(rng: Rng, files: Files) -> None:
    """What lies beside the weights: the tokenizer's files, generation_config.json, code."""
    code = b"open('RAN', 'w')\nraise SystemExit('ran')\n"
    kind = rng.randrange(6)
    if kind == 0:
        content = {key: _value(rng) for key in rng.sample(GENERATION_KEYS, rng.randrange(1, 4))}
        files["generation_config.json"] = _json(content)
    elif kind == 1:
        names = (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
        )
        files[rng.choice((*names, "tokenizer.model", "chat_template.jinja", "merges.txt"))] = rng.choice(ODD_FILES)
    elif kind == 2:
        _edit_json(
            rng, files, "tokenizer_config.json", lambda c: c.update({rng.choice(sorted(c) or ["x"]): _value(rng)})
        )
    elif kind == 3:
        at = _of_kind(rng, files, "tokenizer.json")
        _edit_json(rng, files, at, lambda c: c.update({rng.choice(sorted(c) or ["model"]): _value(rng)}))
    elif kind == 4:
        auto = {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.T", "evil.T"],
        }
        _edit_json(rng, files, "config.json", lambda content: content.update(auto_map=auto))
        files["tokenizer_config.json"] = _json(
            {"auto_map": auto, "tokenizer_class": rng.choice(("T", "LlamaTokenizer"))}
        )
        files |= dict.fromkeys(("evil.py", "modeling_evil.py", "sitecustomize.py"), code)
    else:
        files["custom_generate"] = Other("folder")
        files["custom_generate/generate.py"] = code


GENERATION_KEYS = (
    *("max_new_tokens", "max_length", "temperature", "top_p", "top_k", "do_sample", "num_beams", "eos_token_id"),
    *(
        "pad_token_id",
        "bos_token_id",
        "cache_implementation",
        "use_cache",
        "repetition_penalty",
        "transformers_version",
    ),
    *(
        "stop_strings",
        "guidance_scale",
        "compile_config",
        "watermarking_config",
        "custom_generate",
        "_from_model_config",
    ),
)

FAULTS: tuple[tuple[Callable[[Rng, Files], None], float], ...] = (
    (header_bytes, 10),
    (header_length, 3),
    (header_entries, 14),
    (tensors, 14),
    (config, 16),
    (quantize_config, 12),
    (index, 4),
    (json_bytes, 8),
    (file_bytes, 6),
    (pickle_bytes, 3),
    (another_file, 7),
    (beside, 5),
)
# How often a base is taken: those that take longer, less often.
WEIGHTS = {"llama": 8, "shards": 4, "old": 4, "mixtral": 2, "plain": 1, "tokenizer": 1, "dynamic": 2}


@dataclass
class Input:
    """One of the inputs.

    Attributes:
        what: in words: the base and its faults.
        files: what is in its folder.
        options: what `inspect` and `load` are called with.
        forward: whether the model is used as well.
    """

    what: str
    files: Files
    options: dict[str, Any] = field(default_factory=dict)
    forward: bool = False


def make_input(seed: int, bases: dict[str, Files]) -> Input:
    """Return the input of a seed."""
    rng = random.Random(seed)
    base = rng.choices(list(bases), [WEIGHTS.get(name, 3) for name in bases])[0]
    files = dict(bases[base])
    faults = rng.choices(*zip(*FAULTS, strict=True), k=rng.choices((0, 1, 2, 3), (1, 60, 28, 11))[0])
    if base == "old" and faults and rng.random() < 0.6:  # the only one that is a pickle
        faults[0] = rng.choice((pickle_bytes, tensors, file_bytes))
    for fault in faults:
        if files:
            fault(rng, files)
    options = {}
    if rng.random() < 0.05:
        options = rng.choice(({"bits": 4}, {"bits": 8}, {"group_size": 32}, {"bits": 3, "group_size": -1}))
        options = rng.choice((options, {"rope": rng.choice(("none", "linear:2", "yarn", "dynamic:2", "ntk:4"))}))
    what = f"{base}: {', '.join(fault.__name__ for fault in faults) or 'no fault'} {options or ''}".strip()
    return Input(what, files, options, forward=rng.random() < 0.25)


def write(files: Files, folder: Path) -> None:
    """Write an input into a folder, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in sorted(files.items()):
        path = folder / name
        if not path.parent.is_dir():
            continue
        if isinstance(content, Link):
            path.symlink_to(content.target)
        elif isinstance(content, Other) and content.kind == "pipe":
            os.mkfifo(path)
        elif isinstance(content, Other):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)


# The oracle


def host_state() -> dict[str, Any]:
    """Return what a load that fails must leave as it was: of torch, transformers, accelerate and this process."""
    import transformers
    from torch import nn
    from transformers import modeling_rope_utils

    from ropewalk.loader import apply_rotary, peft_hook
    from ropewalk.patches import transformers as patch

    kept = {
        "replaced rotations": dict(apply_rotary._originals),
        "PEFT": peft_hook.is_enabled(),
        "patch": patch.status()["applied"],
        "rope types": sorted(modeling_rope_utils.ROPE_INIT_FUNCTIONS),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads of torch": torch.get_num_threads(),
        "environment": {name: text for name, text in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "folder": os.getcwd(),
        "path": list(sys.path),
        "remote code": sorted(name for name in sys.modules if name.startswith("transformers_modules")),
    }
    for owner, names in (
        (transformers.PreTrainedModel, ("__init__", "from_pretrained", "_from_config", "init_weights", "tie_weights")),
        (nn.Module, ("register_parameter", "register_buffer", "__init__", "__setattr__", "_apply", "to")),
        (nn.init, tuple(name for name in dir(nn.init) if name.endswith("_"))),
        (torch, ("empty", "zeros", "ones", "full", "tensor", "rand", "randn", "arange", "linspace")),
        (torch.Tensor, ("normal_", "uniform_", "zero_", "fill_", "to")),
    ):
        where = getattr(owner, "__name__", str(owner))
        kept |= {f"{where}.{name}": vars(owner).get(name) for name in names}
    return kept


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what has changed."""
    return [name for name in before if before[name] is not after[name] and before[name] != after[name]]


def _status(*names: str) -> list[int]:
    """Return figures of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) << 10 for name in names]


def open_files() -> int:
    """Return how many files this process has open; 0 where it cannot be told."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def _message(error: BaseException) -> str | None:
    """Return what is wrong with the message of an error of ropewalk's."""
    text = str(error)
    if len(text) > MAX_MESSAGE:
        return f"a message of {len(text)} characters: {text[:200]!r}"
    if not (("expected" in text or "asked" in text) and "found" in text):
        return f"a message without what was expected and found: {text!r}"
    return None


def run(seed: int, bases: dict[str, Files], folder: Path, forward: bool = False) -> tuple[str, str | None]:
    """Try the input of a seed; return what `check` does."""
    item = make_input(seed, bases)
    item.forward = item.forward or forward
    outcome, fault = check(item, folder)
    return outcome, None if fault is None else f"{item.what}: {fault}"


def check(item: Input, folder: Path) -> tuple[str, str | None]:
    """Write an input and try it; return (its outcome in a word, what is wrong or None)."""
    write(item.files, folder)
    before, files = host_state(), open_files()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    (memory,) = _status("VmRSS")
    outcome, fault = _try(item, folder)
    (peak,) = _status("VmHWM")
    if fault is None and peak - memory > MAX_GROWTH:
        fault = f"{(peak - memory) >> 20} MB of memory"
    if fault is None and outcome != "loaded" and (changed := differences(before, host_state())):
        fault = f"left changed: {', '.join(changed)}"
    if fault is None and open_files() > files:
        gc.collect()
        if open_files() > files:
            fault = f"{open_files() - files} files left open"
    if fault is None and (list(folder.glob("**/RAN")) or Path("RAN").exists()):
        fault = "code of the checkpoint was run"
    return outcome, fault


def _try(item: Input, folder: Path) -> tuple[str, str | None]:
    asked: list[str] = []
    original = builtins.input
    builtins.input = lambda *prompt: asked.append(str(prompt)) or "n"
    try:
        outcome, fault = _inspect_and_load(item, folder)
    finally:
        builtins.input = original
    return ("question", f"asked the user {asked[0][:300]}") if asked else (outcome, fault)


def _inspect_and_load(item: Input, folder: Path) -> tuple[str, str | None]:
    seen: list[type[BaseException] | None] = []
    for call in (ropewalk.inspect, _load_and_use(item.forward)):
        try:
            call(folder, **item.options)
            seen.append(None)
        except RopewalkError as error:
            seen.append(type(error))
            if odd := _message(error):
                return type(error).__name__, f"{type(error).__name__} with {odd}"
        except BaseException as error:  # which may be a panic of Rust's
            if isinstance(error, KeyboardInterrupt):
                raise
            return type(error).__name__, _where(error)
    inspected, loaded = seen
    if inspected is not None and inspected is not loaded:
        name = loaded and loaded.__name__
        return inspected.__name__, f"inspect raises {inspected.__name__}, load {name or 'nothing'}"
    return ("loaded" if loaded is None else loaded.__name__), None


def _where(error: BaseException) -> str:
    """Return what was raised, and in which lines of ours, the last first."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    shown = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[:-8:-1]]
    return f"{type(error).__name__}: {str(error)[:300]!r} in {', '.join(shown)}"


def _load_and_use(forward: bool) -> Callable[..., None]:
    def load(folder: Path, **options: Any) -> None:
        model, _ = ropewalk.load(folder, device_map="cpu", **options)
        if forward:
            ids = torch.arange(5)[None]
            with torch.inference_mode():
                logits = model(ids).logits
            if logits.shape != (1, 5, model.config.vocab_size):
                raise AssertionError(f"logits of shape {list(logits.shape)}")

    return load


# Workers


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _work(seeds: range, bases: dict[str, Files], folder: Path, forward: bool, pipe: Any) -> None:
    faulthandler.enable()
    os.chdir(folder.parent)
    limit = _status("VmSize")[0] + (6 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in seeds:
        pipe.send((seed, None, None, 0.0))
        start = time.process_time()
        outcome, fault = run(seed, bases, folder, forward)
        pipe.send((seed, outcome, fault, time.process_time() - start))
    pipe.close()


class _Worker:
    """A process with seeds of its own, started again behind an input that it did not survive."""

    def __init__(self, seeds: range, bases: dict[str, Files], folder: Path, forward: bool):
        self.seeds, self.bases, self.folder, self.forward = seeds, bases, folder, forward
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = (self.seeds, self.bases, self.folder, self.forward, theirs)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.current: int | None = None
        self.since = self.spent = 0.0

    def processor_time(self) -> float:
        """Return how many seconds the processor has worked for it, children that it waited for among them."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return self.spent
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def poll(self) -> tuple[list[tuple[int, str, str | None, float]], bool]:
        """Return (results that came in, whether there are more to come)."""
        results: list[tuple[int, str, str | None, float]] = []
        try:
            while self.pipe.poll():
                seed, outcome, fault, seconds = self.pipe.recv()
                if outcome is None:
                    self.current, self.since, self.spent = seed, time.monotonic(), self.processor_time()
                else:
                    results.append((seed, outcome, fault, seconds))
                    self.current = None
                    self.seeds = range(seed + self.seeds.step, self.seeds.stop, self.seeds.step)
        except EOFError:
            self.process.join()
            if self.current is None and self.process.exitcode == 0:
                return results, False
            return results, self._lost(results, f"the process ended with {self.process.exitcode}", "crash")
        if self.current is not None:
            if self.processor_time() - self.spent > CPU_SECONDS:
                return results, self._lost(results, f"more than {CPU_SECONDS:g} s of the processor", "hang")
            if time.monotonic() - self.since > IDLE_SECONDS:
                return results, self._lost(results, f"waits for more than {IDLE_SECONDS:g} s", "hang")
        return results, True

    def _lost(self, results: list[tuple[int, str, str | None, float]], why: str, outcome: str) -> bool:
        self.process.kill()
        self.process.join()
        seed = self.seeds.start if self.current is None else self.current
        results.append((seed, outcome, why, self.processor_time() - self.spent))
        self.seeds = range(seed + self.seeds.step, self.seeds.stop, self.seeds.step)
        if self.seeds:
            self.start()
        return bool(self.seeds)


def fuzz(seed: int, count: int, workers: int = 1, forward: bool = False, stop_after: int = 20) -> dict[str, Any]:
    """Try `count` inputs from `seed` on; return {"outcomes", "failures", "slowest", "seconds"}."""
    from transformers.utils import logging as logging_of_transformers

    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about configs of 2023
    logging.disable(logging.ERROR)
    logging_of_transformers.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bases = make_bases()
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    slowest: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(dir=_memory(), prefix="ropewalk-fuzz-") as name:
        for files in bases.values():  # what is imported and built once is none of their costs
            write(files, Path(name) / "base")
            _load_and_use(True)(Path(name) / "base")
            ropewalk.inspect(Path(name) / "base")
        start = time.monotonic()
        running = [
            _Worker(range(seed + i, seed + count, workers), bases, Path(name) / str(i) / "model", forward)
            for i in range(workers)
            if (Path(name) / str(i)).mkdir() is None
        ]
        every = list(running)
        while running and len(failures) < stop_after:
            time.sleep(0.05)
            for worker in list(running):
                results, more = worker.poll()
                for number, outcome, fault, seconds in results:
                    outcomes[outcome] += 1
                    slowest = sorted([*slowest, (seconds, number)], reverse=True)[:8]
                    if fault is not None:
                        failures.append((number, fault))
                        print(f"seed {number}: {fault}", file=sys.stderr, flush=True)
                if not more:
                    running.remove(worker)
        for worker in every:
            worker.process.kill()
            worker.process.join()
    seconds = time.monotonic() - start
    return {"outcomes": outcomes, "failures": failures, "slowest": slowest, "seconds": seconds, "bases": bases}


def main() -> int:
    """Fuzz as the arguments say; return 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--count", type=int, default=1000, help="how many inputs")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--forward", action="store_true", help="use every model that loads, not one in four")
    parser.add_argument("--stop-after", type=int, default=20, help="so many failures")
    parser.add_argument("--keep", type=Path, help="a folder for the files of the first input")
    arguments = parser.parse_args()
    found = fuzz(arguments.seed, arguments.count, arguments.workers, arguments.forward, arguments.stop_after)
    if arguments.keep is not None:
        item = make_input(arguments.seed, found["bases"])
        write(item.files, arguments.keep)
        print(f"{item.what}, in {arguments.keep}")
    tried = sum(found["outcomes"].values())
    print(f"{tried} inputs in {found['seconds']:.0f} s, {tried / found['seconds']:.0f} a second")
    for outcome, number in found["outcomes"].most_common():
        print(f"{number:8} {outcome}")
    shown = ", ".join(f"{seconds:.2f} s (seed {seed})" for seconds, seed in found["slowest"])
    print(f"slowest: {shown}")
    print(f"failures: {len(found['failures'])}" + (": seeds " if found["failures"] else ""), end="")
    print(*sorted(seed for seed, _ in found["failures"]))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
