"""Scripts of 2023 that import load_quant: every signature it had, on the three formats of its files."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ropewalk
from ropewalk.errors import FormatError, UsageError
from ropewalk.gptq.format import unpack, zeros_v1_to_v2
from ropewalk.patches import gptq_for_llama

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text().partition("### GPTQ-for-LLaMa\n")[2].partition("\n##")[0]
PARTIAL = {"rope_type": "partial-ntk", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
NAMES = {
    "llama",
    "llama_inference",
    "llama_inference_dmapauto",
    "llama_inference_offload",
    "quant",
    "modelutils",
}


@pytest.fixture
def shim():
    ropewalk.patch("gptq_for_llama")
    yield gptq_for_llama
    ropewalk.unpatch("gptq_for_llama")


@pytest.fixture
def old_files(tmp_path, make_checkpoint):
    """Return a function that writes a model's folder without weights, and elsewhere the weights as GPTQ-for-LLaMa
    wrote them; it returns (folder, file, dequantized weights).
    """

    def write(version, suffix, bits=4):
        folder = tmp_path / "model"
        group_size = -1 if version == 1 else 32
        weights = make_checkpoint(folder, bits=bits, group_size=group_size, desc_act=version == 3)
        tensors = load_file(folder / "model.safetensors")
        for name in [n for n in tensors if n.endswith(".qweight")]:
            layer = name.removesuffix(".qweight")
            tensors[f"{layer}.bias"] = torch.zeros(tensors[name].shape[1])  # it gave every layer one
            if version < 3:
                del tensors[f"{layer}.g_idx"]
            if version == 1:
                qzeros, scales = tensors.pop(f"{layer}.qzeros"), tensors[f"{layer}.scales"].float()
                zeros = unpack(zeros_v1_to_v2(qzeros, bits), bits, dim=1)
                tensors |= {f"{layer}.zeros": (zeros * scales).t(), f"{layer}.scales": scales.t()}
        for file in ("model.safetensors", "quantize_config.json"):
            (folder / file).unlink()
        checkpoints = tmp_path / "checkpoints"
        checkpoints.mkdir()
        file = checkpoints / f"weights{suffix}"
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        (save_file if suffix == ".safetensors" else torch.save)(tensors, file)
        return folder, file, weights

    return write


def logits(model):
    ids = torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits


def check(model, folder, weights, reference_model):
    found, expected = logits(model), logits(reference_model(folder, weights, PARTIAL))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert sum(isinstance(layer, ropewalk.QuantLinear) for layer in model.modules()) == 14


# branch -> the call, as scripts for it make it
CALLS = {
    "old-cuda": lambda load, folder, file, group: load(folder, file, 4, group),
    "old-cuda, llama_inference": lambda load, folder, file, group: load(folder, file, 4, group, -1),
    "cuda, webui's": lambda load, folder, file, group: load(
        folder, file, 4, group, faster_kernel=False, exclude_layers=["lm_head"], kernel_switch_threshold=128
    ),
    "cuda, by position": lambda load, folder, file, group: load(folder, file, 4, group, True, ["lm_head"], 128),
    "triton": lambda load, folder, file, group: load(
        folder, file, 4, groupsize=group, fused_mlp=True, eval=True, warmup_autotune=True
    ),
    "triton, by position": lambda load, folder, file, group: load(folder, file, 4, group, False, True, False),
    "fastest-inference-4bit": lambda load, folder, file, group: load(folder, file, 4, group, act_order=True),
    "dmapauto": lambda load, folder, file, group: load(folder, file, 4, group, {"": "cpu"}),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_signature_on_every_format(shim, old_files, reference_model, version, suffix):
    from llama import load_quant
    from llama_inference import load_quant as of_inference

    assert load_quant is of_inference
    folder, file, weights = old_files(version, suffix)
    group = -1 if version == 1 else 32
    first = None
    all_of_them = (version, suffix) == (3, ".pt")
    for call in CALLS.values() if all_of_them else (CALLS[name] for name in ("old-cuda", "cuda, webui's", "triton")):
        model = call(load_quant, str(folder), str(file), group)
        first = logits(model) if first is None else first
        assert torch.equal(logits(model), first)
        assert not model.training
        assert model.seqlen == 128
    check(model, folder, weights, reference_model)


def test_three_bits_and_training_mode(shim, old_files, reference_model):
    from llama import load_quant

    folder, file, weights = old_files(3, ".safetensors", bits=3)
    model = load_quant(folder, file.parent, 3, 32, True, False)  # eval=False; the folder of the file
    assert model.training
    check(model.eval(), folder, weights, reference_model)


def test_offloading_computes_where_the_layers_are(shim, old_files, reference_model, monkeypatch):
    from llama_inference_offload import load_quant

    folder, file, weights = old_files(3, ".pt")
    model = load_quant(str(folder), str(file), 4, 32, 1)
    check(model, folder, weights, reference_model)
    assert gptq_for_llama._places(folder, {"pre_layer": 1}) == "cpu"  # there is no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    places = gptq_for_llama._places(folder, {"pre_layer": 1})
    assert places == {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.norm": 0,
        "lm_head": 0,
        "model.layers.0": 0,
        "model.layers.1": "cpu",
    }
    names = {name for name, _ in model.named_modules()}
    assert set(places) <= names
    assert gptq_for_llama._places(folder, {"device": 1}) == 1


def test_what_no_branch_takes(shim, old_files):
    from llama import load_quant

    folder, file, _ = old_files(3, ".safetensors")
    with pytest.raises(UsageError, match=r"expected one of fused_mlp.*found fused_attention"):
        load_quant(folder, file, 4, 32, fused_attention=True)
    with pytest.raises(UsageError, match="expected device after groupsize, found 2 values"):
        load_quant(folder, file, 4, 32, 0, True)
    with pytest.raises(UsageError, match="bits: expected 2, 3, 4, 8, found 16"):
        load_quant(folder, file, 16, 32)
    with pytest.raises(FormatError):
        load_quant(folder, file, 3, 32)


def test_scripts_that_put_the_layers_in_themselves(shim, old_files, reference_model):
    """As text-generation-webui's own _load_quant did, from a config of transformers and a state dict."""
    from inspect import getfullargspec

    from modelutils import find_layers
    from quant import QuantLinear, make_quant
    from transformers import AutoConfig, AutoModelForCausalLM

    assert {"groupsize", "faster", "kernel_switch_threshold"} <= set(getfullargspec(make_quant).args)
    folder, file, weights = old_files(3, ".safetensors")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    layers = find_layers(model)
    assert layers.keys() == {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    del layers["lm_head"]
    make_quant(model, layers, 4, 32)
    left = model.load_state_dict(load_file(file), strict=False)
    assert not left.missing_keys
    assert all(name.endswith(".bias") for name in left.unexpected_keys)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    check(model, folder, weights, reference_model)  # partial NTK, which the script knows nothing of
    # the order of arguments of the branches without `faster`
    one = nn.ModuleDict({"a": nn.Linear(32, 32, bias=False), "b": nn.Linear(32, 32)})
    make_quant(one, ["inside.b"], 4, -1, "inside")
    assert type(one["a"]) is nn.Linear
    assert isinstance(one["b"], QuantLinear) and one["b"].bias is not None


def test_applying_twice_and_taking_out_again():
    assert NAMES.isdisjoint(sys.modules)
    said = gptq_for_llama.apply()
    assert all(name in said for name in NAMES)
    before = {name: sys.modules[name] for name in NAMES}
    assert gptq_for_llama.apply() == said
    assert {name: sys.modules[name] for name in NAMES} == before
    assert gptq_for_llama.status()["applied"]
    gptq_for_llama.revert()
    assert NAMES.isdisjoint(sys.modules)
    assert not gptq_for_llama.status()["applied"]


def test_a_real_one_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "llama.py").write_text("mine = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "; llama can be imported without, and is left alone" in gptq_for_llama.apply()
        import llama
        import llama_inference

        assert llama.mine
        assert llama_inference.load_quant is gptq_for_llama.load_quant
    finally:
        gptq_for_llama.revert()
        sys.modules.pop("llama", None)


SCRIPT = """
import argparse
import sys

sys.path.insert(0, "repositories/GPTQ-for-LLaMa")
from llama_inference import load_quant
from modelutils import DEV

import torch
from transformers import AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model")
parser.add_argument("--wbits", type=int)
parser.add_argument("--groupsize", type=int, default=-1)
parser.add_argument("--load")
parser.add_argument("--device", type=int, default=-1)
args = parser.parse_args()
model = load_quant(args.model, args.load, args.wbits, args.groupsize, args.device)
model.to(DEV)
tokenizer = AutoTokenizer.from_pretrained(args.model, use_fast=False)
ids = tokenizer.encode("And the LORD said unto Moses,", return_tensors="pt").to(DEV)
with torch.no_grad():
    made = model.generate(ids, do_sample=False, min_length=0, max_length=30)
print(tokenizer.decode([el.item() for el in made[0]], skip_special_tokens=True))
"""


def test_a_script_as_it_is_by_the_recipe_of_the_readme(tmp_path, shipped):
    line = next(line for line in README.splitlines() if line.startswith("    python -m"))
    (tmp_path / "SCRIPT.py").write_text(SCRIPT)
    ignored = shutil.ignore_patterns("*.safetensors", "quantize_config.json")
    shutil.copytree(shipped, tmp_path / "model", ignore=ignored)
    torch.save(load_file(next(shipped.glob("*.safetensors"))), tmp_path / "llama-13b-4bit-32g.pt")
    command = [sys.executable, *shlex.split(line)[1:]]
    environment = {**os.environ, "ROPEWALK_CPU_MODE": "exact"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    model, tokenizer = ropewalk.load(shipped)
    ids = tokenizer("And the LORD said unto Moses,", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, do_sample=False, max_length=30)[0], skip_special_tokens=True)
    assert done.stdout.strip() == expected.strip()


def test_no_script(tmp_path):
    for arguments in ([], [tmp_path / "nothing.py"]):
        command = [sys.executable, "-m", "ropewalk.patches.gptq_for_llama", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1
        assert done.stderr.startswith("gptq_for_llama: expected a script and its arguments, found")
        assert len(done.stderr.splitlines()) == 1


def test_the_recipe_of_the_readme(old_files, tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    folder, file, _ = old_files(3, ".pt")
    for word, path in (("llama-13b-folder", folder), ("llama-13b-4bit-32g.pt", file)):
        assert f'"{word}"' in code
        code = code.replace(word, str(path))
    script = tmp_path / "script.py"
    script.write_text(code + "\nprint(type(model).__name__, type(model.model.layers[0].mlp.up_proj).__module__)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["LlamaForCausalLM", "ropewalk.loader.quant_linear"], done.stderr
