"""GPTQ through GPTQModel, and two programs that were not written here as judges of what we compute.

Runs in the environment that `make oracle` makes; elsewhere it is skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.bench.packing import METHODS, bench_packing, divide, variants
from ropewalk.bench.perplexity import perplexity
from ropewalk.bench.shapes import Packing
from ropewalk.errors import RopewalkError, UsageError
from ropewalk.loader.write import write_json, write_weights
from ropewalk.shipped import held_out_text

pytest.importorskip("gptqmodel", reason="`make oracle` makes an environment with it", exc_type=ImportError)

AUTOGPTQ = os.environ.get("ROPEWALK_AUTOGPTQ")


@pytest.fixture
def say(capsys):
    """Return a function that prints to the terminal; what a process of `pytest -n` prints to stdout, nobody sees."""

    def say(text):
        with capsys.disabled():
            print(f"\n{text}", file=sys.stderr)

    return say


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Return a function that has a folder of a name filled, once for all the processes of `pytest -n`."""
    mine = tmp_path_factory.getbasetemp()
    shared = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine

    def get(name, fill):
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                fill(shared / f"{name}.new")
                (shared / f"{name}.new").rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def float_model(once, shipped_folder):
    """Return a folder with a float model that computes what the shipped 4-bit one does, off its grid.

    The gains of the norms are multiplied into the layers behind them and the residual stream is turned by a
    random rotation (Ashkboos et al. 2024, arXiv:2401.15024, section 3), which changes no output. What is
    left has no trace of codes and scales, so packing it anew is an honest test.
    """
    return once("float", partial(write_float_model, shipped_folder))


def write_float_model(shipped_folder, folder):
    folder.mkdir()
    model, tokenizer = ropewalk.load(shipped_folder)
    torch.manual_seed(0)
    w = {}
    for name, module in model.named_modules():
        if isinstance(module, ropewalk.QuantLinear):
            w[f"{name}.weight"] = module(torch.eye(module.in_features)).t().double()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        w[name] = model.state_dict()[name].double()
    turn, _ = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64))
    gains = {name: tensor.double() for name, tensor in model.state_dict().items() if "norm" in name}
    w["model.embed_tokens.weight"] @= turn
    w["lm_head.weight"] = w["lm_head.weight"] * gains["model.norm.weight"] @ turn
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for norm, names in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for name in names:
                key = f"{layer}{name}.weight"
                w[key] = w[key] * gains[f"{layer}{norm}.weight"] @ turn
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            w[f"{layer}{name}.weight"] = turn.t() @ w[f"{layer}{name}.weight"]
    w |= {name: torch.ones_like(tensor) for name, tensor in gains.items()}
    write_weights(((name, tensor.to(torch.float16)) for name, tensor in w.items()), folder)
    config = json.loads((shipped_folder / "config.json").read_text())
    config.pop("quantization_config")
    write_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
    turned, _ = ropewalk.load(folder)
    ids = torch.tensor(tokenizer(held_out_text())["input_ids"][:200])[None]
    with torch.inference_mode():
        assert (turned(ids).logits - model(ids).logits).abs().max() < 0.05  # float16 weights


@pytest.fixture(scope="session")
def shipped_folder():
    from ropewalk.shipped import FOLDER

    return FOLDER


@pytest.fixture(scope="session")
def quantized(once, float_model):
    """Return a function that quantizes the float model, once for each setting."""

    def make(**settings):
        arguments = {"samples": 48, "length": 256, "group_size": 32, **settings}
        if settings.get("method") != "rtn":
            arguments["text"] = held_out_text()[:60_000]
        key = "-".join(f"{name}={value}" for name, value in sorted(settings.items()))
        return once(key, partial(ropewalk.quantize, float_model, **arguments))

    return make


def score(folder):
    """Return the perplexity at 256 tokens of the part of the held-out text that was not calibrated on."""
    model, tokenizer = ropewalk.load(folder)
    ids = torch.tensor(tokenizer(held_out_text()[60_000:], verbose=False)["input_ids"])
    return perplexity(model, ids[:8192], 256)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_rounding_to_nearest(float_model, quantized, bits, say):
    exact = score(float_model)
    rounded, gptq = score(quantized(bits=bits, method="rtn")), score(quantized(bits=bits))
    say(f"perplexity at {bits} bits, group 32: float {exact:.3f}, GPTQ {gptq:.3f}, round to nearest {rounded:.3f}")
    assert exact < gptq < rounded


def test_what_is_written(float_model, quantized):
    folder = quantized(bits=4)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    texts = [(folder / name).read_text() for name in names if name.endswith(".json")]
    assert not any(str(folder.parent) in text or "/tmp" in text for text in texts)
    settings = json.loads((folder / "quantize_config.json").read_text())
    assert {k: settings[k] for k in ("bits", "group_size", "desc_act", "static_groups", "sym", "quant_method")} == {
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "static_groups": False,
        "sym": True,
        "quant_method": "gptq",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["original_max_position_embeddings"] == 256
    assert config["rope_scaling"] is None  # as it was: what it means is drawn from it again
    assert config["quantization_config"]["checkpoint_format"] == "gptq"
    before, after = load_file(float_model / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    found = ropewalk.inspect(folder)
    assert found["rope"]["type"] == "partial-ntk"
    assert found["desc_act"] and found["sym"] and found["layers"]["packed"] == 28
    # q, k and v were quantized on the same inputs, in the same order
    q, k = (after[f"model.layers.0.self_attn.{name}_proj.g_idx"] for name in "qk")
    assert torch.equal(q, k)
    assert not torch.equal(q, torch.arange(256, dtype=torch.int32) // 32)


def test_progress_and_asymmetric_codes(float_model, tmp_path):
    done = []
    ropewalk.quantize(
        float_model,
        tmp_path / "out",
        sym=False,
        desc_act=False,
        group_size=64,
        text=held_out_text()[:20_000],
        samples=8,
        length=64,
        progress=lambda block, blocks: done.append((block, blocks)),
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    found = ropewalk.inspect(tmp_path / "out")
    assert (found["format"], found["sym"], found["desc_act"]) == ("gptq_v2", False, False)
    assert not list(tmp_path.glob(".out-*"))
    assert score(tmp_path / "out") < 1.1 * score(float_model)


def test_a_failure_keeps_the_log_and_leaves_no_folder(float_model, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "gptqmodel.py").write_text("raise RuntimeError('out of luck')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(RopewalkError, match=r"GPTQModel failed \(RuntimeError: out of luck\); its log: (.+)") as error:
        ropewalk.quantize(float_model, tmp_path / "out", text=held_out_text()[:5000], samples=2, length=16)
    log = Path(str(error.value).rpartition("its log: ")[2])
    assert "Traceback" in log.read_text()
    log.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_gpu_that_is_not_there(float_model, tmp_path):
    """GPTQModel would say nothing and take the CPU."""
    with pytest.raises(UsageError, match="device: expected cpu or one of 0 GPUs, found 'cuda:7'"):
        ropewalk.quantize(float_model, tmp_path / "out", text=held_out_text()[:5000], device="cuda:7")


def test_windows_that_gptqmodel_would_drop(float_model, tmp_path):
    arguments = {"text": held_out_text()[:5000], "samples": 1}
    with pytest.raises(UsageError, match="expected at least 1 sample of at least 11 tokens, found 1 of 10"):
        ropewalk.quantize(float_model, tmp_path / "out", length=10, **arguments)
    ropewalk.quantize(float_model, tmp_path / "out", length=11, group_size=32, **arguments)


CASES = {
    "shipped": None,
    "3 bits, group 32": {"bits": 3},
    "4 bits, no groups": {"bits": 4, "group_size": -1},
    "3 bits, no groups, no act-order": {"bits": 3, "group_size": -1, "desc_act": False},
    "4 bits, group 64, static groups": {"bits": 4, "group_size": 64, "static_groups": True},
}


@pytest.mark.parametrize("program", ["gptqmodel", "autogptq"])
@pytest.mark.parametrize("case", CASES)
def test_other_programs_compute_the_same(program, case, quantized, shipped_folder, tmp_path, say):
    if program == "autogptq" and AUTOGPTQ is None:
        pytest.skip("ROPEWALK_AUTOGPTQ names no interpreter; `make oracle` does")
    folder = shipped_folder if CASES[case] is None else quantized(**CASES[case])
    model, tokenizer = ropewalk.load(folder, rope="none")
    ids = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"][:512])[None]
    with torch.inference_mode():
        ours = model(ids).logits
    theirs, who = logits_of(program, folder, ids, tmp_path)
    difference = (ours - theirs).abs().max().item()
    say(f"{case}: {who}; largest difference of the logits at 512 positions {difference:.1e}")
    assert difference < 1e-4
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def logits_of(program, folder, ids, work):
    """Return the logits that another program computes, and what it says of itself."""
    save_file({"ids": ids}, work / "ids.safetensors")
    python = AUTOGPTQ if program == "autogptq" else sys.executable
    script = Path(__file__).with_name("oracle_logits.py")
    arguments = [program, str(folder), str(work / "ids.safetensors"), str(work / "logits.safetensors")]
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(work / "logits.safetensors")["logits"], done.stdout.strip().splitlines()[-1]


def named_by_gptqmodel(folder, copy):
    """Copy a folder; a Mixtral gets the names of transformers 5 for its experts, the only ones that GPTQModel reads."""
    shutil.copytree(folder, copy)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in (("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w2.", ".down_proj.")):
            name = name.replace(old, new)
        tensors[name.replace(".w3.", ".up_proj.")] = tensor
    write_weights(tensors.items(), copy)
    return copy


@pytest.mark.parametrize("arch", ["codellama", "qwen2", "mpt", "mixtral"])
def test_architectures_that_gptqmodel_packs(
    arch, shipped_folder, make_float_model, dequantized_folder, reference_model, tmp_path, say
):
    # More than the tokenizer's 2048: loaded for a Qwen2, it gets Qwen's own special tokens besides.
    config, _, weights = make_float_model(arch, vocab_size=2112)
    source, packed = tmp_path / "float", tmp_path / "packed"
    source.mkdir()
    write_weights(weights.items(), source)
    write_json(source / "config.json", config)
    for file in shipped_folder.glob("tokenizer*"):
        shutil.copy(file, source)
    ropewalk.quantize(source, packed, group_size=32, text=held_out_text()[:20_000], samples=16, length=64)
    tensors = load_file(packed / "model.safetensors")
    layers = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert {f"{layer}.weight" for layer in layers} <= weights.keys()  # the Hub's names
    assert all(torch.equal(tensors[name], tensor) for name, tensor in weights.items() if name in tensors)
    dequantized = dequantized_folder(packed)
    assert dequantized.keys() == weights.keys()
    for layer in layers:  # each of them its own weight
        exact = weights[f"{layer}.weight"].float()
        assert (dequantized[f"{layer}.weight"] - exact).norm() < 0.3 * exact.norm(), layer
    if arch == "mixtral":
        orders = [tensors[f"model.layers.0.block_sparse_moe.experts.{i}.w1.g_idx"] for i in range(8)]
        assert len({tuple(order.tolist()) for order in orders}) == 8  # of each expert's own tokens
    ids = torch.randint(3, 2048, (1, 100), generator=torch.Generator().manual_seed(0))
    model, _ = ropewalk.load(packed)
    with torch.inference_mode():
        ours, plain = model(ids).logits, reference_model(packed, dequantized)(ids).logits
    copy = named_by_gptqmodel(packed, tmp_path / "copy")
    theirs, who = logits_of("gptqmodel", copy, ids, tmp_path)
    differences = [(ours - other).abs().max().item() for other in (plain, theirs)]
    off = "{:.1e} from transformers, {:.1e} from GPTQModel".format(*differences)
    say(f"{arch}: {len(layers)} layers; {who}; largest difference of the logits at 100 positions {off}")
    assert max(differences) < 1e-4
    with torch.inference_mode():
        assert torch.equal(ropewalk.load(copy)[0](ids).logits, ours)


def test_what_packing_costs(tmp_path, float_model):
    """GPTQ is nearer to the float model than rounding is, and act-order takes it nearer still."""
    packings = [Packing(3, 128, act, True) for act in (False, True)]
    wanted = variants(packings, METHODS)
    rows = bench_packing(float_model, divide(held_out_text()), wanted, 256, root=tmp_path, tokens=4096)
    kl = {(row["method"], row["desc_act"]): row["kl"] for row in rows}
    assert kl["gptq", True] < kl["gptq", False] < 0.8 * kl["rtn", False]
