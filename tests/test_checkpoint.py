"""A folder that is not a checkpoint, or not a whole one, gets a sentence before anything is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.errors import (
    CheckpointError,
    FormatError,
    HeaderError,
    MissingFileError,
    MissingTensorsError,
    OffsetsError,
    PickleFileError,
    QuantizeConfigError,
    RopeError,
    TensorEntryError,
)


@pytest.fixture
def folder(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refuses(folder, error, *parts):
    """The same error from inspect and from load, with every part of the message in it."""
    for call in (ropewalk.inspect, ropewalk.load):
        with pytest.raises(error) as caught:
            call(folder)
        for part in parts:
            assert part in str(caught.value)


def test_no_such_folder(tmp_path):
    refuses(tmp_path / "none", MissingFileError, "expected a folder with a model", "nothing of this name")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", MissingFileError, "found a file")


def test_not_a_model(tmp_path):
    refuses(tmp_path, MissingFileError, "config.json", "an empty folder")
    (tmp_path / "notes.txt").write_text("x")
    refuses(tmp_path, MissingFileError, "found notes.txt")
    (tmp_path / "config.json").write_text("{")
    refuses(tmp_path, QuantizeConfigError, "expected a JSON file")
    (tmp_path / "config.json").write_text("[]")
    refuses(tmp_path, CheckpointError, "a JSON object with a model_type")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refuses(tmp_path, MissingFileError, "weights in .safetensors, .pt or .bin files", "notes.txt")
    (tmp_path / "training_args.bin").write_text("x")
    refuses(tmp_path, MissingFileError, "weights in .safetensors, .pt or .bin files", "training_args.bin")
    (tmp_path / "model.pt").write_text("x")
    refuses(tmp_path, PickleFileError, "model.pt", "neither a zip archive nor a pickle")


def test_an_architecture_that_transformers_does_not_have(folder):
    edit_json(folder / "config.json", model_type="no-such-model")
    with pytest.raises(CheckpointError, match="a model_type of transformers, found 'no-such-model'"):
        ropewalk.load(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuses(folder, OffsetsError, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits 2, 3, 4, 8, found 5"),
        ({"bits": "4"}, "found '4'"),
        ({"bits": True}, "found True"),
        ({"bits": ...}, "found None"),
        ({"group_size": 0}, "group_size -1 or a positive number, found 0"),
        ({"group_size": -2}, "found -2"),
        ({"desc_act": "yes"}, "desc_act true or false, found 'yes'"),
        ({"sym": 1}, "sym true or false, found 1"),
        ({"quant_method": "awq"}, "quant_method gptq, found 'awq'"),
        ({"quant_method": "marlin", "sym": False}, "sym true in a Marlin checkpoint"),
        ({"version": "GEMM"}, "quant_method gptq, found AWQ's version 'GEMM'"),
        ({"checkpoint_format": "exl2"}, "checkpoint_format gptq, gptq_v2, gptq_p, marlin, found 'exl2'"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "one value for checkpoint_format"),
        ({"checkpoint_format": "gptq_v2", "is_marlin_format": True}, "one checkpoint_format"),
        ({"is_marlin_format": True, "bits": 8}, "bits 4 in a Marlin checkpoint, found 8"),
        ({"w_bit": 3}, "one value for bits, found bits 4 and w_bit 3"),
        ({"groupsize": 64}, "one value for group_size, found group_size 32 and groupsize 64"),
        ({"pack_dtype": "int16"}, "pack_dtype int32, the words that GPTQ checkpoints use, found 'int16'"),
        ({"bits": 4.0}, "found 4.0"),
        ({"dynamic": [1]}, "dynamic, an object from patterns to settings"),
        ({"dynamic": {"x": 8}}, "an object of settings for dynamic's 'x', found 8"),
        ({"dynamic": {"+:(": {}}}, "a regular expression in dynamic, found '+:('"),
        ({"dynamic": {"x" * 600: {}}}, "at most 512 characters in dynamic, found 600"),
        ({"dynamic": {"x": {"bits": 5}}}, "dynamic 'x': expected bits 2, 3, 4, 8, found 5"),
        ({"dynamic": {"x": {"format": "marlin"}}}, "the same format for every layer, found 'marlin'"),
    ],
)
def test_a_quantize_config_that_gptq_cannot_hold(folder, changes, message):
    edit_json(folder / "quantize_config.json", **changes)
    refuses(folder, QuantizeConfigError, "quantize_config.json", message)


@pytest.mark.parametrize(("content", "found"), [("bits: 4", "a JSON file"), ("[4]", "a JSON object, found list")])
def test_a_quantize_config_that_is_not_json_counts_as_missing(folder, content, found):
    before, _ = ropewalk.load(folder)
    (folder / "quantize_config.json").write_text(content)
    warnings = ropewalk.inspect(folder)["warnings"]
    assert f"quantize_config.json: expected {found}" in warnings[0] and "the file is not used" in warnings[0]
    assert "inferred from" in warnings[1]
    after, _ = ropewalk.load(folder)
    ids = torch.arange(20)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith("scales")])
    refuses(folder, FormatError, ".scales: expected a tensor of 2 dimensions, found none")


def test_settings_that_the_tensors_contradict(folder):
    edit_json(folder / "quantize_config.json", group_size=16)
    refuses(folder, FormatError, "qzeros: expected shape [6, 8]", "group_size 16", "found [3, 8]")
    edit_json(folder / "quantize_config.json", group_size=32, bits=8)
    refuses(folder, FormatError, "expected shape", "bits 8")


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        (lambda t: t.pop(f"{LAYER}.scales"), FormatError, (f"{LAYER}.scales", "found none")),
        (lambda t: t.pop(f"{LAYER}.g_idx"), FormatError, (f"{LAYER}.g_idx", "desc_act is true")),
        (
            lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].long()}),
            FormatError,
            (f"{LAYER}.qweight", "torch.int32", "torch.int64"),
        ),
        (
            lambda t: t.update({f"{LAYER}.g_idx": t[f"{LAYER}.g_idx"] + 3}),
            FormatError,
            (f"{LAYER}.g_idx", "group numbers from 0 to 2", "found 3 to 5"),
        ),
        (
            lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"] * float("nan")}),
            FormatError,
            (f"{LAYER}.scales", "finite"),
        ),
    ],
)
def test_a_faulty_layer_is_named(folder, change, error, parts):
    edit_tensors(folder, change)
    refuses(folder, error, "model.safetensors", *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop("model.norm.weight"), ("tensor model.norm.weight", "none of that name")),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), ("only tensors that the model has", "model.extra")),
        (
            lambda t: t.update({"model.layers.7.mlp.up_proj.qweight": t["model.layers.0.mlp.up_proj.qweight"].clone()}),
            ("model.layers.7.mlp.up_proj",),
        ),
    ],
)
def test_every_tensor_must_land_in_the_model(folder, change, parts):
    edit_tensors(folder, change)
    with pytest.raises((MissingTensorsError, FormatError)) as caught:
        ropewalk.load(folder)
    for part in parts:
        assert part in str(caught.value)


def test_a_layer_of_another_size_than_the_config(folder):
    edit_json(folder / "config.json", intermediate_size=128)
    with pytest.raises(FormatError, match=r"a layer of 128 inputs and 64 outputs .*found 96 and 64"):
        ropewalk.load(folder)


def test_a_bad_rope_is_found_before_the_model_is_built(folder):
    edit_json(folder / "config.json", rope_scaling={"type": "linear", "factor": 0})
    refuses(folder, RopeError, "factor: expected a number above 0, found 0")


def test_shards(tmp_path, folder):
    index = folder / "model.safetensors.index.json"
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    whole, _ = ropewalk.load(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in halves.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded, _ = ropewalk.load(folder)
    ids = torch.arange(20)[None]
    assert torch.equal(whole(ids).logits, sharded(ids).logits)

    save_file({name: tensors[name] for name in names[:5]}, folder / "b.safetensors")
    refuses(folder, TensorEntryError, "every tensor once")
    (folder / "b.safetensors").unlink()
    refuses(folder, MissingFileError, "the shard b.safetensors beside it")
    for bad in ("../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..\\b.safetensors", ".hidden", 7):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": bad}}))
        refuses(folder, HeaderError, "names of files in the same folder")
    index.write_text(json.dumps({"weight_map": {}}))
    refuses(folder, HeaderError, "a weight_map")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": "config.json"}}))
    refuses(folder, HeaderError, "found 'config.json'")


def test_two_files_and_no_index(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    refuses(folder, CheckpointError, "one .safetensors file or an index of several", "one.safetensors, two.safetensors")


def test_settings_are_inferred_where_the_tensors_leave_no_choice(tmp_path, make_checkpoint):
    for bits, group_size, desc_act, sym, fmt in (
        (4, 32, True, True, "gptq"),
        (3, -1, False, True, "gptq_v2"),
        (8, 32, False, False, "gptq"),
    ):
        folder = tmp_path / f"{bits}"
        make_checkpoint(
            folder,
            bits=bits,
            group_size=group_size,
            desc_act=desc_act,
            sym=sym,
            checkpoint_format=fmt,
            config_in="",
        )
        found = ropewalk.inspect(folder)
        settings = {k: found[k] for k in ("bits", "group_size", "desc_act", "sym", "format")}
        expected = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": sym, "format": fmt}
        assert settings == expected
        assert "no quantize_config.json" in found["warnings"][0]


def test_a_config_without_packed_layers(tmp_path, folder):
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith("qweight")])
    refuses(folder, QuantizeConfigError, "packed layers (.qweight) in the weights, found none")


def test_a_format_version_that_the_zero_points_contradict_is_corrected(tmp_path, make_checkpoint):
    folder = tmp_path / "m"
    make_checkpoint(folder, checkpoint_format="gptq_v2")
    right, _ = ropewalk.load(folder)
    edit_json(folder / "quantize_config.json", checkpoint_format="gptq")
    found = ropewalk.inspect(folder)
    assert found["format"] == "gptq_v2"
    assert "checkpoint_format is gptq" in found["warnings"][0]
    corrected, _ = ropewalk.load(folder)
    ids = torch.arange(20)[None]
    assert torch.equal(right(ids).logits, corrected(ids).logits)


def test_a_g_idx_that_desc_act_denies_is_followed(folder):
    before, _ = ropewalk.load(folder)
    edit_json(folder / "quantize_config.json", desc_act=False)
    assert "the tensors are followed" in ropewalk.inspect(folder)["warnings"][0]
    after, _ = ropewalk.load(folder)
    ids = torch.arange(20)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_inspect(folder):
    found = ropewalk.inspect(folder)
    assert {k: found[k] for k in ("format", "bits", "group_size", "desc_act", "sym", "architecture")} == {
        "format": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": True,
        "architecture": "LlamaForCausalLM",
    }
    assert found["rope"]["type"] == "partial-ntk"
    assert found["layers"] == {"packed": 14}
    sizes = found["bytes"]
    assert sizes["packed"] + sizes["other"] == sizes["total"]
    assert sizes["total"] < (folder / "model.safetensors").stat().st_size
    # 4 bits, a scale of 16 and a zero point of 4 for each group of 32, and g_idx
    assert 4 + 20 / 32 < sizes["bits_per_weight"] < 5.2
    assert found["warnings"] == []
    assert set(found["kernels"]) == {"cpu", "cuda"}
