"""`ropewalk convert`: whatever is read here is written as safetensors, with nothing changed that need not be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.cli import main
from ropewalk.errors import CheckpointError, FormatError, RopewalkError, UsageError
from ropewalk.gptq.format import pack, symmetric_zeros, unpack, zeros_v1_to_v2, zeros_v2_to_v1
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader import convert as module
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.convert import parse_size
from ropewalk.loader.marlin import order_scales
from ropewalk.loader.safetensors_file import read_header
from ropewalk.loader.tensor_file import Spec, TensorFile

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def layer(rows=256, columns=128, seed=0, **settings):
    settings = {"bits": 4, "group_size": 128, "sym": True} | settings
    generator = torch.Generator().manual_seed(seed)
    return quantize_rtn(torch.randn(columns, rows, generator=generator), **settings)


def plain():
    generator = torch.Generator().manual_seed(9)
    return {
        "model.embed_tokens.weight": torch.randn(8, 4, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(5, generator=generator).half(),  # of an odd size: what follows is not aligned
        "lm_head.weight": torch.randn(8, 4, generator=generator),
    }


def write(folder, layers, settings=None, file="model.safetensors", **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    tensors = plain() | {f"{name}.{p}": t.contiguous() for name, parts in layers.items() for p, t in parts.items()}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    if settings is not None:
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    return folder


def parts_of(folder, name=Q, **arguments):
    checkpoint = open_checkpoint(folder, **arguments)
    with checkpoint.reader() as reader:
        return {part: t.clone() for part, t in reader.read_layer(checkpoint.layers[name]).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for part, tensor in expected.items():
        assert found[part].dtype == tensor.dtype and torch.equal(found[part], tensor), part


def whole(folder):
    """All tensors of a folder, read by the safetensors library."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_an_ordinary_checkpoint_is_the_same_afterwards(tmp_path):
    folder = write(tmp_path / "a", {Q: layer(), DOWN: layer(seed=1)}, {"bits": 4, "group_size": 128})
    found = ropewalk.convert(folder, tmp_path / "b")
    same(whole(tmp_path / "b"), whole(folder))
    assert found["files"] == ["model.safetensors"] and found["layers"] == 2 and found["from"] == "gptq"
    assert found["warnings"] == []
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["quantization_config"] == found["quantize_config"]
    assert {**found["quantize_config"], "model_file_base_name": "model"} == json.loads(
        (tmp_path / "b/quantize_config.json").read_text()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "b/model.safetensors").stat().st_mode & 0o777 == (tmp_path / "a/config.json").stat().st_mode & (
        0o777
    )


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickles(tmp_path, suffix):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    expected = layer(order=order, sym=False) | {"bias": torch.arange(128).float()}
    folder = write(tmp_path / "a", {Q: expected}, None, f"llama-4bit-128g{suffix}")
    found = ropewalk.convert(folder, tmp_path / "b")
    assert found["quantize_config"]["bits"] == 4 and found["quantize_config"]["desc_act"]
    assert "no quantize_config.json" in found["warnings"][0]
    same(parts_of(tmp_path / "b"), expected)
    assert open_checkpoint(tmp_path / "b").warnings == []
    same({n: t for n, t in whole(tmp_path / "b").items() if n in plain()}, plain())


def test_settings_that_the_file_does_not_tell(tmp_path):
    expected = layer(rows=320, group_size=192)  # by the shapes 160 would do as well
    del expected["g_idx"]
    folder = write(tmp_path / "a", {Q: expected}, None, "weights.pt")
    with pytest.raises(FormatError, match="for 3 bits"):
        ropewalk.convert(folder, tmp_path / "b", bits=3)
    found = ropewalk.convert(folder, tmp_path / "b", bits=4, group_size=192)
    assert (found["quantize_config"]["bits"], found["quantize_config"]["group_size"]) == (4, 192)
    same(parts_of(tmp_path / "b"), expected)


def test_marlin(tmp_path):
    expected = layer()
    del expected["g_idx"]
    codes = unpack(expected["qweight"], 4).view(16, 2, 4, 2, 2, 4, 2, 8).permute(0, 4, 7, 2, 5, 3, 6, 1)
    parts = {"B": pack(codes.reshape(1, -1), 4, dim=1).view(16, 256), "s": order_scales(expected["scales"], True)}
    folder = write(tmp_path / "a", {Q: parts}, {"bits": 4, "group_size": 128, "sym": True, "is_marlin_format": True})
    same(parts_of(folder), expected)
    found = ropewalk.convert(folder, tmp_path / "b")
    assert found["from"] == "marlin" and "is_marlin_format" not in found["quantize_config"]
    same({n.removeprefix(f"{Q}."): t for n, t in whole(tmp_path / "b").items() if n.startswith(Q)}, expected)
    ropewalk.convert(folder, tmp_path / "c", format="gptq_v2")
    v2 = symmetric_zeros(2, 128, 4, "gptq_v2")
    same(parts_of(tmp_path / "c"), {**expected, "qzeros": v2})


def test_planar(tmp_path):
    expected = layer(bits=3, sym=False, checkpoint_format="gptq_v2")

    def planes(words):
        codes = unpack(words, 3).view(-1, 32, words.shape[1])
        low = pack((codes & 3).reshape(-1, words.shape[1]), 2).view(-1, 2, words.shape[1])
        high = ((codes >> 2).long() << torch.arange(32).view(1, 32, 1)).sum(1, keepdim=True).to(torch.int32)
        return torch.cat([low, high], 1).reshape(-1, words.shape[1])

    parts = {**expected, "qweight": planes(expected["qweight"]), "qzeros": planes(expected["qzeros"].t()).t()}
    settings = {"bits": 3, "group_size": 128, "sym": False, "checkpoint_format": "gptq_p"}
    settings["dynamic"] = {f"+:{Q}": {"group_size": 128, "format": "gptq_p"}}
    folder = write(tmp_path / "a", {Q: parts}, settings)
    same(parts_of(folder), expected)
    found = ropewalk.convert(folder, tmp_path / "b")
    assert found["from"] == "gptq_p" and found["quantize_config"]["checkpoint_format"] == "gptq_v2"
    assert found["quantize_config"]["dynamic"] == {f"+:{Q}": {"group_size": 128}}
    same({n.removeprefix(f"{Q}."): t for n, t in whole(tmp_path / "b").items() if n.startswith(Q)}, expected)


@pytest.mark.parametrize("sym", [True, False])
def test_float_zeros(tmp_path, sym):
    made = layer(group_size=-1, sym=sym)
    zeros = unpack(zeros_v1_to_v2(made["qzeros"], 4), 4, dim=1)
    parts = {
        "qweight": made["qweight"],
        "zeros": (zeros * made["scales"].float()).t(),
        "scales": made["scales"].float().t(),
        "bias": torch.zeros(128),
    }
    folder = write(tmp_path / "a", {Q: parts}, None, "llama-7b-4bit.pt")
    found = ropewalk.convert(folder, tmp_path / "b")
    assert found["from"] == "gptq-for-llama"
    written = whole(tmp_path / "b")
    assert written[f"{Q}.scales"].dtype == torch.float32 and f"{Q}.zeros" not in written
    assert found["quantize_config"]["sym"] == sym
    same(parts_of(tmp_path / "b"), parts_of(folder))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_to_v2_and_back(tmp_path, bits, group_size):
    made = layer(bits=bits, group_size=group_size, sym=False)
    # any zero points that v1 holds, the largest among them
    zeros = torch.randint(1, 1 << bits, (made["scales"].shape[0], 128), generator=torch.Generator().manual_seed(1))
    zeros[0, :8] = (1 << bits) - 1
    v2 = pack(zeros, bits, dim=1)
    made["qzeros"] = zeros_v2_to_v1(v2, bits)
    settings = {"bits": bits, "group_size": group_size, "sym": False, "damp_percent": 0.1}
    folder = write(tmp_path / "1", {Q: made}, settings)
    there = ropewalk.convert(folder, tmp_path / "2", format="gptq_v2")
    assert there["quantize_config"]["checkpoint_format"] == "gptq_v2"
    same(parts_of(tmp_path / "2"), {**made, "qzeros": v2})
    back = ropewalk.convert(tmp_path / "2", tmp_path / "3", format="gptq")
    assert back["quantize_config"]["checkpoint_format"] == "gptq"
    same(whole(tmp_path / "3"), whole(folder))
    # Without a 0 all readings of v1 agree: one is added to words, or to codes.
    assert torch.equal(unpack(made["qzeros"], bits, dim=1) + 1, zeros.to(torch.uint8))
    # no format asked for: as it is
    ropewalk.convert(tmp_path / "2", tmp_path / "4")
    same(whole(tmp_path / "4"), whole(tmp_path / "2"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_0(tmp_path, bits):
    zeros = torch.full((2, 128), 3)
    zeros[1, 77] = 0
    made = layer(bits=bits, sym=False, checkpoint_format="gptq_v2") | {"qzeros": pack(zeros, bits, dim=1)}
    settings = {"bits": bits, "group_size": 128, "sym": False, "checkpoint_format": "gptq_v2"}
    folder = write(tmp_path / "2", {Q: made}, settings)
    with pytest.raises(FormatError) as caught:
        ropewalk.convert(folder, tmp_path / "1", format="gptq")
    assert str(caught.value).endswith(
        f"{Q}.qzeros: expected zero points from 1 on, which is what format gptq (v1) holds; gptq_v2 holds these, "
        "found one of 0"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["2"]
    # GPTQModel writes such v1 files, with a borrow; from there to v2 is what it means by them.
    v1 = made | {"qzeros": zeros_v2_to_v1(made["qzeros"], bits)}
    folder = write(tmp_path / "1", {Q: v1}, {**settings, "checkpoint_format": "gptq"})
    ropewalk.convert(folder, tmp_path / "same", format="gptq")
    same(whole(tmp_path / "same"), whole(folder))
    ropewalk.convert(folder, tmp_path / "there", format="gptq_v2")
    same(parts_of(tmp_path / "there"), made)


def test_layers_of_differing_settings(tmp_path):
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    ordered = layer(order=torch.randperm(256, generator=torch.Generator().manual_seed(3)))
    layers = dict(zip(names, (layer(), layer(bits=8, group_size=64), ordered), strict=True))
    dynamic = {r"+:.*\.1\.": {"bits": 8, "group_size": 64}, r"+:.*\.2\.": {"desc_act": True}, "-:nothing": {}}
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "dynamic": dynamic}
    folder = write(tmp_path / "a", layers, settings)
    found = ropewalk.convert(folder, tmp_path / "b", format="gptq_v2")
    assert found["quantize_config"]["dynamic"] == dynamic
    a, b = open_checkpoint(folder), open_checkpoint(tmp_path / "b")
    assert b.warnings == []
    for name in names:
        ours, theirs = b.layers[name].settings, a.layers[name].settings
        assert (ours.bits, ours.group_size, ours.desc_act) == (theirs.bits, theirs.group_size, theirs.desc_act)
        parts = {**layers[name], "qzeros": zeros_v1_to_v2(layers[name]["qzeros"], ours.bits)}
        same(parts_of(tmp_path / "b", name), parts)


def test_act_order_that_the_config_does_not_tell_of(tmp_path):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    folder = write(tmp_path / "a", {Q: layer(order=order)}, {"bits": 4, "group_size": 128, "desc_act": False})
    found = ropewalk.convert(folder, tmp_path / "b")
    assert found["quantize_config"]["desc_act"] is True
    assert "not sequential" in found["warnings"][0] and open_checkpoint(tmp_path / "b").warnings == []


def test_float_weights(tmp_path):
    folder = write(tmp_path / "a", {}, None, "pytorch_model.bin")
    found = ropewalk.convert(folder, tmp_path / "b")
    same(whole(tmp_path / "b"), plain())
    assert found["quantize_config"] is None and found["from"] == "float" and found["layers"] == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(UsageError, match="format: expected it with packed weights, found float ones"):
        ropewalk.convert(folder, tmp_path / "c", format="gptq")


def test_shards(tmp_path):
    layers = {f"model.layers.{i}.self_attn.q_proj": layer(seed=i) for i in range(6)}
    folder = write(tmp_path / "a", layers, {"bits": 4, "group_size": 128})
    found = ropewalk.convert(folder, tmp_path / "b", shard_size="40kB")
    assert len(found["files"]) > 2
    for name in found["files"]:
        assert sum(e.nbytes for e in read_header(tmp_path / "b" / name)[0].values()) <= 40_000
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found["bytes"]
    assert set(index["weight_map"].values()) == set(found["files"])
    same(whole(tmp_path / "b"), whole(folder))
    ropewalk.convert(tmp_path / "b", tmp_path / "c")  # and back into one
    same(whole(tmp_path / "c"), whole(folder))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2GiB", 2 << 30), ("64 KiB", 65536), (7, 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB", True, 0])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="shard_size: expected a size such as 5GB, found"):
        parse_size(text)


@pytest.mark.parametrize("arch", ["codellama", "qwen2", "mpt", "mixtral"])
def test_a_model_computes_the_same(tmp_path, make_checkpoint, arch):
    make_checkpoint(tmp_path / "a", arch, sym=False)
    ropewalk.convert(tmp_path / "a", tmp_path / "b", format="gptq_v2", shard_size="50kB")
    same({n: t for n, t in whole(tmp_path / "b").items() if not n.endswith("qzeros")},
         {n: t for n, t in whole(tmp_path / "a").items() if not n.endswith("qzeros")})  # fmt: skip
    ids = torch.arange(3, 60)[None]
    logits = [ropewalk.load(tmp_path / name)[0](ids).logits for name in "ab"]
    assert torch.equal(*logits)


def test_what_goes_along(tmp_path):
    folder = write(tmp_path / "a", {Q: layer()}, {"bits": 4, "group_size": 128, "model_file_base_name": "model"})
    wanted = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "generation_config.json", "LICENSE.txt")
    for name in (*wanted, "tokenizer.py", "old.bin", "training_args.bin", "notes.txt", "x.safetensors.index.json"):
        (folder / name).write_text(name)
    (folder / "tokenizer").mkdir()
    ropewalk.convert(folder, tmp_path / "b")
    found = {p.name for p in (tmp_path / "b").iterdir()}
    assert found == {*wanted, "model.safetensors", "config.json", "quantize_config.json"}


def test_memory_holds_a_layer_and_no_more(tmp_path):
    layers = {f"model.layers.{i}.self_attn.q_proj": layer(1024, 1024, bits=8, seed=i) for i in range(96)}
    folder = write(tmp_path / "a", layers, {"bits": 8, "group_size": 128})  # 100 MB
    del layers
    ropewalk.convert(folder, tmp_path / "b")

    def memory(name):
        line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
        return int(line.split()[1]) // 1024

    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = memory("VmRSS")
    ropewalk.convert(folder, tmp_path / "c", format="gptq_v2")
    assert memory("VmHWM") - before < 20


def test_what_was_written_is_looked_at(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", {Q: layer(sym=False)}, {"bits": 4, "group_size": 128, "sym": False})
    real = module.config_of
    monkeypatch.setattr(module, "config_of", lambda *a: {**real(*a), "checkpoint_format": "gptq_v2"})
    with pytest.raises(RopewalkError, match=r"expected .*q_proj to be written as"):
        ropewalk.convert(folder, tmp_path / "b", format="gptq")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_refusals(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", {Q: layer()}, {"bits": 4, "group_size": 128})
    for out in (folder, folder / "config.json"):
        with pytest.raises(CheckpointError, match="expected a new or empty folder to write to, found"):
            ropewalk.convert(folder, out)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: str(path) == str(tmp_path / "disk"))
        with pytest.raises(CheckpointError, match="where a disk is mounted; name a folder"):
            ropewalk.convert(folder, tmp_path / "disk")
    with pytest.raises(UsageError, match="format: expected gptq or gptq_v2, found 'marlin'"):
        ropewalk.convert(folder, tmp_path / "b", format="marlin")
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
        with pytest.raises(CheckpointError, match=r"b: expected 0\.00 GB free on its disk, found 0\.00 GB"):
            ropewalk.convert(folder, tmp_path / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    ropewalk.convert(folder, tmp_path / "link")
    same(whole(tmp_path / "empty"), whole(folder))
    assert (tmp_path / "link").is_symlink()


def test_the_command(tmp_path, capsys):
    assert main(["convert", "demo", str(tmp_path / "b"), "--format", "gptq_v2", "--shard-size", "2MB", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["model"], found["layers"], found["from"]) == ("demo", 28, "gptq")
    assert found["quantize_config"]["checkpoint_format"] == "gptq_v2" and len(found["files"]) > 1
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    assert "c: 28 packed layers, 4 bits, gptq_v2, 3.99 MB in model.safetensors, in " in capsys.readouterr().out
    assert main(["convert", "demo", str(tmp_path / "b")]) == 1
    assert "expected a new or empty folder to write to, found files in it" in capsys.readouterr().err
    assert main(["convert", "demo", str(tmp_path / "d"), "--shard-size", "5 apples"]) == 2
    assert "shard_size: expected a size such as 5GB, found '5 apples'" in capsys.readouterr().err


def test_a_tensor_file_is_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 3),
        "c": torch.zeros(0, 4, dtype=torch.int64),
        "d": torch.tensor(True),
        "e": torch.randn(7).bfloat16(),
        "ü": torch.arange(4).t(),
    }
    specs = [Spec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    for alignment in (1, 64):
        path = tmp_path / str(alignment)
        with TensorFile(path, specs, {"format": "pt"}, alignment) as file:
            for name in reversed(tensors):
                file.write(name, tensors[name])
        found = load_file(path)
        same({n: found[n] for n in tensors}, tensors)
        entries, metadata = read_header(path)
        assert metadata == {"format": "pt"}
        assert all(
            entry.offset % max(alignment, entry.dtype.itemsize) == 0 for n, entry in entries.items() if n in tensors
        )
    with pytest.raises(CheckpointError, match="b: expected it to be written, found nothing"), \
            TensorFile(tmp_path / "x", specs[:2], {}) as file:  # fmt: skip
        file.write("a", tensors["a"])
    with (
        pytest.raises(CheckpointError, match=r"expected torch\.float32"),
        TensorFile(tmp_path / "y", specs[:2], {}) as f,
    ):
        f.write("b", tensors["b"].t())
