"""GPTQModel with our layers, in the environment that `make oracle` makes; elsewhere this is skipped."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.bench.perplexity import perplexity
from ropewalk.errors import PatchError
from ropewalk.loader.rotary import RopewalkRotaryEmbedding
from ropewalk.shipped import FOLDER, held_out_text

pytest.importorskip("gptqmodel", reason="`make oracle` makes an environment with it", exc_type=ImportError)

from gptqmodel import BACKEND, GPTQModel
from gptqmodel.adapter.adapter import Lora
from gptqmodel.models import loader
from gptqmodel.utils import importer

IDS = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def patched():
    ropewalk.patch("gptqmodel")
    yield
    ropewalk.unpatch("gptqmodel")


@pytest.fixture(scope="module", autouse=True)
def _eager():
    """Have GPTQModel's own layers run uncompiled: the same arithmetic, without minutes of compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def make(make_checkpoint, tmp_path):
    """Return a function that writes a packed checkpoint with a tokenizer, without which GPTQModel loads none; it
    returns the folder and the weights.
    """

    def make(**settings):
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        weights = make_checkpoint(folder, config_in="config.json", **settings)
        for file in FOLDER.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder, weights

    return make


def load(folder, **options):
    return GPTQModel.load(str(folder), device="cpu", **{"dtype": torch.float16, **options})


def classes_of(loaded):
    return {type(module).__name__ for module in loaded.model.modules() if hasattr(module, "qweight")}


def logits_of(loaded, ids=IDS):
    """Return logits in float32, where a wrong bit cannot hide behind rounding."""
    model = loaded.model.float()
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def rename_experts(folder):
    """Give Mixtral's experts the names of transformers 5, the only ones that GPTQModel reads."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in (("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w2.", ".down_proj.")):
            name = name.replace(old, new)
        tensors[name.replace(".w3.", ".up_proj.")] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


V2 = {"sym": False, "checkpoint_format": "gptq_v2"}
CASES = {
    "4 bits, act-order": {"arch": "codellama"},
    "3 bits, act-order": {"arch": "codellama", "bits": 3},
    "2 bits": {"arch": "codellama", "bits": 2, "desc_act": False},
    "8 bits, no groups": {"arch": "codellama", "bits": 8, "group_size": -1},
    "4 bits, v2, asymmetric": {"arch": "codellama", **V2},
    "3 bits, v2, asymmetric": {"arch": "codellama", "bits": 3, **V2},
    "2 bits, v2, asymmetric": {"arch": "codellama", "bits": 2, **V2},
    "8 bits, v2, asymmetric": {"arch": "codellama", "bits": 8, **V2},
    "v2, symmetric": {"arch": "codellama", "checkpoint_format": "gptq_v2"},
    "linear rope": {"arch": "orca"},
    "biases": {"arch": "qwen2", "sizes": {"vocab_size": 2112}},  # above what Qwen's tokenizer adds
    "mistral": {"arch": "mistral"},
    "ALiBi": {"arch": "mpt"},
    "experts": {"arch": "mixtral"},
}


@pytest.mark.parametrize("case", CASES)
def test_computes_what_their_own_layers_compute(case, make, reference_model):
    """Within twice their own error of float64."""
    folder, weights = make(**CASES[case])
    exact = reference_model(folder, weights).double()
    if case == "experts":
        exact.set_experts_implementation("eager")  # torch's grouped product has no float64
        rename_experts(folder)
    with torch.inference_mode():
        expected = exact(IDS, use_cache=False).logits
    theirs = load(folder, backend=BACKEND.TORCH)
    assert classes_of(theirs) == {"TorchLinear"}
    error = (logits_of(theirs) - expected).abs().max().item()
    ropewalk.patch("gptqmodel")
    ours = load(folder)
    ropewalk.unpatch("gptqmodel")
    assert classes_of(ours) == {"RopewalkLinear"}
    assert (logits_of(ours) - expected).abs().max().item() <= 2 * error + 1e-6


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.float32])
def test_the_model_that_ships_is_as_ropewalk_loads_it(dtype, patched, caplog):
    """The rope is partial NTK, and scales are the file's where GPTQModel would round them to bfloat16."""
    with caplog.at_level(logging.INFO, "ropewalk"):
        loaded = load(FOLDER, dtype=dtype)
    assert re.search("rope: partial-ntk .*airophin-13b-pntk-16k", caplog.text)
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    model, tokenizer = ropewalk.load(FOLDER, dtype=dtype, fuse="none")
    assert loaded.model.dtype == dtype
    rotary = loaded.model.model.rotary_emb
    assert isinstance(rotary, RopewalkRotaryEmbedding)
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)
    assert loaded.model.config.rope_parameters == model.config.rope_parameters
    ids = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"][:700])[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def test_context_beyond_the_original_is_of_use():
    """With their rope perplexity rises by half from 256 to 1024 tokens; with the one that was meant it falls."""
    found = {}
    for who in ("theirs", "ours"):
        if who == "ours":
            ropewalk.patch("gptqmodel")
        loaded = load(FOLDER)
        ropewalk.unpatch("gptqmodel")
        ids = torch.tensor(loaded.tokenizer(held_out_text(), verbose=False)["input_ids"][:4096])
        found[who] = [perplexity(loaded.model.float(), ids, context) for context in (256, 1024)]
    assert found["theirs"][1] > 1.4 * found["theirs"][0]
    assert found["ours"][1] < found["ours"][0]


@pytest.mark.parametrize("settings", [{}, {"bits": 3, **V2}], ids=["v1", "v2"])
def test_saved_again_bit_for_bit(settings, patched, make, tmp_path):
    folder, _ = make(arch="airophin", **settings)
    loaded = load(folder)
    before = loaded.model
    expected = logits_of(loaded)
    # transformers writes what our layers give back, GPTQModel reads the file again.
    written = {name: t for name, t in before.state_dict().items() if name.rpartition(".")[2] in PACKED}
    loaded.save_quantized(str(tmp_path / "saved"))
    packed = load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == packed.keys()
    assert all(
        torch.equal(saved[name], tensor) and saved[name].dtype == tensor.dtype for name, tensor in packed.items()
    )
    assert len(written) == 4 * 14
    assert all(torch.equal(tensor, packed[name]) for name, tensor in written.items())
    again = load(tmp_path / "saved")
    assert again.model.config.rope_parameters["rope_type"] == "partial-ntk"
    assert torch.equal(logits_of(again), expected)


PACKED = ("qweight", "qzeros", "scales", "g_idx")


def test_shards_and_layers_with_settings_of_their_own(patched, make, tmp_path):
    """Three shards, and `dynamic`: some layers in 8 bits."""
    folder, _ = make(arch="codellama", bits=4)
    other, _ = make(arch="codellama", bits=8)
    tensors, eight = (load_file(f / "model.safetensors") for f in (folder, other))
    for name in [name for name in tensors if "layers.1.mlp" in name]:
        del tensors[name]
    tensors |= {name: tensor for name, tensor in eight.items() if "layers.1.mlp" in name}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:.*layers\.1\.mlp.*": {"bits": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    where = {}
    for i, names in enumerate((sorted(tensors)[::3], sorted(tensors)[1::3], sorted(tensors)[2::3])):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(folder, dtype=torch.bfloat16)
    assert classes_of(loaded) == {"RopewalkLinear"}
    assert {m.bits for n, m in loaded.model.named_modules() if hasattr(m, "qweight") and "layers.1.mlp" in n} == {8}
    model, _ = ropewalk.load(folder, dtype=torch.bfloat16, fuse="none")
    with torch.inference_mode():
        assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


def test_what_is_left_to_their_own_layers(patched, make):
    folder, _ = make(arch="codellama")
    assert classes_of(load(folder, backend=BACKEND.TORCH)) == {"TorchLinear"}
    settings = {"bits": 4, "group_size": 32, "desc_act": True, "sym": True, "pack_dtype": torch.int32}
    choose = importer.select_quant_linear
    assert choose(**settings, device="cpu").__name__ == "RopewalkLinear"
    assert choose(**settings, device="cuda").__name__ == "RopewalkLinear"
    assert choose(**settings, device="cpu", backend=BACKEND.AUTO_TRAINABLE).__name__ == "RopewalkLinear"
    assert choose(**settings, device="cpu", pack=True).__name__ != "RopewalkLinear"
    assert choose(**settings, device="cpu", adapter=Lora(path="adapter", rank=8)).__name__ != "RopewalkLinear"
    assert choose(**settings | {"bits": 5}, device="cpu").__name__ == "TorchLinear"
    assert choose(**settings, device="cpu", format="gptq_p").__name__ != "RopewalkLinear"


def test_a_layer_that_ours_cannot_hold(patched, make):
    """5 bits, and sizes that do not fill whole words: GPTQModel takes the next class of its table."""
    from ropewalk.patches.gptqmodel_layer import RopewalkLinear

    settings = {"bits": 4, "group_size": 32, "pack_dtype": torch.int32, "in_features": 64}
    assert RopewalkLinear.validate(**settings, out_features=64) == (True, None)
    fits, error = RopewalkLinear.validate(**settings, out_features=60)
    assert not fits and isinstance(error, NotImplementedError)
    assert "out_features: expected a multiple of 8 for 4 bits, found 60" in str(error)


def test_no_tokens_at_all(patched, make):
    folder, _ = make(arch="codellama")
    layer = load(folder).model.model.layers[0].self_attn.q_proj
    assert layer(torch.empty(0, 64)).shape == (0, 64)


def test_lora_trains_on_it(patched, make):
    from peft import LoraConfig, get_peft_model

    folder, _ = make(arch="codellama")
    model = get_peft_model(load(folder).model.float(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {type(m.base_layer).__name__ for m in model.modules() if hasattr(m, "base_layer")} == {"RopewalkLinear"}


def test_revert_restores_all_of_it(make):
    from transformers.models.llama import modeling_llama

    def what_is_there():
        names = ("load_checkpoint_in_model_then_tie_weights", "gptqmodel_post_init")
        return [importer.AUTO_BACKEND_KERNEL_MAPPING, *(getattr(loader, name) for name in names)]

    folder, _ = make(arch="airophin")
    ropewalk.unpatch()
    before, rotation = what_is_there(), modeling_llama.apply_rotary_pos_emb
    ropewalk.patch("gptqmodel")
    during = what_is_there()
    ropewalk.patch("gptqmodel")
    assert all(a is b for a, b in zip(during, what_is_there(), strict=True))
    assert not any(a is b for a, b in zip(before, during, strict=True))
    ours = load(folder)
    ropewalk.unpatch("gptqmodel")
    assert all(a is b for a, b in zip(before, what_is_there(), strict=True))
    assert modeling_llama.apply_rotary_pos_emb is rotation
    theirs = load(folder)
    assert "RopewalkLinear" not in classes_of(theirs)
    assert type(theirs.model.model.rotary_emb) is modeling_llama.LlamaRotaryEmbedding
    assert classes_of(ours) == {"RopewalkLinear"}
    assert logits_of(ours).isfinite().all()


@pytest.mark.parametrize("fault", ["no table", "other classes", "other arguments", "other modules"])
def test_a_gptqmodel_that_is_not_known(fault, monkeypatch):
    if fault == "no table":
        monkeypatch.delattr(importer, "AUTO_BACKEND_KERNEL_MAPPING")
    elif fault == "other classes":
        table = {method: dict.fromkeys(formats) for method, formats in importer.AUTO_BACKEND_KERNEL_MAPPING.items()}
        monkeypatch.setattr(importer, "AUTO_BACKEND_KERNEL_MAPPING", table)
    elif fault == "other arguments":
        monkeypatch.setattr(loader, "gptqmodel_post_init", lambda net: net)
    else:
        monkeypatch.delitem(sys.modules, "ropewalk.patches.gptqmodel_layer", raising=False)
        monkeypatch.delattr("gptqmodel.nn_modules.qlinear.GPTQQuantLinear")
    before = (vars(importer).copy(), vars(loader).copy())
    with pytest.raises(PatchError, match=r"gptqmodel 7\.6\.0: expected .*, found .*; nothing was replaced"):
        ropewalk.patch("gptqmodel")
    assert (vars(importer), vars(loader)) == before
    status = next(s for s in ropewalk.patches.statuses() if s["front_end"] == "gptqmodel")
    assert status["applied"] is False


def test_the_recipe_of_the_readme():
    section = README.read_text().partition("### GPTQModel\n")[2].partition("\n### ")[0]
    code = re.search("```python\n(.*?)```", section, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = done.stdout.rpartition("In the beginning")[2]
    assert len(answer) > 100 and len(set(answer.split())) > 10
