"""The drop-in rotary modules: for transformers 5, and the class of July 2023."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropewalk import LlamaPartNTKScaledRotaryEmbedding, RopewalkRotaryEmbedding
from ropewalk.errors import RopeError
from ropewalk.loader.rotary import frequencies_of, register_rope_types
from ropewalk.rope import inverse_frequencies

HALF = 32
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + i for i in range(HALF)],
    },
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


def config_for(rope, max_position_embeddings=256, **more):
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=32,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_theta": 10000.0, **rope},
        **more,
    )


@pytest.mark.parametrize("name", [n for n in ROPES if n != "partial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_llamas_own(name, dtype):
    # dynamic scales beyond max_position_embeddings, longrope beyond the original context; test both sides.
    config = config_for(ROPES[name], max_position_embeddings=64 if name == "dynamic" else 256)
    x = torch.zeros(1, dtype=dtype)
    for last in (40, 200):
        positions = torch.arange(last + 1)[None].repeat(2, 1)
        ours = RopewalkRotaryEmbedding(config)(x, positions)
        theirs = LlamaRotaryEmbedding(config)(x, positions)
        for found, expected in zip(ours, theirs, strict=True):
            assert found.shape == (2, last + 1, 64)
            assert found.dtype == dtype
            # Their frequencies are off by up to 1e-6 relative, which position 200 turns into 2e-4 rad at most.
            torch.testing.assert_close(
                found.float(), expected.float(), rtol=0, atol=3e-4 if dtype == torch.float32 else 0.01
            )


def test_partial_rotary_dim():
    config = config_for(ROPES["partial"])
    cos, _ = RopewalkRotaryEmbedding(config)(torch.zeros(1), torch.arange(3)[None])
    assert cos.shape == (1, 3, 32)


def test_dynamic_follows_the_length_of_the_call_alone():
    config = config_for(ROPES["dynamic"], max_position_embeddings=64)
    module = RopewalkRotaryEmbedding(config)
    short, long = torch.arange(40)[None], torch.arange(200)[None]
    before = module(torch.zeros(1), short)
    after_long = module(torch.zeros(1), long), module(torch.zeros(1), short)
    assert torch.equal(before[0], after_long[1][0])
    expected, _ = frequencies_of(config, seq_len=200)
    angles = torch.arange(200)[:, None] * expected
    torch.testing.assert_close(after_long[0][0][0, :, :HALF], angles.cos(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_the_model_leaves_the_angles_alone(cast):
    config = config_for(ROPES["yarn"])
    module = RopewalkRotaryEmbedding(config)
    far = torch.tensor([[16383]])
    before = module(torch.zeros(1), far)
    cast(module)
    assert module.inv_freq.dtype == torch.float32
    assert torch.equal(before[0], module(torch.zeros(1), far)[0])
    # What would have happened: whole radians off.
    wrong = (module.inv_freq.half().float() - module.inv_freq).abs().max() * 16383
    assert wrong > 1


def test_buffers_stay_out_of_the_state_dict():
    module = RopewalkRotaryEmbedding(config_for(ROPES["longrope"]))
    assert not module.state_dict()
    assert not list(module.parameters())


def test_compiles_whole():
    for name, rope in ROPES.items():
        config = config_for(rope, max_position_embeddings=64 if name == "dynamic" else 256)
        module = RopewalkRotaryEmbedding(config)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        positions = torch.arange(100)[None]
        for found, expected in zip(compiled(torch.zeros(1), positions), module(torch.zeros(1), positions), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_type_of_transformers_that_is_not_ours_is_still_served():
    config = config_for({"rope_type": "proportional", "partial_rotary_factor": 0.5})
    ours = RopewalkRotaryEmbedding(config)
    assert torch.equal(ours.inv_freq, LlamaRotaryEmbedding(config).inv_freq)


def test_an_unknown_type_is_named():
    config = config_for(ROPES["default"])
    config.rope_parameters["rope_type"] = "pi"
    with pytest.raises(RopeError, match=r"expected one of default, .*found 'pi'"):
        RopewalkRotaryEmbedding(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "partial-ntk", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "ntk-by-parts", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "ntk", "alpha": 2.5},
    ],
)
def test_registered_types_build_save_and_reload_in_transformers(tmp_path, rope, caplog):
    register_rope_types()
    register_rope_types()  # twice changes nothing
    config = config_for(rope)
    model = LlamaForCausalLM(config).eval()
    expected, _ = inverse_frequencies(
        rope["rope_type"], dim=64, base=1e4, **{k: v for k, v in rope.items() if k != "rope_type"}
    )
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == {"rope_theta": 10000.0, **rope}
    assert torch.equal(again.model.rotary_emb.inv_freq, expected)  # also through the meta device
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert "Missing validation" not in caplog.text
    # The old spelling of the Hub, and the original context at the config's top level.
    old = {k: v for k, v in rope.items() if k != "rope_type"} | {"type": rope["rope_type"]}
    loaded = AutoConfig.for_model("llama", hidden_size=128, num_attention_heads=2, rope_scaling=old)
    assert loaded.rope_parameters["rope_type"] == rope["rope_type"]


def test_registered_types_are_checked_when_a_config_is_made():
    register_rope_types()
    # transformers wraps what a check raises, and says it.
    with pytest.raises(Exception, match=r"factor: expected a number above 0, found 0"):
        config_for({"rope_type": "partial-ntk", "factor": 0, "original_max_position_embeddings": 64})
    with pytest.raises(Exception, match="expected parameter 'original_max_position_embeddings'"):
        config_for({"rope_type": "partial-ntk", "factor": 4.0})


def test_by_parts_takes_the_original_context_from_the_configs_top_level():
    register_rope_types()
    config = config_for({"rope_type": "partial-ntk", "factor": 4.0}, original_max_position_embeddings=64)
    expected, _ = inverse_frequencies("partial-ntk", dim=64, factor=4, original_max_position_embeddings=64)
    assert torch.equal(frequencies_of(config)[0], expected)


class Published(torch.nn.Module):
    """The interface of July 2023 as its callers knew it, computed plainly: tables of cosine and sine."""

    def __init__(self, inv_freq, positions):
        super().__init__()
        emb = torch.outer(torch.arange(positions).float(), inv_freq).repeat(1, 2)
        self.cos, self.sin = emb.cos()[None, None], emb.sin()[None, None]


def test_the_class_of_2023_has_its_arguments_and_results():
    # Positional, in the published order.
    module = LlamaPartNTKScaledRotaryEmbedding(128, 64, 10000, 4, 1, 1, 4096, None)
    inv_freq, _ = inverse_frequencies("partial-ntk", dim=128, factor=4, original_max_position_embeddings=4096)
    assert torch.equal(module.inv_freq, inv_freq)
    expected = Published(inv_freq, 200)
    x = torch.zeros(1, 2, 50, 128, dtype=torch.float16)
    for length in (50, 64, 200, 10):  # 200 extends the tables; 10 cuts them
        cos, sin = module(x, seq_len=length)
        assert cos.shape == sin.shape == (1, 1, length, 128)
        assert cos.dtype == torch.float16
        assert torch.equal(cos, expected.cos[:, :, :length].half())
        assert torch.equal(sin, expected.sin[:, :, :length].half())
    assert module(x)[0].shape == (1, 1, 50, 128)
    assert module.cos_cached.shape == (1, 1, 200, 128)
    assert module.max_seq_len_cached == 200
    # By default nothing is scaled.
    plain = LlamaPartNTKScaledRotaryEmbedding(128)
    torch.testing.assert_close(plain.inv_freq, inverse_frequencies("default", dim=128)[0], rtol=1e-6, atol=0)


def test_the_class_of_2023_passes_over_a_persisted_inv_freq_and_half():
    module = LlamaPartNTKScaledRotaryEmbedding(64, scale=4, original_max_position_embeddings=64)
    before = module.inv_freq.clone()
    holder = torch.nn.Sequential(module)
    holder.load_state_dict({"0.inv_freq": torch.zeros(32)}, strict=True)
    holder.half()
    assert torch.equal(module.inv_freq, before)
    assert not holder.state_dict()


def test_the_layers_of_2023_share_their_tables():
    a, b = (LlamaPartNTKScaledRotaryEmbedding(64, 512, scale=4) for _ in range(2))
    other = LlamaPartNTKScaledRotaryEmbedding(64, 512, scale=2)
    x = torch.zeros(1, 1, 1, 64)
    assert a(x, 512)[0].data_ptr() == b(x, 512)[0].data_ptr()
    assert not torch.equal(other(x, 512)[0], a(x, 512)[0])
