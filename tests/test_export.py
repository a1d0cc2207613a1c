"""`ropewalk export`: from OUT transformers without any code of ours computes what `ropewalk.load` does from MODEL."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.cli import main
from ropewalk.errors import CheckpointError, RopeError, RopewalkError, UsageError
from ropewalk.loader import export as module
from ropewalk.loader import portable_rope
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.portable_rope import portable
from ropewalk.loader.rope import decide_rope
from ropewalk.loader.safetensors_file import TensorEntry
from ropewalk.rope.frequencies import divisors, inverse_frequencies, parameter_names
from ropewalk.shipped import FOLDER

ORIGINAL, LONGEST, TOKENS = 32, 128, 120
AIROPHIN = {"original_max_position_embeddings": ORIGINAL, "rope_scaling": None}
SPREAD = [1 + 0.1 * i for i in range(16)]
# name -> (what the config says, what the user asks for, the type that is written, the context)
ROPES = {
    "airophin": (AIROPHIN, "auto", "longrope", LONGEST),
    "partial NTK asked for": ({}, "partial-ntk:factor=4,original=32", "longrope", LONGEST),
    "partial NTK by its name": (
        {"rope_scaling": {"type": "part-ntk", "factor": 8, "original_max_position_embeddings": ORIGINAL}},
        "auto",
        "longrope",
        256,
    ),
    "partial NTK of 2023": ({"part_ntk_scale": 4}, "auto", "longrope", 8192),
    "NTK by parts": (
        {"rope_parameters": {"rope_type": "ntk-by-parts", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                             "rope_theta": 5e5}},
        "auto",
        "longrope",
        LONGEST,
    ),
    "NTK": ({"ntk_alpha": 2.5, "num_key_value_heads": 1}, "auto", "longrope", LONGEST),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2}}, "auto", "linear", 256),
    "linear of 2023": ({"position_interpolation_scale": 0.25}, "auto", "linear", 512),
    "linear instead of what the config means": (AIROPHIN, "linear:2", "linear", LONGEST),
    "none instead of what the config means": (AIROPHIN, "none", "default", LONGEST),
    "default": ({"rope_theta": 1000000, "num_key_value_heads": 1}, "auto", "default", LONGEST),
    "YaRN": ({**AIROPHIN, "rope_scaling": {"type": "yarn", "factor": 4}}, "auto", "yarn", LONGEST),
    "YaRN asked for": ({"max_position_embeddings": ORIGINAL}, "yarn:4", "yarn", LONGEST),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4,
                          "original_max_position_embeddings": ORIGINAL}},
        "auto",
        "llama3",
        LONGEST,
    ),
    "longrope": (
        {**AIROPHIN, "rope_scaling": {"type": "su", "factor": 4, "short_factor": SPREAD,
                                      "long_factor": [4 * f for f in SPREAD]}},
        "auto",
        "longrope",
        LONGEST,
    ),
    "dynamic": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "auto", "dynamic", LONGEST
    ),
    "dynamic asked for": (AIROPHIN, "dynamic:factor=4,original=32", "dynamic", LONGEST),
}  # fmt: skip

# What a user of transformers runs who does not have ropewalk.
STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(3, 3 + 120)[None] % 96).logits
    rotary = model.get_decoder().rotary_emb
    torch.save({"logits": logits, "inv_freq": rotary.inv_freq, "scaling": rotary.attention_scaling}, folder + ".out")
assert not any(name.startswith("ropewalk") for name in sys.modules)
assert not {"partial-ntk", "ntk-by-parts", "ntk"} & ROPE_INIT_FUNCTIONS.keys()
"""
IDS = torch.arange(3, 3 + TOKENS)[None] % 96


def run_stock(folders):
    """Return what transformers makes of folders, and what it says on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, folders)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{folder}.out") for folder in folders], done.stderr


def ours(folder, rope="auto"):
    with torch.no_grad():
        return ropewalk.load(folder, rope=rope)[0](IDS).logits


@pytest.fixture(scope="module")
def float_models(tmp_path_factory, make_float_model):
    """Return name -> (folder, folder exported, what `ropewalk.export` returned, what transformers makes of that)."""
    root = tmp_path_factory.mktemp("float")
    sizes = {"max_position_embeddings": LONGEST, "rope_scaling": None}
    weights = {}
    folders = {}
    cases = {name: ("orca", {**sizes, **said}, rope) for name, (said, rope, *_) in ROPES.items()}
    # rotates a quarter of each head, and its config need not say so
    cases["partial"] = ("stablelm", sizes, "partial-ntk:factor=4,original=32")
    # whose head_dim transformers' own functions miss
    cases["mixtral"] = ("mixtral", {"rope_scaling": None}, "partial-ntk:factor=4,original=32")
    for i, (name, (arch, said, rope)) in enumerate(cases.items()):
        key = (arch, said.get("num_key_value_heads", 2))
        if key not in weights:
            plain = {"num_key_value_heads": key[1], "rope_scaling": None, "max_position_embeddings": LONGEST}
            if arch == "stablelm":
                plain["model_type"] = "stablelm"
            weights[key] = make_float_model("orca", **plain)
        config, model, tensors = weights[key]
        folder = root / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, **said, "architectures": [type(model).__name__]}))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders[name] = (folder, root / f"{i}-out", ropewalk.export(folder, root / f"{i}-out", rope=rope), rope)
    results, said = run_stock([out for _, out, _, _ in folders.values()])
    for word in ("rope", "Unrecognized", "factor"):
        assert word not in said, said  # transformers has nothing to warn of
    return {
        name: (folder, out, found, result, rope)
        for (name, (folder, out, found, rope)), result in zip(folders.items(), results, strict=True)
    }


@pytest.mark.parametrize("name", [*ROPES, "partial", "mixtral"])
def test_stock_transformers_computes_the_same(float_models, name):
    folder, out, found, result, rope = float_models[name]
    expected = ours(folder, rope)
    largest = expected.abs().max()
    # float32 rounding: angles of 120 positions, two layers
    assert (result["logits"] - expected).abs().max() <= 2e-5 * largest
    if found["rope"]["type"] != "default":
        wrong = ours(folder, "none")
        assert (wrong - expected).abs().max() > 1e-2 * largest
    # and so do we, from what was written
    assert (ours(out) - expected).abs().max() <= 2e-5 * largest


@pytest.mark.parametrize("name", ROPES)
def test_what_is_written(float_models, name):
    folder, out, found, result, _ = float_models[name]
    _, _, written, context = ROPES[name]
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    assert found["rope_written"]["type"] == written and found["context"] == context
    rope = ("rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings")
    gone = ("original_max_position_embeddings", "part_ntk_scale", "ntk_alpha", "position_interpolation_scale")
    assert {k: v for k, v in after.items() if k not in (*rope, *gone)} == {
        k: v for k, v in before.items() if k not in (*rope, *gone)
    }
    assert [k for k in after if k in before] == [k for k in before if k in after]  # in their order
    if name == "default":
        assert after == before
        return
    assert not set(gone[1:]) & after.keys()
    assert after["rope_parameters"]["rope_type"] == written
    assert after["rope_parameters"]["rope_theta"] == after["rope_theta"]
    if written == "default":
        assert after["rope_scaling"] is None
    else:
        assert after["rope_scaling"] == {**after["rope_parameters"], "type": written}
    if found["rope"]["type"] != written:
        # nothing but factors: no second set, no scaling of attention, the whole context
        assert after["max_position_embeddings"] == after["original_max_position_embeddings"] == context
        assert after["rope_parameters"]["short_factor"] == after["rope_parameters"]["long_factor"]
        assert found["rope_written"]["factors"] == after["rope_parameters"]["short_factor"]
        assert result["scaling"] == 1
        assert len(found["rope_written"]["factors"]) == 16
    # what was exported is exported as it is
    again = ropewalk.export(out, out.parent / f"{out.name}-again")
    assert again["rope_written"]["type"] == written
    assert json.loads((out.parent / f"{out.name}-again" / "config.json").read_text()) == after


def fake(config):
    """Return a checkpoint of which only the config counts."""
    entries = {str(i): TensorEntry(str(i), Path("x"), "F16", (50_000,), 100_000) for i in range(64)}
    return Checkpoint(Path("x"), config, [], entries)


def error_of(found, truth):
    return float(np.abs(found.double().numpy() / truth - 1).max())


def random_ropes(count=40):
    generator = random.Random(0)
    for _ in range(count):
        head_dim, partial = generator.choice([16, 32, 64, 80, 128, 256]), generator.choice([1, 1, 0.5, 0.25])
        theta = generator.choice([1e4, 1e4, 5e5, 1e6, generator.uniform(1e3, 1e7)])
        factor, original = generator.choice([1.5, 2, 4, 8, 16]), generator.choice([2048, 4096, 8192])
        rope_type = generator.choice(["partial-ntk", "ntk-by-parts", "ntk"])
        given = {"factor": factor, "original_max_position_embeddings": original}
        yield head_dim, partial, theta, rope_type, {"alpha": factor} if rope_type == "ntk" else given


@pytest.mark.parametrize(("head_dim", "partial", "theta", "rope_type", "given"), list(random_ropes()))
def test_frequencies_are_as_exact_as_those_of_the_default_rope(head_dim, partial, theta, rope_type, given):
    """LlamaRotaryEmbedding, built from the config written, is at most twice as far from float64 (and one rounding more)
    as it is without any scaling, where it computes `base ** x` in float32 alike.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"model_type": "llama", "hidden_size": 4 * head_dim, "num_attention_heads": 4, "num_hidden_layers": 2,
             "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 4096}  # fmt: skip
    rope = {"rope_type": rope_type, "rope_theta": theta, "partial_rotary_factor": partial, **given}
    config = {**sizes, "rope_parameters": rope}
    written = portable(fake(config), decide_rope(config), asked=False)
    dim = int(head_dim * partial)
    plain = theta ** -(np.arange(0, dim, 2) / dim)
    truth = plain / divisors(rope_type, dim=dim, base=theta, **given)[0]
    assert error_of(inverse_frequencies(rope_type, dim=dim, base=theta, **given)[0], truth) < 6e-8  # by another way
    rotary = LlamaRotaryEmbedding(LlamaConfig(**written.config))
    own = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    assert error_of(rotary.inv_freq, truth) <= 2 * error_of(own, plain) + 2**-23
    assert rotary.attention_scaling == 1


def test_airophin_at_its_real_size():
    config = {"model_type": "llama", "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 40,
              "num_hidden_layers": 40, "max_position_embeddings": 16384, "original_max_position_embeddings": 4096,
              "rope_scaling": None}  # fmt: skip
    written = portable(fake(config), decide_rope(config), asked=False)
    assert written.note == "rope partial-ntk written as longrope (64 factors, 1.00 to 4.00), context 16384"
    # 40-digit values of the frequencies
    expected = {0: 1.0, 8: 3.162277660e-01, 24: 3.162277660e-02, 32: 7.788564305e-03, 40: 1.427092617e-03,
                48: 2.5e-04, 63: 2.886954962e-05}  # fmt: skip
    for i, value in expected.items():
        assert math.isclose(1e4 ** (-i / 64) / written.factors[i], value, rel_tol=1e-9)


@pytest.mark.parametrize("rope_type", ["ntk", "partial-ntk", "ntk-by-parts", "linear", "default"])
def test_divisors(rope_type):
    values = {"alpha": 3.0, "factor": 4.0, "original_max_position_embeddings": 256}
    names = parameter_names(rope_type)
    given = {name: value for name, value in values.items() if name in names}
    found, scaling = divisors(rope_type, dim=64, base=1e5, **given)
    again, _ = inverse_frequencies(
        "longrope", dim=64, base=1e5, short_factor=found.tolist(), long_factor=found.tolist(), factor=1.0,
        original_max_position_embeddings=256,
    )  # fmt: skip
    assert scaling == 1 and found.dtype == np.float64
    # equal but for the last bit
    assert torch.allclose(again, inverse_frequencies(rope_type, dim=64, base=1e5, **given)[0], rtol=2**-23, atol=0)


@pytest.fixture
def make_standard(make_checkpoint):
    """Return a function that writes a packed checkpoint as AutoGPTQ does, whose files say that they are PyTorch's."""

    def make(folder, *arguments, file="model.safetensors", **options):
        make_checkpoint(folder, *arguments, file=file, **options)
        save_file(load_file(folder / file), folder / file, metadata={"format": "pt"})

    return make


def test_packed_weights(tmp_path, make_standard):
    make_standard(tmp_path / "a", sym=False, sizes={"num_key_value_heads": 1})
    found = ropewalk.export(tmp_path / "a", tmp_path / "b")
    assert (found["weights"], found["from"], found["files"]) == ("copied", "gptq", ["model.safetensors"])
    assert found["bytes"] == (tmp_path / "b/model.safetensors").stat().st_size
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["quantization_config"] == found["quantize_config"]
    assert config["quantization_config"]["quant_method"] == "gptq" and config["quantization_config"]["desc_act"]
    assert (ours(tmp_path / "b") - ours(tmp_path / "a")).abs().max() <= 2e-5 * ours(tmp_path / "a").abs().max()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_links(tmp_path, make_standard, monkeypatch):
    make_standard(tmp_path / "a", file="gptq_model-4bit-32g.safetensors")
    source = tmp_path / "a/gptq_model-4bit-32g.safetensors"
    # as the Hub's cache has it
    source.rename(tmp_path / "blob")
    source.symlink_to(tmp_path / "blob")
    copied = ropewalk.export(tmp_path / "a", tmp_path / "copied")
    linked = ropewalk.export(tmp_path / "a", tmp_path / "linked", link=True)
    assert (copied["weights"], linked["weights"]) == ("copied", "linked")
    blob = tmp_path / "blob"
    assert (tmp_path / "linked/model.safetensors").samefile(blob) and not (
        tmp_path / "linked/model.safetensors"
    ).is_symlink()
    assert not (tmp_path / "copied/model.safetensors").samefile(blob)
    assert (tmp_path / "copied/model.safetensors").read_bytes() == blob.read_bytes()

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    done = []
    found = ropewalk.export(tmp_path / "a", tmp_path / "c", link=True, progress=lambda *now: done.append(now))
    assert found["weights"] == "copied" and done[-1] == (blob.stat().st_size, blob.stat().st_size)
    assert (tmp_path / "c/model.safetensors").read_bytes() == blob.read_bytes()


def test_shards(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "a")
    ropewalk.convert(tmp_path / "a", tmp_path / "b", shard_size="60kB")
    (tmp_path / "b/model.safetensors.index.json").rename(tmp_path / "b/other.safetensors.index.json")
    found = ropewalk.export(tmp_path / "b", tmp_path / "c", link=True)
    assert len(found["files"]) > 1 and found["weights"] == "linked"
    for name in found["files"]:
        assert (tmp_path / "b" / name).samefile(tmp_path / "c" / name)
    files = ("c/model.safetensors.index.json", "b/other.safetensors.index.json")
    index, before = (json.loads((tmp_path / name).read_text()) for name in files)
    assert index == before
    assert (ours(tmp_path / "c") - ours(tmp_path / "a")).abs().max() < 1e-4


def test_a_chunk_at_a_time(tmp_path, make_standard, monkeypatch):
    make_standard(tmp_path / "a")
    monkeypatch.setattr(module, "_CHUNK", 10_000)
    done = []
    ropewalk.export(tmp_path / "a", tmp_path / "b", progress=lambda *now: done.append(now))
    assert len(done) > 5 and done[-1][0] == done[-1][1]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["pt", "bin", "no metadata", "float16 bin"])
def test_what_others_do_not_read_is_written_anew(tmp_path, make_checkpoint, make_plain, kind):
    folder = tmp_path / "a"
    folder.mkdir()
    if kind.startswith("float"):
        make_plain(folder)
    else:
        make_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    if kind == "no metadata":
        save_file(tensors, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / {"pt": "llama-4bit-32g.pt"}.get(kind, "pytorch_model.bin"))
    found = ropewalk.export(folder, tmp_path / "b", link=True)
    assert found["weights"] == "written" and found["files"] == ["model.safetensors"]
    written = load_file(tmp_path / "b/model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert found["rope"]["type"] == "partial-ntk" and found["rope_written"]["type"] == "longrope"


def test_act_order_that_the_config_does_not_tell_of(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "a")
    settings = json.loads((tmp_path / "a/quantize_config.json").read_text())
    (tmp_path / "a/quantize_config.json").write_text(json.dumps({**settings, "desc_act": False}))
    found = ropewalk.export(tmp_path / "a", tmp_path / "b")
    assert found["quantize_config"]["desc_act"] is True and "not sequential" in found["warnings"][0]


def test_without_rope(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "a", "mpt")
    found = ropewalk.export(tmp_path / "a", tmp_path / "b")
    assert found["rope_written"] == {
        "type": "none",
        "note": "no rope to write: mpt has no rotary embedding that could be scaled (it uses ALiBi)",
        "factors": [],
    }
    assert found["context"] is None
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert {**before, "quantization_config": found["quantize_config"]} == after


def test_a_rope_that_only_its_family_knows():
    stated = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    config = {"model_type": "gemma3_text", "rope_parameters": stated}
    written = portable(fake(config), decide_rope(config), asked=False)
    assert (written.type, written.note) == ("per-layer", "rope per-layer left as it was") and written.config == config


def test_what_goes_along(tmp_path):
    found = ropewalk.export(FOLDER, tmp_path / "b")
    names = {p.name for p in (tmp_path / "b").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "quantize_config.json"}
    assert open_checkpoint(tmp_path / "b").warnings == [] and found["warnings"] == []


def test_refusals(tmp_path, make_plain, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    make_plain(folder)
    with pytest.raises(CheckpointError, match="expected a new or empty folder to write to, found files in it"):
        ropewalk.export(folder, folder)
    with pytest.raises(RopeError, match="expected a factor"):
        ropewalk.export(folder, tmp_path / "b", rope="llama3:original=128")
    config = json.loads((folder / "config.json").read_text())
    for stated, error, words in (
        ({"type": "ntk-by-parts", "factor": -1}, RopeError, "factor: expected a number above 0, found -1"),
        ({"type": "nothing"}, RopeError, "rope type: expected one of"),
        ({"type": "ntk"}, RopeError, "expected parameter 'alpha', found none"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, RopeError, "expected 16 numbers"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": stated}))
        with pytest.raises(error, match=words):
            ropewalk.export(folder, tmp_path / "b")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}))
    with pytest.raises(CheckpointError, match="a phi3 model that transformers gives a rope of type linear, found"):
        ropewalk.export(folder, tmp_path / "b", rope="linear:2")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        ropewalk.export(folder, tmp_path / "b")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="revision: expected none"):
        ropewalk.export(folder, tmp_path / "b", revision="main")
    real = portable_rope.divisors_of
    with monkeypatch.context() as patch:
        patch.setattr(portable_rope, "divisors_of", lambda config: (real(config)[0] * 1.001, 1.0))
        with pytest.raises(RopewalkError, match=r"expected transformers to compute 16 frequencies down to .*, found"):
            ropewalk.export(folder, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_written", lambda *_: (_ for _ in ()).throw(RopewalkError("differs")))
        with pytest.raises(RopewalkError, match="differs"):
            ropewalk.export(folder, tmp_path / "b", link=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_command(tmp_path, capsys):
    assert main(["export", "demo", str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["rope"]["type"], found["context"]) == ("demo", "partial-ntk", 1024)
    assert "airophin-13b-pntk-16k" in found["rope"]["why"] and len(found["rope_written"]["factors"]) == 32
    assert main(["export", "demo", str(tmp_path / "c"), "--link"]) == 0
    line = "c: rope partial-ntk written as longrope (32 factors, 1.00 to 4.00), context 1024; 1 file linked (4.01 MB)\n"
    assert capsys.readouterr().out.endswith(line)
    assert main(["export", "demo", str(tmp_path / "d"), "--rope", "linear:4"]) == 0
    assert "rope linear kept, since other programs know it by this name; context 1024" in capsys.readouterr().out
    assert main(["export", "demo", str(tmp_path / "b")]) == 1
    assert "expected a new or empty folder to write to, found files in it" in capsys.readouterr().err
    assert main(["export", "demo", str(tmp_path / "e"), "--rope", "spiral:4"]) == 2
    assert "--rope: rope: expected auto, none or one of" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
