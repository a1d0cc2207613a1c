"""`ropewalk.load`: the model computes what the same weights compute dequantized in plain transformers."""

import importlib.util
import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import ropewalk
from ropewalk.errors import MissingPackageError, UsageError
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.rotary import RopewalkRotaryEmbedding

PARTIAL = {
    "rope_type": "partial-ntk",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def agrees(model, reference, length=100):
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = model(ids).logits, reference(ids).logits
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.1  # they do depend on the input
    return found


@pytest.mark.parametrize(
    ("arch", "rope"),
    [("airophin", PARTIAL), ("codellama", None), ("orca", None), ("qwen2", None), ("mistral", None)],
)
def test_architectures(tmp_path, make_checkpoint, reference_model, arch, rope):
    weights = make_checkpoint(tmp_path, arch)
    model, tokenizer = ropewalk.load(tmp_path)
    assert tokenizer is None  # there is none in the folder
    agrees(model, reference_model(tmp_path, weights, rope))
    assert not model.training
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    assert isinstance(model.model.rotary_emb, RopewalkRotaryEmbedding)
    if arch == "codellama":
        assert model.config.rope_parameters["rope_theta"] == 1000000


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64])  # 64 leaves down_proj a last group of 32
@pytest.mark.parametrize("sym", [True, False])
def test_packings(tmp_path, make_checkpoint, reference_model, bits, group_size, sym):
    weights = make_checkpoint(tmp_path, bits=bits, group_size=group_size, sym=sym)
    model, _ = ropewalk.load(tmp_path)
    agrees(model, reference_model(tmp_path, weights, PARTIAL))


@pytest.mark.parametrize(
    "form",
    [
        {"file": "gptq_model-4bit-32g.safetensors"},  # AutoGPTQ in 2023
        {"file": "gptq_model-4bit-32g.safetensors", "config_in": "quant_config.json"},
        {"file": "model.safetensors", "config_in": "config.json"},  # modern
        {"file": "anything.safetensors", "config_in": "config.json"},
        {"file": "4bit-32g.safetensors", "config_in": ""},  # nothing says how it is packed
        {"checkpoint_format": "gptq_v2", "sym": False},
        {"desc_act": False, "with_g_idx": False},
        {"extra": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(16) for i in range(2)}},
    ],
)
def test_forms_of_folders(tmp_path, make_checkpoint, reference_model, form):
    weights = make_checkpoint(tmp_path, **form)
    model, _ = ropewalk.load(tmp_path)
    agrees(model, reference_model(tmp_path, weights, PARTIAL))


def test_model_file_base_name_is_followed(tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, file="custom.safetensors")
    make_checkpoint(tmp_path / "other", seed=1)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "zzz.safetensors")
    config = tmp_path / "quantize_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_file_base_name": "custom"}))
    model, _ = ropewalk.load(tmp_path)
    agrees(model, reference_model(tmp_path, weights, PARTIAL))


def test_the_rope_decision_is_logged_and_kept_in_the_config(tmp_path, make_checkpoint, caplog):
    make_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO, "ropewalk"):
        model, _ = ropewalk.load(tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("rope:")]
    assert len(lines) == 1
    assert lines[0].startswith(
        "rope: partial-ntk (rope_theta 10000, factor 4, original_max_position_embeddings 32), since"
    )
    assert model.config.rope_parameters == PARTIAL


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("none", {"rope_type": "default", "rope_theta": 10000.0}),
        ("linear:2", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2}),
        (
            "yarn",
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ],
)
def test_an_override_of_the_rope(tmp_path, make_checkpoint, reference_model, override, expected):
    weights = make_checkpoint(tmp_path)
    model, _ = ropewalk.load(tmp_path, rope=override)
    assert model.config.rope_parameters == expected
    found = agrees(model, reference_model(tmp_path, weights, expected))
    auto, _ = ropewalk.load(tmp_path)
    ids = torch.randint(3, 96, (2, 100), generator=torch.Generator().manual_seed(0))
    assert (auto(ids).logits - found).abs().max() > 1e-2


def test_plain_weights_load_with_the_right_rope(tmp_path, make_plain, reference_model):
    weights = make_plain(tmp_path)
    loaded, _ = ropewalk.load(tmp_path)
    assert not any(isinstance(m, QuantLinear) for m in loaded.modules())
    agrees(loaded, reference_model(tmp_path, weights, PARTIAL))
    assert ropewalk.inspect(tmp_path)["format"] == "plain"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.bfloat16])
def test_dtype(tmp_path, make_checkpoint, reference_model, dtype):
    weights = make_checkpoint(tmp_path)
    model, _ = ropewalk.load(tmp_path, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == wanted
    assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(3, 60)[None]
    found, expected = model(ids).logits.float(), reference_model(tmp_path, weights, PARTIAL)(ids).logits
    assert (found - expected).abs().max() < (0.05 if wanted == torch.float16 else 0.5) * expected.abs().max()


def test_an_unknown_dtype(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="expected float32, float16 or bfloat16, found 'int8'"):
        ropewalk.load(tmp_path, dtype="int8")


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"])
def test_device_map(tmp_path, make_checkpoint, reference_model, device_map):
    weights = make_checkpoint(tmp_path)
    model, _ = ropewalk.load(tmp_path, device_map=device_map, dtype="float32")
    agrees(model, reference_model(tmp_path, weights, PARTIAL))


def test_saving_writes_the_packed_tensors_back_bit_for_bit(tmp_path, make_checkpoint):
    from safetensors.torch import load_file

    make_checkpoint(tmp_path / "a", sym=False, file="gptq_model-4bit-32g.safetensors")
    model, _ = ropewalk.load(tmp_path / "a", dtype="float16")
    model.save_pretrained(tmp_path / "b")
    before = load_file(tmp_path / "a" / "gptq_model-4bit-32g.safetensors")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert config["quantization_config"]["bits"] == 4
    assert config["rope_parameters"] == PARTIAL
    assert "transformers_weights" not in config
    again, _ = ropewalk.load(tmp_path / "b", dtype="float16")
    ids = torch.arange(3, 60)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_generate_works_as_in_any_model(tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path)
    model, _ = ropewalk.load(tmp_path)
    reference = reference_model(tmp_path, weights, PARTIAL)
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    arguments = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = reference.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), expected)
    # Left padding: the positions of the shorter row begin at 0 all the same.
    padded = torch.nn.functional.pad(ids[:1], (5, 0), value=0)
    mask = (torch.arange(25) >= 5).long()[None]
    short = model.generate(padded, attention_mask=mask, **arguments)
    assert torch.equal(short[0, 25:], expected[0, 20:])


def test_the_decode_step_compiles_whole(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    model, _ = ropewalk.load(tmp_path)
    ids = torch.arange(3, 40)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.fixture
def patched():
    ropewalk.patch()
    ropewalk.patch()  # twice changes nothing
    yield
    ropewalk.unpatch()
    ropewalk.unpatch()


def test_patch_lets_from_pretrained_do_it(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path, config_in="config.json")
    ours, _ = ropewalk.load(tmp_path)
    stock = PreTrainedModel.__dict__["from_pretrained"]
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    ropewalk.patch()
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    finally:
        ropewalk.unpatch()
    assert PreTrainedModel.__dict__["from_pretrained"] is stock
    ids = torch.arange(3, 96)[None]
    assert torch.equal(model(ids).logits, ours(ids).logits)
    assert model.config.rope_parameters == PARTIAL
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("arch", ["airophin", "mpt", "mixtral", "qwen2"])
def test_patched_from_pretrained_takes_the_folders_of_2023(tmp_path, make_checkpoint, patched, arch):
    make_checkpoint(tmp_path, arch, file="gptq_model-4bit-32g.safetensors")
    ours, _ = ropewalk.load(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, torch_dtype=torch.float32, device_map="auto", trust_remote_code=False, output_loading_info=True
    )
    ids = torch.arange(3, 60)[None]
    assert torch.equal(model(ids).logits, ours(ids).logits)
    assert not any(info.values())
    # The config's dtype is the default, as transformers has it.
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float16


def test_patched_from_pretrained_follows_the_callers_config(tmp_path, make_checkpoint, patched):
    make_checkpoint(tmp_path, config_in="config.json")
    config = AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype="float32")
    linear, _ = ropewalk.load(tmp_path, rope="linear:2")
    ids = torch.arange(3, 60)[None]
    assert torch.equal(model(ids).logits, linear(ids).logits)
    with pytest.raises(UsageError, match="from_pretrained: expected no tp_plan for a packed model"):
        AutoModelForCausalLM.from_pretrained(tmp_path, tp_plan="auto")


def test_patched_from_pretrained_leaves_other_models_alone(tmp_path, make_plain, patched):
    make_plain(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    with pytest.raises(OSError, match="no-such-folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "no-such-folder")


@pytest.mark.parametrize(("front_end", "package"), [("auto_gptq", "auto-gptq"), ("gptqmodel", "gptqmodel")])
def test_a_front_end_that_is_not_installed(front_end, package):
    if importlib.util.find_spec(front_end):
        pytest.skip(f"{front_end} is installed")
    with pytest.raises(MissingPackageError, match=f"patch: expected the package {package}.*No module named"):
        ropewalk.patch(front_end)
    ropewalk.unpatch(front_end)
    found = {status["front_end"]: status for status in ropewalk.patches.statuses()}
    assert (found[front_end]["version"], found[front_end]["applied"]) == (None, False)
