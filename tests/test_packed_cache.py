"""`cache_packed`: the layers that come from the cache are those that the checkpoint gives, or the cache is not used."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk import cpu
from ropewalk.cli import main
from ropewalk.gptq import cpu_layout
from ropewalk.loader import packed_cache
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.checksum import COLUMNS, ROWS, checksum
from ropewalk.loader.packed_cache import LINE, places
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.safetensors_file import read_header
from ropewalk.loader.skeleton import Skeleton

IDS = torch.arange(3, 60)[None]

pytestmark = pytest.mark.skipif(not cpu.load(), reason="there are no kernels for the CPU, and so no layout to keep")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The user's cache is another for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(packed_cache, "caches", lambda: [folder])
    return folder


@pytest.fixture
def said(caplog):
    """Return a function that returns what was logged of the cache since it was last called."""
    caplog.set_level(logging.INFO, logger="ropewalk")

    def lines():
        found = [r.getMessage().removeprefix("cache_packed: ") for r in caplog.records if "cache_packed" in r.message]
        caplog.clear()
        return found

    return lines


def load(folder, **arguments):
    return ropewalk.load(folder, cache_packed=True, **arguments)[0]


def kept(folder):
    return folder / ".ropewalk" / "model.safetensors"


def same_model(found, expected):
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def is_mapped(tensor):
    """Tell whether a tensor lies in a file that is mapped into memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= tensor.data_ptr() < int(end, 16):
            return line.endswith(".ropewalk/model.safetensors")
    return False


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("codellama", {}),
        ("codellama", {"bits": 3, "sym": False}),
        ("airophin", {"bits": 8, "desc_act": False, "group_size": -1}),
        ("airophin", {"bits": 2, "group_size": 16}),
        ("qwen2", {"with_g_idx": False, "desc_act": False, "checkpoint_format": "gptq_v2", "sym": False}),
        ("mpt", {"bits": 4, "group_size": 64}),
        ("mixtral", {"bits": 4}),
        ("qwen2_moe", {"bits": 4, "sym": False}),
    ],
)
def test_the_model_is_the_same(tmp_path, make_checkpoint, said, arch, settings):
    make_checkpoint(tmp_path, arch, **settings)
    plain = ropewalk.load(tmp_path)[0]
    assert not (tmp_path / ".ropewalk").exists()
    same_model(load(tmp_path), plain)
    count = sum(isinstance(module, QuantLinear) for module in plain.modules())
    (line,) = said()
    assert line.startswith(f"{count} packed layers are kept in {kept(tmp_path)} (")
    again = load(tmp_path)
    assert said() == [f"{count} packed layers come from {kept(tmp_path)}"]
    same_model(again, plain)
    # Saving gives the checkpoint back.
    again.save_pretrained(tmp_path / "saved")
    saved, original = load_file(tmp_path / "saved/model.safetensors"), load_file(tmp_path / "model.safetensors")
    for name in original:
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            assert torch.equal(saved[name], original[name]), name
    assert [p.name for p in (tmp_path / ".ropewalk").iterdir()] == ["model.safetensors"]


def test_other_dtypes_use_the_same_cache(tmp_path, make_checkpoint, said):
    make_checkpoint(tmp_path)
    load(tmp_path)
    said()
    for dtype in ("float16", "bfloat16"):
        same_model(load(tmp_path, dtype=dtype), ropewalk.load(tmp_path, dtype=dtype)[0])
        assert "come from" in said()[0]


def test_scales_of_another_dtype(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t.bfloat16() if n.endswith("scales") else t for n, t in tensors.items()}, tmp_path / "model.safetensors"
    )
    plain = ropewalk.load(tmp_path)[0]
    load(tmp_path)
    same_model(load(tmp_path), plain)


def test_layers_that_no_kernel_takes_come_from_the_file(tmp_path, make_checkpoint, said):
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"][:] = 1  # groups of 0 and 64 rows
    save_file(tensors, tmp_path / "model.safetensors")
    plain = ropewalk.load(tmp_path)[0]
    same_model(load(tmp_path), plain)
    assert said()[0].startswith("13 packed layers are kept")
    model = load(tmp_path)
    same_model(model, plain)
    assert model.model.layers[1].mlp.up_proj._layout == "checkpoint"
    assert model.model.layers[0].mlp.up_proj._layout == "cpu"


def test_tensors_are_mapped_and_aligned(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path, "codellama", sym=False, bits=3)
    load(tmp_path)
    model = load(tmp_path)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        for tensor in (layer.qweight, layer.scales, layer.qzeros, layer.g_idx, layer._zeros, layer._order):
            assert is_mapped(tensor) and tensor.data_ptr() % LINE == 0
    entries, _ = read_header(kept(tmp_path))
    assert sum(entry.nbytes for name, entry in entries.items() if "padding" in name) < LINE * len(entries)


def test_writing_to_a_tensor_changes_no_file(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    load(tmp_path)
    before = kept(tmp_path).read_bytes()
    model = load(tmp_path)
    state = {name: torch.zeros_like(t) if name.endswith("qzeros") else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            assert not layer.qzeros.any()
            layer.g_idx.add_(0)
            layer.post_init()  # leaves the layout, and takes it again
    assert kept(tmp_path).read_bytes() == before
    model(IDS)


def test_a_file_that_is_replaced_stays_as_it_was_for_those_who_have_it(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    load(tmp_path)
    model = load(tmp_path)
    expected = model(IDS).logits
    make_checkpoint(tmp_path, seed=1)
    load(tmp_path)  # a new one takes its name
    other = load(tmp_path)
    shutil.rmtree(tmp_path / ".ropewalk")
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(other(IDS).logits, expected)


def touch(path):
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))


def edit_header(path, change):
    """Write a cache's header anew."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def flip(path, name, at=0):
    """Change a bit of a tensor of a cache."""
    entry = next(entry for full, entry in read_header(path)[0].items() if full.endswith(name))
    data = bytearray(path.read_bytes())
    data[entry.offset + at] ^= 1
    path.write_bytes(data)


def say(header, change):
    found = json.loads(header["__metadata__"]["ropewalk"])
    change(found)
    header["__metadata__"]["ropewalk"] = json.dumps(found)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: touch(path.parents[1] / "model.safetensors"),
            "expected a cache of the same files, found another",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the file is truncated"),
        (lambda path: path.write_bytes(b""), "expected a .safetensors file, at least 8 bytes"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "expected"),
        (lambda path: flip(path, "down_proj.words", 77), "down_proj.words: expected its checksum, found another"),
        (lambda path: flip(path, "q_proj.scales"), "q_proj.scales: expected its checksum, found another"),
        (lambda path: edit_header(path, lambda h: h.pop("__metadata__")), "expected a cache of the same layout"),
        (lambda path: edit_header(path, lambda h: h["__metadata__"].update(ropewalk="[]")), "get"),
        (lambda path: edit_header(path, lambda h: h["__metadata__"].update(ropewalk="{")), "Expecting"),
        (
            lambda path: edit_header(path, lambda h: say(h, lambda s: s["about"].update({"byte order": "big"}))),
            "expected a cache of the same byte order, found another",
        ),
        (
            lambda path: edit_header(path, lambda h: say(h, lambda s: s["about"].update({"layout": 0}))),
            "expected a cache of the same layout, found another",
        ),
        (lambda path: edit_header(path, lambda h: say(h, lambda s: s["layers"].update({"nothing": "x"}))), "nothing"),
        (
            lambda path: edit_header(path, lambda h: say(h, lambda s: s["checksums"].clear())),
            "words",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_written_anew(tmp_path, make_checkpoint, said, damage, message):
    make_checkpoint(tmp_path, sym=False)
    load(tmp_path)
    damage(kept(tmp_path))
    said()
    same_model(load(tmp_path), ropewalk.load(tmp_path)[0])
    ignored, written = said()
    assert ignored.startswith("written anew: ") and message in ignored
    assert "are kept in" in written
    load(tmp_path)
    assert "come from" in said()[0]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [("rows", 64, "rows: expected numbers from -1 to 63, found"), ("g_idx", 2, "g_idx: expected numbers from 0 to 1")],
)
def test_numbers_that_would_lead_astray(tmp_path, make_checkpoint, said, monkeypatch, part, value, message):
    """Even with their checksum."""
    make_checkpoint(tmp_path, "codellama")
    real = packed_cache._parts

    def parts(module):
        found = real(module)
        found[part] = found[part].clone()
        found[part][5] = value
        return found

    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "_parts", parts)
        load(tmp_path)
    said()
    same_model(load(tmp_path), ropewalk.load(tmp_path)[0])
    assert message in said()[0]


def test_another_layout(tmp_path, make_checkpoint, said, monkeypatch):
    make_checkpoint(tmp_path)
    load(tmp_path)
    said()
    monkeypatch.setattr(cpu_layout, "LAYOUT", cpu_layout.LAYOUT + 1)
    load(tmp_path)
    assert "expected a cache of the same layout" in said()[0]
    assert "come from" in (load(tmp_path), said()[0])[1]


def test_other_settings(tmp_path, make_checkpoint, said):
    """The same file, read as something else."""
    make_checkpoint(tmp_path, sym=False, config_in="")
    ropewalk.load(tmp_path, bits=4, group_size=32, cache_packed=True)
    said()
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "desc_act": True, "sym": False})
    )
    load(tmp_path)
    assert "expected a cache of the same headers" in said()[0]


def test_a_folder_that_cannot_be_written(tmp_path, make_checkpoint, said, monkeypatch, own_cache):
    make_checkpoint(tmp_path)
    plain = ropewalk.load(tmp_path)[0]
    real = packed_cache.work_folder

    def work_folder(path):
        if path.is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(packed_cache, "work_folder", work_folder)
    load(tmp_path)
    assert str(own_cache) in said()[0] and not (tmp_path / ".ropewalk").exists()
    same_model(load(tmp_path), plain)
    assert str(own_cache) in said()[0]
    monkeypatch.setattr(packed_cache, "caches", lambda: [])
    same_model(load(tmp_path), plain)
    assert said() == [f"nothing is kept: [Errno 13] Permission denied: '{kept(tmp_path)}'"]


def test_a_full_disk(tmp_path, make_checkpoint, said, monkeypatch):
    make_checkpoint(tmp_path)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    load(tmp_path)
    (line,) = said()
    assert line.startswith("nothing is kept: ") and "GB free, found 0.00" in line
    assert not list(tmp_path.glob(".ropewalk/*")) and not list(tmp_path.glob(".ropewalk/.*"))


def test_what_is_not_kept(tmp_path, make_checkpoint, make_plain, said, monkeypatch):
    make_checkpoint(tmp_path / "packed")
    monkeypatch.setattr(packed_cache.cpu, "load", lambda: False)
    load(tmp_path / "packed")
    assert said() == ["nothing is kept, since there are no kernels for the CPU (ropewalk doctor)"]
    monkeypatch.undo()
    (tmp_path / "plain").mkdir()
    make_plain(tmp_path / "plain")
    load(tmp_path / "plain")
    assert said() == ["nothing is kept of a model without layers that GPTQ packed"]


def test_files_that_change_while_they_are_read(tmp_path, make_checkpoint, said):
    make_checkpoint(tmp_path)
    changed = []

    def progress(done, total):
        if done == total and not changed:
            changed.append(touch(tmp_path / "model.safetensors"))

    load(tmp_path, progress=progress)
    assert "nothing is kept, since the files" in said()[0] and not (tmp_path / ".ropewalk").exists()
    file = tmp_path / "model.safetensors"
    load(tmp_path, progress=lambda done, total: done == total and file.unlink(missing_ok=True))
    assert "nothing is kept, since the files" in said()[0]


def test_layers_on_a_gpu(tmp_path, make_checkpoint, said):
    make_checkpoint(tmp_path)

    linear = torch.nn.Linear(1, 1)
    skeleton = Skeleton(linear, packed={"x": linear})
    found = packed_cache.cached_layers(True, skeleton, open_checkpoint(tmp_path), lambda name: torch.device("cuda"))
    with found as layers:
        assert layers == {}
    assert said() == ["nothing is kept, since packed layers are on a GPU"]
    assert next(places(open_checkpoint(tmp_path))) == kept(tmp_path)


def test_the_command(tmp_path, capsys, shipped):
    shutil.copytree(shipped, tmp_path / "m")
    for _ in range(2):
        arguments = ["generate", str(tmp_path / "m"), "--prompt", "And", "--max-new-tokens", "5", "--json"]
        assert main([*arguments, "--cache-packed"]) == 0
    assert kept(tmp_path / "m").is_file()
    cached = json.loads(capsys.readouterr().out.splitlines()[-1])["text"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["text"] == cached


def test_processes_share_the_pages(tmp_path, make_checkpoint):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    make_checkpoint(tmp_path, "codellama", sizes=sizes, group_size=64)
    load(tmp_path)
    code = f"""
import sys, torch, ropewalk
model, _ = ropewalk.load({str(tmp_path)!r}, cache_packed=True)
model(torch.arange(3, 20)[None])
print("ready", flush=True)
sys.stdin.readline()
found, inside = dict(Shared_Clean=0, Private_Clean=0, Private_Dirty=0), False
for line in open("/proc/self/smaps"):
    words = line.split()
    if not words[0].endswith(":"):
        inside = line.strip().endswith(".ropewalk/model.safetensors")
    elif inside and words[0][:-1] in found:
        found[words[0][:-1]] += int(words[1])
print(found)
sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 2
    size = kept(tmp_path).stat().st_size // 1024
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
        found = eval(process.stdout.readline())
        assert found["Private_Dirty"] == 0
        assert found["Shared_Clean"] > 0.9 * size
    for process in processes:
        process.communicate("\n")


def test_checksums():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**62), 2**62, (COLUMNS * ROWS * 2 + 999,), generator=generator)
    expected = checksum(words)
    assert expected == checksum(words.clone()) and len(expected) == 16
    for i in (0, 1, 511, COLUMNS, COLUMNS * ROWS, len(words) - 1):
        other = words.clone()
        other[i] += 1 << 40
        assert checksum(other) != expected
    pages = words[: len(words) // 512 * 512].view(-1, 512)
    for i, j in ((0, 1), (3, 2038), (7, 2045), (0, len(pages) - 1)):
        other = words.clone()
        swapped = other[: pages.numel()].view(-1, 512)
        swapped[i], swapped[j] = pages[j], pages[i]
        assert checksum(other) != expected
    blank = words.clone()
    blank[512:1024] = 0
    assert checksum(blank) != expected
    data = words.view(torch.uint8)
    assert len({checksum(data[:n]) for n in range(40)}) == 40
    assert checksum(torch.zeros(8, dtype=torch.uint8)) != checksum(torch.zeros(9, dtype=torch.uint8))
    assert checksum(torch.tensor(1.0)) == checksum(torch.tensor([1.0]))
    assert checksum(words[:COLUMNS]) == reference(words[:COLUMNS])


def reference(words):
    """The formula for one row, in Python's integers."""
    total, mask = words.numel() * 8, 2**64 - 1
    for column, word in enumerate(words.tolist(), 1):
        z = column * 0x9E3779B97F4A7C15 & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        total += (word & mask) * ((z ^ z >> 31) | 1)
        if column == 1:
            total += (words.numel() * 8) * 0x9E3779B97F4A7C15 - words.numel() * 8
    return f"{total & mask:016x}"
