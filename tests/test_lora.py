"""LoRA on a packed base: adapters loaded, switched, combined and refused; training through the packed layers."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.errors import (
    AdapterError,
    CheckpointError,
    HeaderError,
    MergeError,
    MissingFileError,
    MissingPackageError,
    MissingTensorsError,
    PatchError,
    RopewalkError,
    UsageError,
)
from ropewalk.loader import peft_hook
from ropewalk.loader.lora import load_lora, name_adapters

peft = pytest.importorskip("peft")
PEFT = Version(peft.__version__)

# transformers says what PEFT it wants, and is installed with others all the same, as by text-generation-webui 4.7.
BY_TRANSFORMERS = pytest.mark.skipif(Version("0.19") > PEFT, reason="transformers itself does not take this PEFT")

ROPE = {"rope_type": "partial-ntk", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
IDS = torch.arange(3, 90)[None]
TARGETS = ["q_proj", "down_proj"]


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def write_adapter(plain, out, seed=0, **settings):
    """Train nothing: write an adapter with random factors, made on the plain model as its makers would."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})
    model = randomize(peft.get_peft_model(plain, config), seed)
    model.save_pretrained(out)
    return model.eval()


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def base(tmp_path, make_checkpoint, reference_model):
    """Return (folder of a packed model, function that builds the same in float32)."""
    weights = make_checkpoint(tmp_path / "base")
    return tmp_path / "base", lambda rope=ROPE: reference_model(tmp_path / "base", weights, rope)


def test_an_adapter_made_on_float_weights_loads_on_the_packed_base(tmp_path, base):
    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "lora"))
    model, _ = ropewalk.load(folder, lora=tmp_path / "lora")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (logits(model) - expected).abs().max() < 1e-4
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 1e-2
        assert torch.equal(logits(model), logits(ropewalk.load(folder)[0]))
    generated = model.generate(IDS[:, :9], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 9


def test_several_adapters_are_switched_and_deleted(tmp_path, base):
    folder, plain = base
    expected = {
        name: logits(write_adapter(plain(), tmp_path / name, seed, target_modules=targets))
        for seed, (name, targets) in enumerate(
            [("one", ["q_proj"]), ("two", ["q_proj", "up_proj"]), ("three", ["v_proj"])]
        )
    }
    model, _ = ropewalk.load(folder)
    without = logits(model)
    model = load_lora(model, {"one": tmp_path / "one", "second": str(tmp_path / "two"), "three": tmp_path / "three"})
    assert list(model.peft_config) == ["one", "second", "three"]
    assert model.active_adapters == ["one"]
    for name, key in (("one", "one"), ("second", "two"), ("three", "three"), ("one", "one")):
        model.set_adapter(name)
        assert (logits(model) - expected[key]).abs().max() < 1e-4
    model.delete_adapter("one")
    assert "one" not in model.peft_config
    model.set_adapter("second")
    assert (logits(model) - expected["two"]).abs().max() < 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), without)


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties"])
def test_adapters_combine_as_they_do_on_float_weights(tmp_path, base, how):
    folder, plain = base
    for seed, name in enumerate(("one", "two")):
        write_adapter(plain(), tmp_path / name, seed)
    expected = peft.PeftModel.from_pretrained(plain(), tmp_path / "one", adapter_name="one")
    expected.load_adapter(tmp_path / "two", "two")
    model, _ = ropewalk.load(folder, lora=[tmp_path / "one", tmp_path / "two"])
    density = {"density": 0.5} if how == "ties" else {}
    for each in (expected, model):
        each.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", combination_type=how, **density)
        each.set_adapter("both")
    assert (logits(model) - logits(expected)).abs().max() < 1e-4
    model.set_adapter("one")
    expected.set_adapter("both")
    assert (logits(model) - logits(expected)).abs().max() > 1e-3


def test_names(tmp_path, base):
    model, _ = ropewalk.load(base[0])
    folders = [tmp_path / name for name in ("x", "v1.5 (é)", "lora", "model", "update", "1")]
    assert list(name_adapters([*folders, tmp_path / "y" / "x"], model)) == [
        "x",
        "v1-5----",
        "adapter-lora",
        "adapter-model",
        "adapter-update",
        "adapter-1",
        "x-2",
    ]
    for name in ("", "a.b", "lora", "q_proj", "keys", "a b"):
        with pytest.raises(UsageError, match=r"found '.*'"):
            name_adapters({name: tmp_path}, model)
    for nothing in ([], {}):
        with pytest.raises(UsageError, match="expected a folder with an adapter, found none"):
            load_lora(model, nothing)


@pytest.mark.parametrize("name", ["adapter-lora", "e", "A", "default", "layer", "adapter-1", "mode"])
def test_an_adapter_of_any_name_keeps_its_tensors(tmp_path, base, name):
    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "a"))
    write_adapter(plain(), tmp_path / "b", 1)
    model, _ = ropewalk.load(folder, lora={"first": tmp_path / "b", name: tmp_path / "a"})
    model.set_adapter(name)
    assert (logits(model) - expected).abs().max() < 1e-4
    if Version("0.20") > PEFT and name in ("e", "A", "layer", "mode"):
        pytest.skip("this PEFT saves with one adapter all whose tensors have its name in theirs")
    model.save_pretrained(tmp_path / "out", selected_adapters=[name])
    out = tmp_path / "out" if name == "default" else tmp_path / "out" / name
    assert equal(load_file(out / "adapter_model.safetensors"), load_file(tmp_path / "a" / "adapter_model.safetensors"))


def test_the_rope_is_what_load_was_told_whatever_the_adapter_was_trained_for(tmp_path, base):
    """Of airophin there is a LoRA, too. An adapter says nothing of rotary embeddings: they are the base's, and the
    base of an adapter that was trained for partial NTK is a Llama that has to be told.
    """
    folder, plain = base
    config = json.loads((folder / "config.json").read_text())
    del config["original_max_position_embeddings"]  # as in the config of the Llama under airophin's adapter
    (folder / "config.json").write_text(json.dumps(config))
    expected = logits(write_adapter(plain(), tmp_path / "adapter"))
    model, _ = ropewalk.load(folder, lora=tmp_path / "adapter")
    assert model.config.rope_parameters["rope_type"] == "default"
    assert (logits(model) - expected).abs().max() > 1e-2
    model, _ = ropewalk.load(folder, rope="partial-ntk:factor=4,original=32", lora=tmp_path / "adapter")
    assert model.config.rope_parameters == ROPE
    assert (logits(model) - expected).abs().max() < 1e-4


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def without_one(weights):
    del weights[FIRST]
    return weights


def narrower(weights):
    return {name: tensor[:, :32].contiguous() if "lora_A" in name else tensor for name, tensor in weights.items()}


FAULTS = {
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        MissingFileError,
        r"a PEFT adapter \(adapter_config.json\), found none",
    ),
    "not json": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        AdapterError,
        "the config of a PEFT adapter, found JSONDecodeError",
    ),
    "unknown type": (lambda f: edit(f, peft_type="NEW"), AdapterError, "the config of a PEFT adapter, found KeyError"),
    "no type": (lambda f: (f / "adapter_config.json").write_text("{}"), AdapterError, "found KeyError: 'peft_type'"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        MissingFileError,
        r"the weights of the adapter \(adapter_model.safetensors\), found none",
    ),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 7 + b"\x00" * 9),
        HeaderError,
        "a header of at most",
    ),
    "rank": (
        lambda f: edit(f, r=8),
        AdapterError,
        r"shape \[8, .*\] of base_model.*lora_A.weight, as adapter_config.json and .*, found \[4,",
    ),
    "width": (lambda f: rewrite(f, narrower), AdapterError, r"of base_model.*lora_A.weight, .*, found \[4, 32\]"),
    "missing tensor": (lambda f: rewrite(f, without_one), MissingTensorsError, f"expected tensor {FIRST}, found none"),
    "more layers": (
        lambda f: rewrite(f, lambda w: {**w, FIRST.replace(".0.", ".7."): w[FIRST].clone()}),
        MissingTensorsError,
        "only tensors for layers of LlamaForCausalLM, found base_model.model.model.layers.7.mlp.down_proj.lora_A.weig",
    ),
    "a weight of the base": (
        lambda f: rewrite(f, lambda w: {**w, "base_model.model.model.embed_tokens.weight": torch.zeros(96, 64)}),
        MissingTensorsError,
        "only tensors of a LORA adapter, found base_model.model.model.embed_tokens.weight",
    ),
    "no such modules": (
        lambda f: edit(f, target_modules=["c_attn"]),
        AdapterError,
        "goes on this model, found one of type LORA: Target modules .*c_attn",
    ),
    "one module missing": (
        lambda f: (
            edit(f, target_modules=[*TARGETS, "w1"]),
            rewrite(f, lambda w: {**w, "w1.lora_A.weight": w[FIRST].clone()}),
        ),
        MissingTensorsError,
        "only tensors for layers of LlamaForCausalLM, found w1.lora_A.weight",
    ),
    "not a linear layer": (
        lambda f: edit(f, target_modules=["input_layernorm"]),
        AdapterError,
        "LlamaRMSNorm.* is not supported",
    ),
    "modules to save": (
        lambda f: edit(f, modules_to_save=["lm_head"]),
        MissingTensorsError,
        "tensor base_model.model.lm_head.weight, found none",
    ),
    "biases": (lambda f: edit(f, bias="all"), AdapterError, "without biases .*, found 'all'"),
    "dora": (lambda f: edit(f, use_dora=True), AdapterError, "without DoRA, as the base is packed, found use_dora"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), AdapterError, "one that changes them first .*'pissa'"),
    "pickle that is none": (
        lambda f: ((f / "adapter_model.safetensors").unlink(), (f / "adapter_model.bin").write_bytes(b"no")),
        AdapterError,
        "a pickle of tensors and of nothing else",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("second", [False, True], ids=["alone", "second"])
def test_what_does_not_fit_is_refused_and_leaves_the_base_as_it_was(tmp_path, base, fault, second):
    folder, plain = base
    damage, error, message = FAULTS[fault]
    if second and fault == "no such modules" and Version("0.21") > PEFT:  # which leaves it to us to find out
        error, message = MissingTensorsError, "only tensors for layers of LlamaForCausalLM, found base_model"
    write_adapter(plain(), tmp_path / "good")
    write_adapter(plain(), tmp_path / "bad")
    damage(tmp_path / "bad")
    model, _ = ropewalk.load(folder)
    before, expected, layers = state(model), logits(model), dict(model.named_modules())
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    folders = [tmp_path / "good", tmp_path / "bad"] if second else tmp_path / "bad"
    with pytest.raises(error, match=message) as caught:
        load_lora(model, folders)
    assert isinstance(caught.value, CheckpointError)
    assert str(tmp_path / "bad") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert equal(state(model), before)
    assert dict(model.named_modules()) == layers  # the very same modules
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), expected)
    logits(load_lora(model, tmp_path / "good"))  # and takes one that fits


@pytest.mark.parametrize("safe", [True, False])
def test_a_pickle_is_only_read_where_it_cannot_run_code(tmp_path, base, monkeypatch, safe):
    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "a"))
    torch.save(load_file(tmp_path / "a" / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    if safe:
        model, _ = ropewalk.load(folder, lora=tmp_path / "a")
        assert (logits(model) - expected).abs().max() < 1e-4
    else:
        monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
        with pytest.raises(AdapterError, match=r"or torch 2.10: with older.*found a pickle and torch 2.9.1"):
            ropewalk.load(folder, lora=tmp_path / "a")


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_code_is_refused(tmp_path, base):
    folder, plain = base
    write_adapter(plain(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({"x": Malicious(f"touch {tmp_path}/ran")}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle of tensors and of nothing else"):
        ropewalk.load(folder, lora=tmp_path / "a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "works"),
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), False),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, task_type="CAUSAL_LM"), False),
        (peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), False),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), True),
        (peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_kinds_of_adapters(tmp_path, base, config, works):
    folder, plain = base
    expected = peft.get_peft_model(plain(), copy.deepcopy(config))
    expected.save_pretrained(tmp_path / "a")
    model, _ = ropewalk.load(folder)
    before = state(model)
    if works:
        assert (logits(load_lora(model, tmp_path / "a")) - logits(expected.eval())).abs().max() < 1e-4
        return
    kind = config.peft_type.value
    with pytest.raises(AdapterError, match=f"an adapter that goes on this model, found one of type {kind}: "):
        load_lora(model, tmp_path / "a")
    assert equal(state(model), before)


def test_a_model_with_adapters_takes_more_by_pefts_own_means(tmp_path, base):
    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "one"))
    write_adapter(plain(), tmp_path / "two", 1)
    model, _ = ropewalk.load(folder, lora=tmp_path / "two")
    with pytest.raises(UsageError, match=r"model\.load_adapter adds to it"):
        load_lora(model, tmp_path / "one")
    model.load_adapter(tmp_path / "one", "one")
    model.set_adapter("one")
    assert (logits(model) - expected).abs().max() < 1e-4


def test_merging_is_refused_and_unloading_gives_the_base_back(tmp_path, base):
    folder, plain = base
    write_adapter(plain(), tmp_path / "a")
    model, _ = ropewalk.load(folder)
    before, expected, layers = state(model), logits(model), dict(model.named_modules())
    model = load_lora(model, tmp_path / "a")
    found = logits(model)
    sentence = r"codes of 4 bits cannot hold .*; keep the adapter .*, or merge it into the float16 model and quantize"
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(MergeError, match=sentence):
            merge()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with pytest.raises(MergeError, match=sentence):
        layer.merge()
    assert issubclass(MergeError, (UsageError, ValueError)) and issubclass(MergeError, RopewalkError)
    assert torch.equal(logits(model), found)
    assert layer.quant_linear_module is layer.base_layer
    back = model.unload()
    assert dict(back.named_modules()) == layers
    assert equal(state(back), before)
    assert torch.equal(logits(back), expected)


def test_merging_into_float_weights_still_works(tmp_path, make_plain):
    make_plain(tmp_path)
    model, _ = ropewalk.load(tmp_path)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    found = logits(randomize(model).eval())
    assert (logits(model.merge_and_unload()) - found).abs().max() < 1e-4


def train(model, steps, lr=1e-2):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("prepare", [None, True, False], ids=["", "reentrant", "not reentrant"])
def test_training_on_a_packed_base(tmp_path, base, prepare):
    """By PEFT's own functions and nothing of ours: 20 steps, gradient checkpointing, saving, loading again."""
    folder, _ = base
    model, _ = ropewalk.load(folder)
    before = state(model)
    if prepare is not None:
        checkpointing = {"use_reentrant": prepare}
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
        assert equal(state(model), before)  # no buffer cast
        assert model.is_gradient_checkpointing
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len(model.targeted_module_names) == 14  # and not the output embedding
    losses = train(model, 20)
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    found = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(ropewalk.load(folder, lora=tmp_path / "out")[0]), found)
    back = model.unload()
    assert equal(state(back), before)


@pytest.mark.parametrize("prepare", [None, True, False], ids=["", "reentrant", "not reentrant"])
def test_gradients_are_those_of_the_same_float_model(base, prepare):
    folder, plain = base
    gradients = []
    for model in (ropewalk.load(folder)[0], plain()):
        if prepare is not None:
            checkpointing = {"use_reentrant": prepare}
            model.quantization_method = "gptq"  # the plain one is to be treated alike
            model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
        config = peft.LoraConfig(r=4, target_modules=[*TARGETS, "o_proj"], task_type="CAUSAL_LM")
        model = randomize(peft.get_peft_model(model, config)).train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    packed, expected = gradients
    assert packed.keys() == expected.keys() and len(packed) == 12
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert (packed[name] - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-7


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_training_with_half_activations(base, dtype):
    model, _ = ropewalk.load(base[0], dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    losses = train(model, 12)
    assert losses[-1] < losses[0] - 0.2


@BY_TRANSFORMERS
def test_adapters_by_transformers_own_means(tmp_path, base):
    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "a"))
    model, _ = ropewalk.load(folder)
    model.load_adapter(str(tmp_path / "a"))
    assert (logits(model) - expected).abs().max() < 1e-4


def test_pefts_own_means_after_patch_and_from_pretrained(tmp_path, base):
    """Without `ropewalk.load`: PEFT loads, trains and saves on a model that transformers' from_pretrained gave."""
    from transformers import AutoModelForCausalLM

    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "a"))
    ropewalk.unpatch()
    ropewalk.patch()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        without = logits(model)
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "a")
        assert (logits(loaded) - expected).abs().max() < 1e-4
        model = loaded.unload()
        assert torch.equal(logits(model), without)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trained = peft.get_peft_model(model, config)
        losses = train(trained, 8)
        assert losses[-1] < losses[0]
        trained.eval().save_pretrained(tmp_path / "trained")
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
        assert torch.equal(logits(again), logits(trained))
    finally:
        ropewalk.unpatch()
    assert not peft_hook.is_enabled()


def test_the_patch_of_peft(base, monkeypatch):
    from peft.tuners.lora.model import LoraModel

    from ropewalk.patches import peft as patch
    from ropewalk.patches import statuses

    peft_hook.disable()
    theirs = dict(vars(LoraModel))
    ropewalk.patch("peft")
    ropewalk.patch("peft")
    assert {status["front_end"]: status["applied"] for status in statuses()}["peft"]
    assert vars(LoraModel)["_prepare_model"] is not theirs["_prepare_model"]
    ropewalk.unpatch("peft")
    assert not patch.status()["applied"]
    assert all(vars(LoraModel)[name] is theirs[name] for name in peft_hook.SIGNATURES)
    with monkeypatch.context() as other:
        other.setattr(LoraModel, "_prepare_model", lambda self, config: None)
        with pytest.raises(PatchError, match=r"expected a LoraModel with _prepare_model\(self, peft_config, model\)"):
            ropewalk.patch("peft")
    assert not patch.status()["applied"]


def test_a_model_on_several_devices_stays_where_it_is(tmp_path, base):
    from accelerate.big_modeling import dispatch_model

    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "one"))
    model, _ = ropewalk.load(folder)
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    dispatch_model(model, device_map={**places, "model.rotary_emb": "cpu"}, main_device="cpu", force_hooks=True)
    hooks = {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    assert hooks
    placed = dict(model.hf_device_map)
    model = load_lora(model, tmp_path / "one").unload()
    assert model.hf_device_map == placed
    assert hooks == {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    assert (logits(load_lora(model, tmp_path / "one")) - expected).abs().max() < 1e-4


def test_the_output_embedding_takes_an_adapter(tmp_path, base):
    folder, plain = base
    expected = logits(write_adapter(plain(), tmp_path / "one", target_modules=["lm_head", "embed_tokens"]))
    rewrite(tmp_path / "one", lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "one" / "adapter_model.safetensors")
    model, _ = ropewalk.load(folder)
    before = state(model)
    model = load_lora(model, tmp_path / "one")
    assert (logits(model) - expected).abs().max() < 1e-2 * expected.abs().max()  # the adapter in float16
    with pytest.raises(MergeError):
        model.merge_and_unload()
    assert equal(state(model.unload()), before)


def test_modules_saved_whole_are_loaded(tmp_path, base):
    folder, plain = base
    model = plain()
    with torch.no_grad():
        model.lm_head.weight.copy_(2 * model.lm_head.weight)  # exact in float16
    expected = logits(write_adapter(model, tmp_path / "one", modules_to_save=["lm_head"]))
    model, _ = ropewalk.load(folder, lora=tmp_path / "one")
    assert (logits(model) - expected).abs().max() < 1e-4


def test_modules_without_a_gradient_are_not_trained_whole(base):
    model, _ = ropewalk.load(base[0])
    head = model.lm_head
    weight = head.weight.detach()
    del head.weight
    head.register_buffer("weight", weight)  # as layers have it that keep their 16 bits
    config = peft.LoraConfig(target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UsageError, match="modules_to_save: expected modules with a gradient, found lm_head"):
        peft.get_peft_model(model, config)


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_peft_is_changed_when_it_is_imported_and_not_before(base):
    code = """
import sys, ropewalk
from ropewalk.loader import peft_hook
finders = list(sys.meta_path)
peft_hook.enable()
peft_hook.enable()
print("peft" in sys.modules, len(sys.meta_path) - len(finders), peft_hook.is_enabled())
from peft.tuners.lora.model import LoraModel
print(peft_hook._watch in sys.meta_path, peft_hook.is_enabled(), hasattr(LoraModel._prepare_model, "__wrapped__"))
peft_hook.disable()
print(peft_hook.is_enabled(), hasattr(LoraModel._prepare_model, "__wrapped__"))
peft_hook.enable()
print(peft_hook.is_enabled(), hasattr(LoraModel._prepare_model, "__wrapped__"))
"""
    assert run(code) == ["False", "1", "False", "False", "True", "True", "False", "False", "True", "True"]
    code = """
import sys, ropewalk
from ropewalk.loader import peft_hook
peft_hook.enable()
peft_hook.disable()
import peft
print(peft_hook.is_enabled(), any(isinstance(f, peft_hook._Watch) for f in sys.meta_path))
"""
    assert run(code) == ["False", "False"]


def test_without_the_hook_peft_does_as_it_did(base):
    model, _ = ropewalk.load(base[0])
    config = peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM")
    peft_hook.disable()
    try:
        with pytest.raises(ValueError, match=r"QuantLinear.* is not supported"):
            peft.get_peft_model(model, config)
    finally:
        peft_hook.enable()


def test_a_peft_of_another_make_is_named_and_not_changed(base, monkeypatch, caplog):
    from peft.tuners.lora.model import LoraModel

    model, _ = ropewalk.load(base[0])
    peft_hook.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(LoraModel, "_prepare_model", lambda self, config: None)
            peft_hook.enable()
            assert "found another in peft" in caplog.text
            with pytest.raises(UsageError, match="expected a LoraModel with _prepare_model"):
                load_lora(model, base[0])
    finally:
        peft_hook.enable()
    assert peft_hook.is_enabled()


def test_no_peft(base, monkeypatch):
    model, _ = ropewalk.load(base[0])
    peft_hook.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, peft_hook.MODULE, None)
            with pytest.raises(MissingPackageError, match=r"pip install 'ropewalk\[peft\]'"):
                load_lora(model, base[0])
    finally:
        peft_hook.disable()  # the finder waits for an import that has been
        peft_hook.enable()


def test_no_adapter_in_the_folder(tmp_path, base):
    with pytest.raises(MissingFileError, match=r"a PEFT adapter \(adapter_config.json\), found none"):
        ropewalk.load(base[0], lora=tmp_path)
