"""Which files hold the weights, and what a pickle among them may contain."""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ropewalk.errors import (
    CheckpointError,
    MissingFileError,
    PickleFileError,
    TensorEntryError,
    UnsafePickleError,
)
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader import pickle_file
from ropewalk.loader.checkpoint import open_checkpoint

ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
PLAIN = {"model.embed_tokens.weight": torch.zeros(8, 4), "model.norm.weight": torch.ones(4)}


def layer(rows=256, columns=128, seed=0, **settings):
    """One layer in the checkpoint layout, with random weights and without a bias."""
    settings = {"bits": 4, "group_size": 128, "sym": True} | settings
    generator = torch.Generator().manual_seed(seed)
    return quantize_rtn(torch.randn(columns, rows, generator=generator), **settings)


def write(folder, layers, settings=None, file="model.safetensors", config_in="quantize_config.json", **config):
    """Write a folder: layers, name -> part -> tensor, into one file; settings into one config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    tensors = {f"{name}.{part}": t.contiguous() for name, parts in layers.items() for part, t in parts.items()}
    tensors |= PLAIN
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    if settings is not None:
        (folder / config_in).write_text(json.dumps(settings))
    return folder


def parts_of(checkpoint, name=ATTENTION):
    with checkpoint.reader() as reader:
        return {part: t.clone() for part, t in reader.read_layer(checkpoint.layers[name]).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for part, tensor in expected.items():
        assert found[part].dtype == tensor.dtype and torch.equal(found[part], tensor), part


def refuses(folder, error, *texts, **arguments):
    with pytest.raises(error) as caught:
        open_checkpoint(folder, **arguments)
    for text in texts:
        assert text in str(caught.value)


# Pickles


def test_all_that_torch_writes(tmp_path):
    expected = layer() | {"bias": torch.arange(128).half()}
    tensors = OrderedDict((f"{ATTENTION}.{part}", tensor) for part, tensor in expected.items())
    tensors |= PLAIN
    shared = torch.arange(64.0)
    tensors["a"], tensors["b"], tensors["c"] = shared, shared[8:], shared.view(8, 8).t()
    tensors["p"] = torch.nn.Parameter(torch.ones(3))
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 3), torch.tensor(2.5)
    tensors["bool"], tensors["bf16"] = torch.tensor([True, False]), torch.ones(2, dtype=torch.bfloat16)
    tensors._metadata = OrderedDict({"": {"version": 1}})
    settings = {"bits": 4, "group_size": 128}
    for wrapped in (tensors, {"state_dict": tensors, "epoch": 3}, {"model": tensors}, {**tensors, "step": 7}):
        for old in (False, True):
            folder = write(tmp_path, {}, settings)
            (folder / "model.safetensors").unlink()
            file = folder / "pytorch_model.bin"
            torch.save(wrapped, file, _use_new_zipfile_serialization=not old)
            checkpoint = open_checkpoint(folder)
            same(parts_of(checkpoint), expected)
            for name, tensor in tensors.items():
                found = checkpoint.read(name)
                assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
                assert checkpoint.tensors[name].nbytes == tensor.numel() * tensor.itemsize
            assert [w for w in checkpoint.warnings if "left out" in w] == (
                ["pytorch_model.bin: left out what is no tensor: step"] if "step" in wrapped else []
            )
            if not old:  # mapped, so nothing has been read
                assert checkpoint.tensors["a"].tensor.untyped_storage().nbytes() >= 256


class Forbidden:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("bomb", "named"),
    [
        (Forbidden(print, "boo"), "builtin"),
        (Forbidden(eval, "1/0"), "builtin"),
        (Forbidden(bytearray, 1 << 50), "bytearray"),
        (Forbidden(torch.Tensor, 1 << 50), "torch.Tensor"),
        (np.arange(3), "numpy"),
        ({1, 2}, "set"),
    ],
)
def test_a_pickle_that_does_anything_else_is_refused(tmp_path, monkeypatch, old, bomb, named):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"x": torch.ones(2), "y": bomb}, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    refuses(tmp_path, UnsafePickleError, "x.pt: expected tensors and nothing else", "have it converted", named)


def test_a_torch_that_is_not_safe(tmp_path, monkeypatch):
    write(tmp_path, {}, None, file="x.pt")
    assert open_checkpoint(tmp_path).tensors
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    monkeypatch.setattr(pickle_file, "torch_is_safe", lambda: False)
    refuses(tmp_path, UnsafePickleError, "torch 2.10 or later to read a pickle safely", torch.__version__)
    monkeypatch.undo()
    assert [pickle_file.torch_is_safe(v) for v in ("2.9.1+cu128", "2.10.0", "2.13.0+cpu", "1.13", "3.0")] == [
        False, True, True, False, True,
    ]  # fmt: skip


def test_sizes_that_a_pickle_only_claims(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "x.pt"
    torch.save({"x": torch.ones(1).expand(1 << 40)}, file)
    refuses(tmp_path, UnsafePickleError, "no tensor larger than the file's", f"a size of {1 << 40}")
    torch.save({"x": torch.ones(1).expand(1 << 10, 1 << 12)}, file)
    refuses(tmp_path, TensorEntryError, "x: expected at most the 4 bytes that the file has of it, found 16777216")
    # a storage of an older file, which torch would allocate before it reads
    torch.save({"x": torch.ones(70_001)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    at = content.index(struct.pack("<i", 70_001))
    for claimed in (1 << 30, -70_001):
        file.write_bytes(content[:at] + struct.pack("<i", claimed) + content[at + 4 :])
        refuses(tmp_path, PickleFileError, "x.pt")
    torch.save({"x": torch.ones(70_001)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {item.filename: archive.read(item) for item in archive.infolist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    entries[name] = entries[name].replace(struct.pack("<i", 70_001), struct.pack("<i", 90_001))
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    refuses(tmp_path, (PickleFileError, TensorEntryError), "x")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "neither a zip archive nor a pickle"),
        (b"\x00" * 100, "neither a zip archive nor a pickle"),
        (b"\x80\x02", "cut off?"),
        (b"PK\x03\x04" + b"\x00" * 100, "cut off?"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git-LFS pointer"),
        (pickle.dumps({"a": 1}, 2), "cut off?"),
        (pickle.dumps([1, 2], 4), "cut off?"),
    ],
)
def test_files_that_torch_did_not_write(tmp_path, content, found):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "x.bin").write_bytes(content)
    refuses(tmp_path, PickleFileError, "x.bin", found)


def test_other_content(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for content, found in (
        (torch.ones(2), "a dict from names to tensors, found Tensor"),
        ([torch.ones(2)], "found list"),
        ({}, "one without tensors"),
        ({"state_dict": {"a": 1}}, "one without tensors (a)"),
    ):
        torch.save(content, tmp_path / "x.pt")
        refuses(tmp_path, PickleFileError, found)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"0" * 10_000_000)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    refuses(tmp_path, PickleFileError, "one data.pkl, as torch.save writes it")
    torch.save({"x": torch.ones(1000)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for length in (10, 200, len(whole) // 2, len(whole) - 30):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        refuses(tmp_path, PickleFileError, "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "x.safetensors")
    refuses(tmp_path, CheckpointError, "an archive that torch.save wrote")


# Files


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path, suffix):
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    expected = {ATTENTION: layer(), MLP: layer(seed=1)}
    tensors = {f"{name}.{part}": t for name, parts in expected.items() for part, t in parts.items()} | PLAIN
    names = sorted(tensors)
    files = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    index = tmp_path / f"{stem}{suffix}.index.json"

    def save(*halves):
        for file, half in zip(files, halves, strict=True):
            part = {name: tensors[name] for name in half}
            save_file(part, tmp_path / file) if suffix == ".safetensors" else torch.save(part, tmp_path / file)

    def say(weight_map):
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))

    save(names[::2], names[1::2])
    said = {name: files[i % 2] for i, name in enumerate(names)}
    say(said)
    checkpoint = open_checkpoint(tmp_path)
    for name, parts in expected.items():
        same(parts_of(checkpoint, name), parts)
    for file in (tmp_path / files[1], index):  # one of the shards stands for all of them
        assert open_checkpoint(tmp_path, file=file).tensors.keys() == tensors.keys()
    refuses(tmp_path, MissingFileError, "nothing of this name", file=tmp_path / "other.bin")

    say(said | {names[0]: files[1]})
    refuses(tmp_path, TensorEntryError, f"{names[0]}: expected it in {files[1]}, found it in {files[0]}")
    say(said | {"more": files[1]})
    refuses(tmp_path, TensorEntryError, f"more: expected it in {files[1]}, found it in none")
    say({name: file for name, file in said.items() if name != names[3]})
    refuses(tmp_path, TensorEntryError, files[1], f"{names[3]}: expected a tensor that", "one that it does not")
    save(names, names[1::2])
    say(said)
    refuses(tmp_path, TensorEntryError, "every tensor once, found it in")
    for bad in (f"../{files[0]}", f"/{files[0]}", f"C:{files[0]}", f"a/{files[0]}", "config.json"):
        say(said | {names[0]: bad})
        refuses(tmp_path, CheckpointError, "names of files in the same folder")


def test_which_file(tmp_path):
    right, wrong = {ATTENTION: layer()}, {ATTENTION: layer(seed=9)}
    settings = {"bits": 4, "group_size": 128}

    def is_right(**arguments):
        return torch.equal(parts_of(open_checkpoint(tmp_path, **arguments))["qweight"], layer()["qweight"])

    write(tmp_path, wrong, settings, file="pytorch_model.bin")
    write(tmp_path, right, settings, file="gptq_model-4bit-128g.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert is_right()
    write(tmp_path, wrong, settings, file="other.safetensors")
    assert is_right()  # the only one whose name tells how it is packed
    write(tmp_path, wrong, settings, file="x-3bit.safetensors")
    refuses(tmp_path, CheckpointError, "one .safetensors file or an index of several", "x-3bit.safetensors")
    assert is_right(file=tmp_path / "gptq_model-4bit-128g.safetensors")
    assert is_right(file="gptq_model-4bit-128g.safetensors")
    write(tmp_path, wrong, settings)
    assert not is_right()  # model.safetensors
    settings["model_file_base_name"] = "gptq_model-4bit-128g"
    write(tmp_path, wrong, settings)
    assert is_right()
    settings["model_file_base_name"] = "../../gptq_model-4bit-128g"
    write(tmp_path, wrong, settings)
    assert is_right()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert not is_right()
    beside = tmp_path.with_name(tmp_path.name + "-4bit-128g.safetensors")
    save_file({f"{ATTENTION}.{part}": tensor for part, tensor in layer().items()}, beside)
    assert is_right(file=beside)
    beside.unlink()
