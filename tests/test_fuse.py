"""Fused models: what is taken together computes what its steps compute, and nothing of it shows from outside."""

import copy
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

import ropewalk
from ropewalk import cpu
from ropewalk.errors import UsageError
from ropewalk.loader import fuse as fusing
from ropewalk.loader.fused import FusedAttention, FusedLayer, FusedMLP, FusedMptMLP
from ropewalk.loader.quant_linear import QuantLinear

FAMILIES = ("airophin", "codellama", "mistral", "mixtral", "qwen2")
IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no kernels for the CPU")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory, make_checkpoint):
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, request.param, sym=False, shared_order=True)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory, make_checkpoint):
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint(path, "codellama", sym=False, shared_order=True)
    return path


@pytest.fixture(params=["cpu", "gpu"])
def layout(request, monkeypatch):
    """Have layers take an execution layout: that of a GPU here as well, as they do there."""
    if request.param == "gpu":
        monkeypatch.setattr(QuantLinear, "_has_gpu_kernels", lambda self: True)
    return request.param


def load(folder, fuse="auto", **options):
    return ropewalk.load(folder, device_map="cpu", dtype="float32", cpu_mode="exact", fuse=fuse, **options)[0]


def logits(model, ids=IDS, **options):
    with torch.inference_mode():
        return model(ids, **options).logits


def fused_parts(model, kind):
    return [f for m in model.modules() if isinstance(f := vars(m).get("forward"), kind)]


def first_layer(model) -> Any:
    return model.get_decoder().layers[0]


@pytest.mark.parametrize("fuse", ["qkv", "gate-up", "norm", "attention", "auto"])
def test_same_logits_and_tokens(folder, fuse):
    plain, fused = load(folder, "none"), load(folder, fuse)
    assert not fused_parts(plain, (FusedAttention, FusedMLP, FusedLayer))
    layers = plain.config.num_hidden_layers
    has_mlp = hasattr(first_layer(plain).mlp, "gate_proj")
    assert len(fused_parts(fused, FusedAttention)) == layers * (fuse in ("qkv", "attention", "auto"))
    assert len(fused_parts(fused, FusedMLP)) == layers * has_mlp * (fuse in ("gate-up", "auto"))
    assert len(fused_parts(fused, FusedLayer)) == layers * (fuse in ("norm", "auto"))
    for part in fused_parts(fused, (FusedAttention, FusedMLP)):
        merged = part.projections.merged
        assert (merged is None) == (fuse == "attention")
        assert merged is None or merged.layout == "cpu"
    expected = logits(plain)
    assert (logits(fused) - expected).abs().max() < 2e-5
    tokens = plain.generate(IDS, **GREEDY)
    for cache in ("dynamic", "static"):
        assert torch.equal(fused.generate(IDS, cache_implementation=cache, **GREEDY), tokens), cache


def test_on_the_layout_of_a_gpu_act_order_is_folded_away(folder, layout):
    plain, fused = load(folder, "none"), load(folder)
    for part in fused_parts(fused, (FusedAttention, FusedMLP)):
        merged = part.projections.merged
        assert merged.layout == layout
        assert (merged.order is not None) == (layout == "gpu")
        assert (merged.folded is not None) == (layout == "gpu" and isinstance(part, FusedMLP))
    assert (logits(fused) - logits(plain)).abs().max() < 2e-5
    without = load(folder, "qkv,gate-up,norm")
    assert all(part.projections.merged.folded is None for part in fused_parts(without, FusedMLP))
    assert (logits(without) - logits(plain)).abs().max() < 2e-5


def test_mpt(tmp_path, make_checkpoint, layout):
    """Of MPT the second layer's act-order is folded, where a layout gains by it."""
    make_checkpoint(tmp_path, "mpt", sym=False)
    plain, fused = load(tmp_path, "none"), load(tmp_path)
    parts = fused_parts(fused, FusedMptMLP)
    assert len(parts) == (fused.config.n_layers if layout == "gpu" else 0)
    assert all(part.projections.merged.folded is not None for part in parts)
    assert (logits(fused) - logits(plain)).abs().max() < 2e-5
    seen = []
    fused.transformer.blocks[0].ffn.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain.transformer.blocks[0].ffn.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert (logits(fused) - logits(plain)).abs().max() < 2e-5
    assert (seen[0] - seen[1]).abs().max() < 2e-5
    fused.save_pretrained(tmp_path / "saved")
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "sym", "desc_act"), [(32, True, True), (-1, False, True), (64, True, False)])
def test_every_packing(tmp_path, make_checkpoint, layout, bits, group_size, sym, desc_act):
    make_checkpoint(
        tmp_path, "codellama", bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, shared_order=True
    )
    fused = load(tmp_path)
    assert all(part.projections.merged.layout == layout for part in fused_parts(fused, (FusedAttention, FusedMLP)))
    assert (logits(fused) - logits(load(tmp_path, "none"))).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits(llama, dtype):
    """What lies between the steps is rounded less often, so that only the size of a rounding is asked for."""
    options = {"device_map": "cpu", "dtype": dtype, "cpu_mode": "exact"}
    plain, fused = (ropewalk.load(llama, fuse=fuse, **options)[0] for fuse in ("none", "auto"))
    exact = logits(load(llama, "none"))
    off, plainly_off = ((logits(model).float() - exact).abs().max() for model in (fused, plain))
    assert off <= 2 * plainly_off


def test_layers_of_different_orders_are_not_merged(tmp_path, make_checkpoint, layout):
    make_checkpoint(tmp_path, "codellama")
    fused = load(tmp_path)
    for part in fused_parts(fused, (FusedAttention, FusedMLP)):
        assert part.projections.merged.layout is None
    assert (logits(fused) - logits(load(tmp_path, "none"))).abs().max() < 2e-5


def test_nothing_is_held_twice(llama):
    fused = load(llama)
    layer = first_layer(fused)
    merged = vars(layer.mlp)["forward"].projections.merged
    for name in ("words", "scales"):
        whole = getattr(merged, name)
        own = layer.mlp.gate_proj.qweight if name == "words" else layer.mlp.gate_proj.scales
        assert whole.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in fused.buffers()}
    plain = load(llama, "none")
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain.buffers()}
    assert sum(storages.values()) <= 1.01 * sum(others.values())


def test_layers_of_the_cache_are_mapped_as_one(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    first = load(tmp_path / "model", cache_packed=True)
    again = load(tmp_path / "model", cache_packed=True)
    assert torch.equal(logits(again), logits(first))
    assert (logits(again) - logits(load(llama, "none"))).abs().max() < 2e-5
    storages = {m.qweight.untyped_storage().data_ptr() for m in again.modules() if isinstance(m, QuantLinear)}
    assert len(storages) == 1
    for part in fused_parts(again, (FusedAttention, FusedMLP)):
        assert part.projections.merged.words.untyped_storage().data_ptr() in storages


def test_saving_and_names_stay(folder, layout, tmp_path):
    fused, plain = load(folder), load(folder, "none")
    logits(fused)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (logits(fused) - logits(plain)).abs().max() < 2e-5  # and still computes


@pytest.mark.parametrize("change", ["half and back", "state dict", "deepcopy"])
def test_what_is_changed_afterwards_counts(llama, tmp_path, make_checkpoint, layout, change):
    fused, plain = load(llama), load(llama, "none")
    if change == "half and back":
        fused.get_decoder().layers.half().float()
    elif change == "deepcopy":
        fused = copy.deepcopy(fused)
        assert vars(first_layer(fused).mlp)["forward"].module is first_layer(fused).mlp
    else:
        make_checkpoint(tmp_path, "codellama", sym=False, shared_order=True, seed=5)
        other = load(tmp_path, "none")
        fused.load_state_dict(other.state_dict())
        plain = other
    assert (logits(fused) - logits(plain)).abs().max() < (2e-3 if change == "half and back" else 2e-5)
    assert vars(first_layer(fused).mlp)["forward"].projections.merged.layout == layout


def test_a_layer_called_by_itself(llama, layout):
    fused, plain = load(llama), load(llama, "none")
    x = torch.randn(1, 3, plain.config.hidden_size)
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        ours, theirs = (first_layer(model).get_submodule(name)(x) for model in (fused, plain))
        assert (ours - theirs).abs().max() < 1e-5
    assert (logits(fused) - logits(plain)).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["self_attn", "self_attn.q_proj", "mlp", "mlp.down_proj", "input_layernorm"])
def test_a_hook_sees_what_it_would_see(llama, layout, name):
    seen = {}
    for fuse in ("none", "auto"):
        model = load(llama, fuse)
        module = first_layer(model).get_submodule(name)
        seen[fuse] = []
        module.register_forward_hook(
            lambda _, args, kwargs, out, to=seen[fuse]: to.append(
                (*args, kwargs.get("hidden_states"), out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
        logits(model)
    assert len(seen["none"]) == len(seen["auto"]) == 1
    for plain, fused in zip(seen["none"][0], seen["auto"][0], strict=True):
        assert (plain is None) == (fused is None)
        assert plain is None or (plain - fused).abs().max() < 2e-5


def test_hidden_states_and_attentions(llama):
    plain, fused = (load(llama, fuse, attn_implementation="eager") for fuse in ("none", "auto"))
    with torch.inference_mode():
        found, expected = (m(IDS, output_hidden_states=True, output_attentions=True) for m in (fused, plain))
    for name in ("hidden_states", "attentions"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert len(ours) == len(theirs) > 0
        assert all((a - b).abs().max() < 2e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("targets", [["q_proj"], ["up_proj"], ["down_proj"], ["o_proj", "v_proj", "gate_proj"]])
def test_an_adapter(llama, layout, targets):
    """On a layer that was merged, on the one that reads in a folded order, and taken off again."""
    peft = pytest.importorskip("peft")
    found = []
    for fuse in ("none", "auto"):
        model = load(llama, fuse)
        before = logits(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.eval()
        with_adapter = logits(adapted)
        adapted.train()
        adapted(IDS, labels=IDS).loss.backward()
        grads = [p.grad for n, p in adapted.named_parameters() if "lora_A" in n]
        adapted.eval()
        after = logits(adapted.unload())
        assert (after - before).abs().max() < 2e-5
        found.append((with_adapter, *grads))
    plain, fused = found
    assert (plain[0] - before).abs().max() > 1e-3
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours - theirs).abs().max() < 2e-5 * max(1, float(theirs.abs().max()))


def test_unfuse(llama, layout):
    fused = load(llama)
    fusing.unfuse(fused)
    assert not fused_parts(fused, (FusedAttention, FusedMLP, FusedLayer))
    assert torch.equal(logits(fused), logits(load(llama, "none")))


def test_a_family_that_has_changed_is_left_alone(llama, monkeypatch, caplog):
    caplog.set_level("INFO", "ropewalk")
    monkeypatch.setattr(fusing, "_checked", {})
    original = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 1.5 * original(self, x))
    model = load(llama)
    assert not fused_parts(model, (FusedAttention, FusedMLP, FusedLayer))
    assert "LlamaDecoderLayer of this transformers is not known here" in caplog.text


def test_what_is_fused_can_be_chosen(llama, monkeypatch):
    assert fusing.parse_fusions("auto") == frozenset(fusing.FUSIONS)
    assert fusing.parse_fusions("qkv, norm") == {"qkv", "norm"}
    with pytest.raises(UsageError, match=r"expected auto, none or some of qkv.*found 'swiglu'"):
        load(llama, "qkv,swiglu")
    monkeypatch.setenv("ROPEWALK_FUSE", "norm")
    assert not fused_parts(load(llama), (FusedAttention, FusedMLP))
    assert fused_parts(load(llama), FusedLayer)
    monkeypatch.setenv("ROPEWALK_FUSE", "auto")
    assert fused_parts(load(llama), FusedMLP)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_padded_on_the_left(llama, batch):
    ids = torch.randint(3, 96, (batch, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row % 9] = 0
    plain, fused = load(llama, "none"), load(llama)
    for cache in ("dynamic", "static"):
        found, expected = (
            model.generate(ids * mask, attention_mask=mask, cache_implementation=cache, **GREEDY)
            for model in (fused, plain)
        )
        assert torch.equal(found, expected), cache


def test_prompt_lookup_assistants_and_beams(llama):
    plain, fused = load(llama, "none"), load(llama)
    ids = torch.cat([IDS[:1, :12]] * 3, dim=1)
    for options in ({"prompt_lookup_num_tokens": 4}, {"num_beams": 3}, {"assistant_model": load(llama)}):
        expected = plain.generate(ids, **GREEDY, **{k: v for k, v in options.items() if k == "num_beams"})
        assert torch.equal(fused.generate(ids, **GREEDY, **options), expected), options


@pytest.mark.parametrize("cache", ["none", "static"])
def test_compiles_without_a_break(llama, layout, cache):
    fused = load(llama)
    options: dict[str, Any] = {"use_cache": False}
    if cache == "static":
        options = {"past_key_values": StaticCache(fused.config, 64), "use_cache": True}
        logits(fused, IDS, **options)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    ids = IDS[:, :1] if cache == "static" else IDS
    expected = copy.deepcopy(options)
    assert (logits(compiled, ids, **options) - logits(fused, ids, **expected)).abs().max() < 2e-5


def test_on_a_gpu_a_static_cache_is_written_with_the_rotation(llama, monkeypatch):
    """As it is there; here with the same operator on the CPU."""
    monkeypatch.setattr("ropewalk.loader.fused._has_one_launch", lambda x: True)
    monkeypatch.setattr("ropewalk.loader.fused.FEW", 0)
    plain, fused = load(llama, "none"), load(llama)
    caches = {model: StaticCache(model.config, 64) for model in (plain, fused)}
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for tokens in (IDS, IDS[:, :1], IDS[:, 1:3], IDS[:, 3:4]):
        ours = logits(compiled if tokens.shape[1] == 1 else fused, tokens, past_key_values=caches[fused])
        assert (ours - logits(plain, tokens, past_key_values=caches[plain])).abs().max() < 2e-5
    for layer, expected in zip(caches[fused].layers, caches[plain].layers, strict=True):
        assert (layer.keys - expected.keys).abs().max() < 2e-5
        assert torch.equal(layer.cumulative_length, expected.cumulative_length)


def step(model, cache, token):
    return logits(model, token, past_key_values=cache, use_cache=True)[:, -1]


@pytest.mark.parametrize("between", ["nothing", "crop", "reorder", "copy", "plain model"])
def test_a_dynamic_cache_stays_what_it_is(llama, between):
    plain, fused = load(llama, "none"), load(llama)
    caches = {model: DynamicCache(config=model.config) for model in (plain, fused)}
    for model, cache in caches.items():
        step(model, cache, IDS)
    tokens = torch.tensor([[5], [7]])
    for _ in range(3):
        ours, theirs = (step(model, caches[model], tokens) for model in (fused, plain))
        assert (ours - theirs).abs().max() < 2e-5
    held = [(layer.keys, layer.keys.clone()) for layer in caches[fused].layers]
    other = None
    if between == "crop":
        for cache in caches.values():
            cache.crop(-2)
    elif between == "reorder":
        for cache in caches.values():
            cache.reorder_cache(torch.tensor([1, 0]))
    elif between == "copy":
        other = copy.copy(caches[fused])
        other.layers = [copy.copy(layer) for layer in other.layers]
        step(fused, other, torch.tensor([[9], [11]]))
    elif between == "plain model":
        for model in (fused, plain):
            step(plain, caches[model], tokens)
    for _ in range(300 if between == "nothing" else 2):  # beyond the room that there was
        ours, theirs = (step(model, caches[model], tokens) for model in (fused, plain))
        assert (ours - theirs).abs().max() < 5e-5
    for layer, expected in zip(caches[fused].layers, caches[plain].layers, strict=True):
        assert layer.keys.shape == expected.keys.shape
        assert (layer.keys - expected.keys).abs().max() < 2e-5
        assert (layer.values - expected.values).abs().max() < 2e-5
    assert all(torch.equal(tensor, before) for tensor, before in held)
    assert copy.deepcopy(caches[fused]).get_seq_length() == caches[plain].get_seq_length()
