"""Every architecture and packing that this project is about, each as a small random model of the real one's
proportions: logits, tokens and saved tensors are those of the same weights dequantized in plain transformers.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.errors import CheckpointError, RopewalkError
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.experts import PackedExperts
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.quantize import _merged

# Heads, grouped heads and the width of the MLP in the real one's ratios, as near as whole groups and words let them.
LLAMA_13B = {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 864}
LLAMA_13B_128 = {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 1024}
CODELLAMA_34B = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 640}
MPT_30B = {"d_model": 384, "n_heads": 4}  # heads of 96 numbers; the real ones have 112
MIXTRAL = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 896}
QWEN2_7B = {"hidden_size": 224, "num_attention_heads": 7, "num_key_value_heads": 1, "intermediate_size": 1184}
QWEN2_MOE = {"num_attention_heads": 4, "num_key_value_heads": 4}

PARTIAL = {"rope_type": "partial-ntk", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

# name: (one of conftest's CONFIGS, sizes, bits, group size, act-order, packed layers)
TABLE: dict[str, tuple[str, dict[str, Any], int, int, bool, int]] = {
    "airophin-13b-pntk-16k": ("airophin", LLAMA_13B, 4, 32, True, 14),
    "airoboros-c34b-4bit": ("codellama", CODELLAMA_34B, 4, -1, True, 14),
    "airoboros-c34b-4bit-32g": ("codellama", CODELLAMA_34B, 4, 32, True, 14),
    "airoboros-c34b-4bit-64g": ("codellama", CODELLAMA_34B, 4, 64, True, 14),
    "airoboros-c34b-4bit-128g": ("codellama", CODELLAMA_34B, 4, 128, True, 14),
    "airoboros-c34b-3bit": ("codellama", CODELLAMA_34B, 3, -1, True, 14),
    "airoboros-c34b-3bit-128g": ("codellama", CODELLAMA_34B, 3, 128, True, 14),
    "llama2-13b-orca-8k": ("orca", LLAMA_13B_128, 4, 128, False, 14),
    "airoboros-mpt-30b-4bit": ("mpt", MPT_30B, 4, -1, True, 8),
    "airoboros-mpt-30b-4bit-128g": ("mpt", MPT_30B, 4, 128, True, 8),
    "bagel-8x7b-4bit": ("mixtral", MIXTRAL, 4, -1, True, 56),
    "bagel-8x7b-4bit-32g": ("mixtral", MIXTRAL, 4, 32, True, 56),
    "bagel-8x7b-4bit-128g": ("mixtral", MIXTRAL, 4, 128, True, 56),
    "mistral-7b": ("mistral", MIXTRAL, 4, 128, True, 14),
    "qwen2-7b": ("qwen2", QWEN2_7B, 4, 32, True, 14),
    "qwen1.5-moe": ("qwen2_moe", QWEN2_MOE, 4, 32, True, 50),
}
MIXTURES = ("mixtral", "qwen2_moe")


@dataclass
class Case:
    """A packed folder, and the plain float32 model of the same weights.

    Attributes:
        arch: one of conftest's CONFIGS.
        packed: how many of its layers are packed.
        load: `ropewalk.load` of the folder in a dtype, once for each.
    """

    arch: str
    packed: int
    folder: Path
    reference: Any
    load: Callable[[str], Any]


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory, make_checkpoint, reference_model):
    arch, sizes, bits, group_size, desc_act, packed = TABLE[request.param]
    folder = tmp_path_factory.mktemp("case")
    weights = make_checkpoint(folder, arch, bits=bits, group_size=group_size, desc_act=desc_act, sizes=sizes)
    reference = reference_model(folder, weights, PARTIAL if arch == "airophin" else None)
    loaded: dict[str, Any] = {}

    def load(dtype):
        if dtype not in loaded:
            loaded[dtype], _ = ropewalk.load(folder, dtype=dtype, device_map="cpu")
        return loaded[dtype]

    return Case(arch, packed, folder, reference, load)


def logits(model, ids):
    with torch.inference_mode():
        found = model(ids).logits
    assert found.dtype == model.dtype
    return found.double()


def logits_and_experts(model, ids):
    """Return the logits, and which experts each token [B, T] got in all layers, in the order of their numbers."""
    chosen, hooks = [], []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            hook = module.register_forward_hook(lambda _, __, found: chosen.append(found[2].sort().values))
            hooks.append(hook)
    found = logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found, torch.cat(chosen, -1).view(*ids.shape, -1) if chosen else torch.zeros(*ids.shape, 1)


def in_float64(reference):
    model = deepcopy(reference).double()
    if model.config.model_type in MIXTURES:
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model


def within_torchs_own_error(model, reference, floor=1e-5):
    """Check the logits of a model against those of a plain float32 model of the same weights."""
    ids = torch.randint(3, 96, (2, 100), generator=torch.Generator().manual_seed(0))
    exact, experts = logits_and_experts(in_float64(reference), ids)
    torchs, torchs_experts = logits_and_experts(deepcopy(reference).to(model.dtype), ids)
    found, found_experts = logits_and_experts(model, ids)
    # Where rounding gives a token another expert, no bound holds from there on; before it, nothing has changed.
    same = ((experts == torchs_experts) & (experts == found_experts)).all(-1).cummin(1).values
    assert same.sum() > (20 if model.dtype == torch.float16 else 190)
    assert exact.std() > 0.1  # they do depend on the input
    off, torchs_off = ((each - exact).abs()[same].max().item() for each in (found, torchs))
    assert off <= 2 * torchs_off + floor, f"{off:.2e} off; torch is {torchs_off:.2e} off"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits(case, dtype):
    model = case.load(dtype)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == case.packed
    within_torchs_own_error(model, case.reference)


def test_greedy_tokens(case):
    model = case.load("float32")
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = case.reference.generate(ids, **arguments)
    for cache in ("dynamic", "static"):
        # MPT's config of 2023 says to use none.
        found = model.generate(ids, use_cache=True, cache_implementation=cache, **arguments)
        assert torch.equal(found, expected), cache
    # A batch of two lengths, padded on the left.
    arguments["attention_mask"] = torch.ones_like(ids)
    arguments["attention_mask"][1, :7] = 0
    ids = ids * arguments["attention_mask"]
    found = model.generate(ids, **arguments)
    assert torch.equal(found, case.reference.generate(ids, **arguments))
    assert torch.equal(found[0], expected[0])


def test_saving_gives_the_checkpoint_back(case, tmp_path):
    model = case.load("float16")
    model.save_pretrained(tmp_path)
    before, after = load_file(case.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    again, _ = ropewalk.load(tmp_path, dtype="float16", device_map="cpu")
    ids = torch.arange(3, 60)[None]
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_mixtral_under_the_names_of_gptqmodel(tmp_path, make_checkpoint):
    """GPTQModel writes what transformers 5 calls the layers; it is the same model."""
    make_checkpoint(tmp_path / "hub", "mixtral")
    make_checkpoint(tmp_path / "gptqmodel", "mixtral")
    renamed = {}
    for name, tensor in load_file(tmp_path / "hub" / "model.safetensors").items():
        for old, new in (("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w2.", ".down_proj.")):
            name = name.replace(old, new)
        renamed[name.replace(".w3.", ".up_proj.")] = tensor
    save_file(renamed, tmp_path / "gptqmodel" / "model.safetensors")
    hub, ours = (ropewalk.load(tmp_path / name, device_map="cpu")[0] for name in ("hub", "gptqmodel"))
    ids = torch.arange(3, 60)[None]
    assert torch.equal(logits(hub, ids), logits(ours, ids))
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(ropewalk.load(tmp_path / "saved", device_map="cpu")[0], ids), logits(ours, ids))


def test_experts_that_were_packed_in_two_ways(tmp_path, make_checkpoint, reference_model):
    """GPTQModel gives an expert that hardly any calibration token reaches no act-order, beside others that have one."""
    weights = make_checkpoint(tmp_path, "mixtral", sym=False, desc_act=True)
    others = make_checkpoint(tmp_path / "other", "mixtral", sym=True, desc_act=False)
    tensors, other = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "other" / "model.safetensors")
    taken = (".experts.0.", ".experts.5.")
    save_file(
        {n: other[n] if any(t in n for t in taken) else tensors[n] for n in tensors}, tmp_path / "model.safetensors"
    )
    weights |= {n: tensor for n, tensor in others.items() if any(t in n for t in taken)}
    model, _ = ropewalk.load(tmp_path, device_map="cpu", dtype="float32")
    within_torchs_own_error(model, reference_model(tmp_path, weights))


def test_experts_of_which_some_have_a_bias(tmp_path, make_checkpoint):
    """As GPTQ-for-LLaMa gave layers one that is all zeros; one that is not must count."""
    make_checkpoint(tmp_path, "mixtral")
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        before = ropewalk.load(tmp_path)[0](ids).logits
    tensors = load_file(tmp_path / "model.safetensors")
    some = [f"model.layers.{i}.block_sparse_moe.experts.{j}.w{k}" for i, j, k in ((0, 2, 1), (1, 5, 2), (1, 7, 3))]
    for name in some:
        tensors[f"{name}.bias"] = torch.zeros(tensors[f"{name}.qweight"].shape[1]).half()
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(ropewalk.load(tmp_path)[0](ids).logits, before)
    for name in some:
        tensors[f"{name}.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    model, _ = ropewalk.load(tmp_path)
    for layer in model.modules():
        if isinstance(layer, PackedExperts):
            assert layer._stacks is not None
    with torch.inference_mode():
        found = model(ids).logits
        assert (found - before).abs().max() > 1e-2
        for layer in model.modules():
            if isinstance(layer, PackedExperts):
                layer._stacks, layer._stackable = None, False  # one by one, then
        assert (found - model(ids).logits).abs().max() < 1e-4


def test_experts_of_a_layer_that_are_not_packed(tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    first = "model.layers.0.block_sparse_moe.experts."
    for name in [name for name in weights if name.startswith(first)]:
        weights[name] = weights[name].half().float()
        tensors[name] = weights[name].half()
    tensors = {name: t for name, t in tensors.items() if not name.startswith(first) or name.endswith(".weight")}
    save_file(tensors, tmp_path / "model.safetensors")
    model, _ = ropewalk.load(tmp_path, device_map="cpu", dtype="float32")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 56 - 24
    within_torchs_own_error(model, reference_model(tmp_path, weights))
    model, _ = ropewalk.load(tmp_path, device_map="cpu", dtype="float16")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("original", [True, False], ids=["original names", "names of transformers 5"])
@pytest.mark.parametrize(("arch", "packed"), [("mpt", 8), ("mixtral", 56), ("qwen2_moe", 50)])
def test_what_transformers_saves_is_packed(tmp_path, make_float_model, arch, packed, original):
    """Rounding to nearest packs the same layers, and gives them the Hub's names, in whichever form they come."""
    _, model, published = make_float_model(arch)
    model.save_pretrained(tmp_path / "float", save_original_format=original)
    if original:
        assert load_file(tmp_path / "float" / "model.safetensors").keys() == published.keys()
    ropewalk.quantize(tmp_path / "float", tmp_path / "packed", bits=8, group_size=32, method="rtn")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    layers = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert len(layers) == packed
    weights = {name for name in tensors if name.rpartition(".")[0] not in layers}
    assert weights | {f"{layer}.weight" for layer in layers} == {n for n in published if not n.endswith("_proj.bias")}
    assert not any("gate." in f"{layer}." for layer in layers)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in published.items() if name in tensors)
    assert all(name in tensors for name in published if name.endswith(".bias"))
    loaded, _ = ropewalk.load(tmp_path / "packed", device_map="cpu")
    ids = torch.randint(3, 96, (2, 50), generator=torch.Generator().manual_seed(0))
    difference = logits(loaded, ids) - logits(model.float(), ids)
    assert difference.abs().median() < 0.02  # of 8 bits; the median, since a few tokens get other experts


def test_layers_that_the_source_does_not_have(tmp_path, make_checkpoint, make_float_model):
    """What GPTQModel calls otherwise than we know would end in the folder twice, packed and not."""
    _, model, _ = make_float_model("mixtral")
    model.save_pretrained(tmp_path / "float")
    make_checkpoint(tmp_path / "packed", "mpt")
    expected = r"found transformer\.blocks\.0\.attn\.Wqkv, of which the source has no weight"
    with pytest.raises(RopewalkError, match=expected):
        list(_merged(open_checkpoint(tmp_path / "float"), open_checkpoint(tmp_path / "packed")))


def test_stacked_experts_of_an_unknown_family(tmp_path, make_plain):
    (tmp_path / "float").mkdir()
    make_plain(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 64, 32)}, file)
    expected = r"experts one by one, or those of mixtral.*found model\.layers\.0\.mlp\.experts\.gate_up_proj of llama"
    with pytest.raises(CheckpointError, match=expected):
        ropewalk.quantize(tmp_path / "float", tmp_path / "out", method="rtn", group_size=32)
    assert not (tmp_path / "out").exists()


def test_the_mpt_config_of_2023_stays_as_it_was(tmp_path, make_float_model):
    """Its `auto_map` names Python that is not run here; other programs may want it."""
    config, _, weights = make_float_model("mpt")
    folder = tmp_path / "float"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    ropewalk.quantize(folder, tmp_path / "packed", method="rtn", group_size=32)
    written = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert {k: v for k, v in written.items() if k != "quantization_config"} == config
