"""AutoGPTQ with our layers, in the environment that `make test-autogptq` makes; elsewhere this is skipped."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ropewalk
from ropewalk.bench.perplexity import perplexity
from ropewalk.errors import MissingPackageError, PatchError, UsageError
from ropewalk.gptq.format import dequantize, zeros_v1_to_v2
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.rotary import RopewalkRotaryEmbedding
from ropewalk.rope.frequencies import inverse_frequencies
from ropewalk.shipped import held_out_text

pytest.importorskip("auto_gptq", reason="`make test-autogptq` makes an environment with it", exc_type=ImportError)

import auto_gptq
from auto_gptq import AutoGPTQForCausalLM
from auto_gptq.modeling import _base, _utils
from auto_gptq.utils import import_utils, peft_utils

IDS = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def patched():
    ropewalk.patch("auto_gptq")
    yield
    ropewalk.unpatch("auto_gptq")


def load(folder, **options):
    return AutoGPTQForCausalLM.from_quantized(str(folder), device="cpu", **options)


def layers_of(loaded):
    return {name: m for name, m in loaded.model.named_modules() if hasattr(m, "qweight")}


def modules_of(loaded):
    return {type(module).__module__ for module in layers_of(loaded).values()}


def logits_of(model, ids=IDS):
    """Return logits in float32, where a wrong bit cannot hide behind rounding."""
    model = model.float()
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def float64_logits(folder, weights, inv_freq=None):
    """Return what the dequantized weights compute in transformers' own model, in float64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    if inv_freq is not None:
        model.model.rotary_emb.inv_freq = inv_freq
    with torch.inference_mode():
        return model.double().eval()(IDS, use_cache=False).logits


CASES = {
    "4 bits, act-order": {"arch": "codellama"},
    "3 bits, act-order": {"arch": "codellama", "bits": 3},
    "2 bits": {"arch": "codellama", "bits": 2, "desc_act": False},
    "8 bits, no groups": {"arch": "codellama", "bits": 8, "group_size": -1},
    "4 bits, asymmetric": {"arch": "codellama", "sym": False},
    "linear rope": {"arch": "orca"},
    "biases": {"arch": "qwen2"},
    "mistral": {"arch": "mistral"},
    "experts": {"arch": "mixtral"},
}


@pytest.mark.parametrize("case", CASES)
def test_computes_what_their_own_layers_compute(case, make_checkpoint, tmp_path):
    """Within twice their own error of float64."""
    weights = make_checkpoint(tmp_path, **CASES[case])
    expected = float64_logits(tmp_path, weights)
    theirs = load(tmp_path)
    assert all(module.startswith("auto_gptq.") for module in modules_of(theirs))
    error = (logits_of(theirs.model) - expected).abs().max().item()
    ropewalk.patch("auto_gptq")
    ours = load(tmp_path)
    ropewalk.unpatch("auto_gptq")
    assert modules_of(ours) == {"ropewalk.loader.quant_linear"}
    assert (logits_of(ours.model) - expected).abs().max().item() <= 2 * error + 1e-6


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"torch_dtype": torch.float32}], ids=str)
def test_the_rope_is_what_the_config_means(options, make_checkpoint, tmp_path, caplog):
    """The config of airophin does not name its partial NTK, and transformers gives it none."""
    weights = make_checkpoint(tmp_path, arch="airophin")
    inv_freq, _ = inverse_frequencies(
        "partial-ntk", dim=32, base=10000.0, factor=4.0, original_max_position_embeddings=32
    )
    expected = float64_logits(tmp_path, weights, inv_freq)
    theirs = load(tmp_path)
    assert (logits_of(theirs.model) - expected).abs().max() > 0.1
    ropewalk.patch("auto_gptq")
    with caplog.at_level(logging.INFO, "ropewalk"):
        ours = load(tmp_path, **options)
    ropewalk.unpatch("auto_gptq")
    assert re.search("rope: partial-ntk .*airophin-13b-pntk-16k", caplog.text)
    assert isinstance(ours.model.model.rotary_emb, RopewalkRotaryEmbedding)
    assert (logits_of(ours.model) - expected).abs().max() < 1e-4


def test_context_beyond_the_original_is_of_use(shipped):
    """With their rope perplexity rises by half from 256 to 1024 tokens; with the one that was meant it falls."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(shipped)(held_out_text(), verbose=False)["input_ids"]
    found = {}
    for who in ("theirs", "ours"):
        if who == "ours":
            ropewalk.patch("auto_gptq")
        model = load(shipped).model.float()
        ropewalk.unpatch("auto_gptq")
        found[who] = [perplexity(model, torch.tensor(tokens[:2048]), context) for context in (256, 1024)]
    assert found["theirs"][1] > 1.4 * found["theirs"][0]
    assert found["ours"][1] < found["ours"][0]


def test_zero_points_of_v2(patched, make_checkpoint, tmp_path):
    """AutoGPTQ knows v1 alone, and reads each zero point of a v2 file one too high."""
    settings = {"arch": "codellama", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}
    weights = make_checkpoint(tmp_path, **settings)
    expected = float64_logits(tmp_path, weights)
    loaded = load(tmp_path)
    assert (logits_of(loaded.model) - expected).abs().max() < 1e-4
    loaded.save_quantized(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert (logits_of(again.model) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ["airophin", "qwen2"])
def test_saved_again_bit_for_bit(arch, patched, make_checkpoint, tmp_path):
    make_checkpoint(tmp_path, arch=arch)
    loaded = load(tmp_path)
    with torch.inference_mode():
        before = loaded.model(IDS).logits
    loaded.save_quantized(str(tmp_path / "saved"))
    packed = load_file(tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert packed.keys() <= saved.keys()
    assert all(torch.equal(saved[k], t) and saved[k].dtype == t.dtype for k, t in packed.items())
    # AutoGPTQ gives every layer a bias.
    assert all(k.endswith(".bias") and not saved[k].any() for k in saved.keys() - packed.keys())
    again = load(tmp_path / "saved")
    assert again.model.config.rope_parameters == loaded.model.config.rope_parameters
    with torch.inference_mode():
        assert torch.equal(again.model(IDS).logits, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_packs_what_it_quantizes_as_theirs_do(bits, desc_act):
    """`quantize` moves layers to a GPU, and then calls this."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=bits == 4)
    order = torch.randperm(128) if desc_act else None
    found = quantize_rtn(linear.weight.detach(), bits=bits, group_size=32, sym=True, order=order)
    zeros_v2 = zeros_v1_to_v2(found["qzeros"], bits)
    on_grid = dequantize(found["qweight"], found["scales"], zeros_v2, found["g_idx"], bits=bits, group_size=32)
    weight = on_grid.t().half()
    packed = {}
    for who in ("theirs", "ours"):
        model = nn.ModuleDict({"layer": nn.Linear(128, 96, bias=bits == 4)}).half()
        model.load_state_dict({f"layer.{name}": tensor for name, tensor in linear.state_dict().items()})
        model.layer.weight.data = weight
        scales = found["scales"].float().t().contiguous()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if who == "ours":
            ropewalk.patch("auto_gptq")
        _utils.pack_model(model, {"layer": (None, scales, zeros, found["g_idx"])}, bits, 32, desc_act=desc_act)
        ropewalk.unpatch("auto_gptq")
        packed[who] = model.state_dict()
        assert type(model.layer).__module__.startswith("auto_gptq." if who == "theirs" else "ropewalk.")
    assert packed["theirs"].keys() == packed["ours"].keys()
    for name, tensor in packed["theirs"].items():
        assert torch.equal(packed["ours"][name], tensor) and packed["ours"][name].dtype == tensor.dtype, name


def test_options_that_name_kernels(patched, make_checkpoint, tmp_path, caplog):
    make_checkpoint(tmp_path, arch="codellama")
    plain = logits_of(load(tmp_path).model)
    for options in (
        {"use_triton": True},
        {"disable_exllama": False},
        {"disable_exllamav2": True},
        {"use_cuda_fp16": False},
        {"trainable": True},
        {"device_map": "auto"},
    ):
        loaded = load(tmp_path, **options)
        assert modules_of(loaded) == {"ropewalk.loader.quant_linear"}
        assert torch.equal(logits_of(loaded.model), plain)
    caplog.clear()
    loaded = load(tmp_path, inject_fused_attention=True, inject_fused_mlp=True)
    assert torch.equal(logits_of(loaded.model), plain)
    assert "inject_fused_attention is left out with ropewalk's layers: q, k and v stay" in caplog.text
    assert "inject_fused_mlp is left out" in caplog.text
    choose = import_utils.dynamically_import_QuantLinear
    theirs = choose(False, True, 32, 4, disable_marlin=False)
    assert theirs.__module__ == "auto_gptq.nn_modules.qlinear.qlinear_marlin"


def test_generates_in_its_own_way(patched, make_checkpoint, tmp_path):
    """AutoGPTQ generates under autocast, in bfloat16 on a CPU, where torch has no such thing for float16."""
    make_checkpoint(tmp_path, arch="codellama")
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load(tmp_path, torch_dtype=dtype)
        assert loaded.generate(input_ids=IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (1, 68)
    loaded.to("cpu")
    loaded.model.half()
    assert loaded.model(IDS).logits.dtype == torch.float16


def test_lora_through_get_gptq_peft_model(patched, make_checkpoint, tmp_path):
    from peft import LoraConfig

    make_checkpoint(tmp_path, arch="codellama")
    loaded = load(tmp_path, torch_dtype=torch.float32)
    plain = logits_of(loaded.model)
    with pytest.raises(UsageError, match="expected model_id, the adapter to load"):
        auto_gptq.get_gptq_peft_model(loaded)
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    trained = auto_gptq.get_gptq_peft_model(loaded, config, train_mode=True)
    on = {name.rpartition(".")[2] for name, m in trained.named_modules() if hasattr(m, "lora_A")}
    assert on == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = trained(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained.eval()
    after = logits_of(trained)
    trained.save_pretrained(tmp_path / "adapter")
    base = load(tmp_path, torch_dtype=torch.float32)
    again = auto_gptq.get_gptq_peft_model(base, model_id=str(tmp_path / "adapter"))
    assert torch.allclose(logits_of(again), after, atol=1e-5)
    with again.disable_adapter():
        assert torch.equal(logits_of(again), plain)


def what_is_there():
    choose = [module.dynamically_import_QuantLinear for module in (import_utils, _base, _utils)]
    peft = [module.get_gptq_peft_model for module in (auto_gptq, peft_utils)]
    return [*choose, *peft, _base.BaseGPTQForCausalLM.__dict__["from_quantized"]]


def test_revert_restores_all_of_it(make_checkpoint, tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    make_checkpoint(tmp_path, arch="airophin")
    before = what_is_there()
    ropewalk.patch("auto_gptq")
    during = what_is_there()
    ropewalk.patch("auto_gptq")
    assert all(a is b for a, b in zip(during, what_is_there(), strict=True))
    assert not any(a is b for a, b in zip(before, during, strict=True))
    ours = load(tmp_path)
    ropewalk.unpatch("auto_gptq")
    assert all(a is b for a, b in zip(before, what_is_there(), strict=True))
    theirs = load(tmp_path)
    assert modules_of(theirs) == {"auto_gptq.nn_modules.qlinear.qlinear_cuda"}
    assert type(theirs.model.model.rotary_emb) is LlamaRotaryEmbedding
    assert modules_of(ours) == {"ropewalk.loader.quant_linear"}
    assert logits_of(ours.model).isfinite().all()


@pytest.mark.parametrize(
    ("owner", "name"), [(import_utils, "dynamically_import_QuantLinear"), (peft_utils, "get_gptq_peft_model")]
)
def test_an_autogptq_that_is_not_known(owner, name, monkeypatch):
    """One that has another of these functions, or none."""
    monkeypatch.setattr(owner, name, lambda bits: None)
    before = what_is_there()
    with pytest.raises(PatchError, match=rf"auto_gptq 0\.7\.1: expected {name}\(.*, found bits; nothing was replaced"):
        ropewalk.patch("auto_gptq")
    assert all(a is b for a, b in zip(before, what_is_there(), strict=True))
    status = next(s for s in ropewalk.patches.statuses() if s["front_end"] == "auto_gptq")
    assert status == {
        "front_end": "auto_gptq",
        "package": "auto_gptq",
        "version": "0.7.1",
        "tested": "0.7.1, with transformers 4.57.6",
        "applied": False,
    }


def test_what_needs_transformers_5_says_so(shipped):
    from transformers import PreTrainedModel

    before = PreTrainedModel.__init__, PreTrainedModel.from_pretrained.__func__
    for wanted in (ropewalk.patch, lambda: ropewalk.load(shipped)):
        with pytest.raises(MissingPackageError, match=r"expected transformers 5\.6 or newer, found 4\.57\.6"):
            wanted()
    assert before == (PreTrainedModel.__init__, PreTrainedModel.from_pretrained.__func__)


def test_the_recipe_of_the_readme():
    section = README.read_text().partition("### AutoGPTQ\n")[2].partition("\n### ")[0]
    code = re.search("```python\n(.*?)```", section, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("In the beginning")
    assert len(done.stdout) > 100 and len(set(done.stdout.split())) > 10
