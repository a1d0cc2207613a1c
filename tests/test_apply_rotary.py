"""The replacement of transformers' `apply_rotary_pos_emb`: which families get it, and that they compute as before."""

import importlib
import inspect

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ropewalk import cpu
from ropewalk.errors import PatchError
from ropewalk.loader import apply_rotary
from ropewalk.loader.quantizer import install_rope
from ropewalk.patches import transformers as patch

# Families and what makes a small model of each; gpt_neox, phi and stablelm rotate some channels only.
HALF_ROTATED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "phi3",
    "phi",
    "stablelm",
    "gpt_neox",
    "gemma",
    "olmo2",
)
OTHERS = ("cohere", "glm", "ernie4_5", "gpt_oss")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def build(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **MORE.get(family, {})})
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(autouse=True)
def _as_it_was():
    patch.revert()  # models that other tests loaded have replaced it
    yield
    patch.revert()


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Have the operator used even where the CPU has no kernel or a compiler is at work, and count the calls."""
    called = []

    def on_gpu(x):
        called.append(x.shape)
        return True

    monkeypatch.setattr(apply_rotary, "has_kernel", on_gpu)
    return called


@pytest.mark.parametrize("family", HALF_ROTATED)
def test_half_rotated_families_compute_as_before(family, as_on_gpu):
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    mask = (ids != 0).long()
    model = build(family)
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        assert not as_on_gpu
        assert apply_rotary.replace(modeling(family).__name__)
        after = model(ids, attention_mask=mask).logits
        assert len(as_on_gpu) == 2
        # In two pieces, with a cache.
        first = model(ids[:, :4], attention_mask=mask[:, :4])
        second = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(after[mask > 0], before[mask > 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(second, before[:, 4:], rtol=0, atol=1e-5)
    assert apply_rotary.is_replaced(modeling(family).__name__)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_left_alone(family):
    function = modeling(family).apply_rotary_pos_emb
    assert not apply_rotary.replace(modeling(family).__name__)
    assert modeling(family).apply_rotary_pos_emb is function


def numbers(unsqueeze_dim=1, dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, n, 16, generator=g).to(dtype) for n in (4, 2))
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return q, k, *torch.randn(2, 2, 5, dim, generator=g).to(dtype)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_function_itself(family, dtype, unsqueeze_dim, as_on_gpu):
    """Also with tables whose halves differ; and no input is changed."""
    original = modeling(family).apply_rotary_pos_emb
    apply_rotary.replace(modeling(family).__name__)
    ours = modeling(family).apply_rotary_pos_emb
    given = numbers(unsqueeze_dim, dim=16 if family == "llama" else 6, dtype=dtype)
    kept = [x.clone() for x in given]
    found = ours(*given, unsqueeze_dim=unsqueeze_dim)
    expected = original(*(x.float() for x in given), unsqueeze_dim=unsqueeze_dim)
    theirs = original(*given, unsqueeze_dim=unsqueeze_dim)
    for f, e, t in zip(found, expected, theirs, strict=True):
        assert f.dtype == dtype
        assert f.stride() == t.stride() or family == "phi3"
        assert (f.float() - e).abs().max() <= (t.float() - e).abs().max() + 1e-6
    for before, after in zip(kept, given, strict=True):
        assert torch.equal(before, after)
    assert as_on_gpu


def test_gradient(as_on_gpu):
    original = modeling("llama").apply_rotary_pos_emb
    apply_rotary.replace(modeling("llama").__name__)
    q, k, cos, sin = numbers()
    grads = []
    for function in (original, modeling("llama").apply_rotary_pos_emb):
        x, y = q.clone().requires_grad_(), k.clone().requires_grad_()
        a, b = function(x, y, cos, sin)
        grads.append(torch.autograd.grad((a.square().sum(1) * b.sum(1)).sum(), (x, y)))
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_whole(as_on_gpu):
    apply_rotary.replace(modeling("llama").__name__)
    function = modeling("llama").apply_rotary_pos_emb
    given = numbers()
    found = torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager")(*given)
    for f, e in zip(found, function(*given), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),  # one angle for all tokens
        lambda q, k, cos, sin: (q, k.double(), cos, sin),
        lambda q, k, cos, sin: (q.double(), k.double(), cos.double(), sin.double()),
        lambda q, k, cos, sin: (q, k, cos.requires_grad_(), sin),
        lambda q, k, cos, sin: (q[:, :, :1], k[:, :, :1], cos, sin),  # one token at several positions
    ],
)
def test_unusual_arguments_go_to_the_original(change, as_on_gpu, monkeypatch):
    monkeypatch.setattr(apply_rotary, "rotate", None)
    original = modeling("llama").apply_rotary_pos_emb
    apply_rotary.replace(modeling("llama").__name__)
    given = change(*numbers())
    for f, e in zip(modeling("llama").apply_rotary_pos_emb(*given), original(*given), strict=True):
        assert torch.equal(f, e)


def test_without_kernels_the_original_computes(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda **_: False)
    original = modeling("llama").apply_rotary_pos_emb
    apply_rotary.replace(modeling("llama").__name__)
    ours = modeling("llama").apply_rotary_pos_emb
    assert ours is not original
    assert inspect.signature(ours) == inspect.signature(original)
    given = numbers(dtype=torch.bfloat16)
    for f, e in zip(ours(*given), original(*given), strict=True):
        assert torch.equal(f, e)


def test_float32_tables(as_on_gpu, monkeypatch):
    """For our kernels the tables stay float32; the family's own function gets them cast, as it needs them."""
    model = build("llama").to(torch.bfloat16)
    install_rope(model)
    module = model.model.rotary_emb
    name = modeling("llama").__name__
    assert module.modeling == name
    assert apply_rotary.takes_float32_tables(name)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x, positions = torch.zeros(1, dtype=torch.bfloat16), torch.arange(5)[None]
    assert torch.equal(compiled(x, positions)[0], module(x, positions)[0])
    q, k, *_ = numbers(dtype=torch.bfloat16)
    wide = torch.randn(2, 2, 5, 16)
    for on_gpu in (True, False):
        monkeypatch.setattr(apply_rotary, "has_kernel", lambda x, on_gpu=on_gpu: on_gpu)
        assert modeling("llama").apply_rotary_pos_emb(q, k, *wide)[0].dtype == torch.bfloat16
    apply_rotary.restore()
    assert not apply_rotary.takes_float32_tables(name)
    install_rope(model)
    assert model.model.rotary_emb.modeling == name
    assert model.model.rotary_emb(q, torch.arange(5)[None])[0].dtype == torch.bfloat16


def test_patch_and_revert():
    init, function = PreTrainedModel.__init__, modeling("llama").apply_rotary_pos_emb
    qwen2 = modeling("qwen2").apply_rotary_pos_emb
    patch.apply()
    ours = modeling("llama").apply_rotary_pos_emb
    assert ours.replaced is function
    assert patch.apply() == patch.apply()
    assert modeling("llama").apply_rotary_pos_emb is ours
    # A family that was not imported when `patch` was called: as soon as one of its models is built.
    apply_rotary._originals.pop(modeling("qwen2").__name__)
    modeling("qwen2").apply_rotary_pos_emb = qwen2
    with torch.device("meta"):
        build("qwen2")
    assert modeling("qwen2").apply_rotary_pos_emb.replaced is qwen2
    patch.revert()
    assert PreTrainedModel.__init__ is init
    assert modeling("llama").apply_rotary_pos_emb is function
    assert modeling("qwen2").apply_rotary_pos_emb is qwen2
    assert not patch.status()["applied"]


def test_a_module_that_imported_the_function_after_it_was_replaced(monkeypatch):
    original = modeling("llama").apply_rotary_pos_emb
    apply_rotary.replace(modeling("llama").__name__)
    monkeypatch.setattr(modeling("cohere"), "apply_rotary_pos_emb", modeling("llama").apply_rotary_pos_emb)
    assert apply_rotary.replace(modeling("cohere").__name__)
    apply_rotary.restore()
    assert modeling("cohere").apply_rotary_pos_emb is original


def test_a_transformers_that_builds_models_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda self, *arguments: None)
    with pytest.raises(PatchError, match=r"expected PreTrainedModel\(self, config, ...\), found self, arguments"):
        patch.apply()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_on_a_gpu(dtype):
    ids = torch.arange(40, device="cuda")[None]
    model = build("llama").cuda()
    with torch.no_grad():
        exact = model(ids).logits
        theirs = model.to(dtype)(ids).logits
        install_rope(model)
        assert model.model.rotary_emb(theirs, ids)[0].dtype == torch.float32
        ours = model(ids).logits
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
