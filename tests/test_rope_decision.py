"""Which rotary embedding a config means, and what a user's wish does to it."""

import pytest

from ropewalk.errors import RopeError
from ropewalk.loader.rope import decide_rope, parse_rope

LLAMA = {
    "model_type": "llama",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
AIROPHIN = {
    **LLAMA,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 4096,
    "rope_scaling": None,
}


def test_airophin_means_partial_ntk_without_saying_so():
    decision = decide_rope(AIROPHIN)
    assert decision.type == "partial-ntk"
    assert decision.parameters == {
        "rope_type": "partial-ntk",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    assert "original_max_position_embeddings 4096" in decision.why
    assert not decision.warnings
    assert str(decision) == "partial-ntk (rope_theta 10000, factor 4, original_max_position_embeddings 4096)"
    assert decision.as_dict()["type"] == "partial-ntk"


def test_a_factor_that_is_not_whole_is_rounded_down_as_the_published_patch_does():
    decision = decide_rope({**AIROPHIN, "max_position_embeddings": 10000})
    assert decision.parameters["factor"] == 2.0
    assert "rounded down" in decision.warnings[0]


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "original_max_position_embeddings": 4096},
        {**LLAMA, "rope_scaling": None, "rope_theta": 1000000},  # CodeLlama
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {**AIROPHIN, "model_type": "phi3"},  # Phi-3 has the key too, but the rule is Llama's
        {**LLAMA, "part_ntk_scale": None, "ntk_alpha": None, "position_interpolation_scale": 1},
    ],
)
def test_no_scaling(config):
    decision = decide_rope(config)
    assert decision.type == "default"
    assert decision.parameters["rope_theta"] == config["rope_theta"]


def test_what_the_config_says_goes():
    orca = decide_rope({**LLAMA, "max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert orca.type == "linear"
    assert orca.parameters["factor"] == 2.0
    assert "rope_scaling of type linear" in orca.why
    # Also where it could mean partial NTK.
    stated = {**AIROPHIN, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert decide_rope(stated).type == "yarn"
    # The trap of transformers: without this, the original context would become 16384.
    assert decide_rope(stated).parameters["original_max_position_embeddings"] == 4096
    saved = {**AIROPHIN, "rope_parameters": decide_rope(AIROPHIN).parameters}
    assert decide_rope(saved).parameters == decide_rope(AIROPHIN).parameters
    assert decide_rope({**LLAMA, "rope_scaling": {"type": "proportional"}}).type == "proportional"  # transformers'


def test_ntk_by_parts_says_which_formula_it_means():
    config = {
        **AIROPHIN,
        "rope_scaling": {"type": "ntk-by-parts", "factor": 4, "original_max_position_embeddings": 4096},
    }
    decision = decide_rope(config)
    assert decision.type == "ntk-by-parts"
    assert "YaRN paper" in decision.warnings[0]
    assert "partial-ntk" in decision.warnings[0]


def test_top_level_keys_of_july_2023():
    part = decide_rope({**LLAMA, "part_ntk_scale": 4})
    assert part.type == "partial-ntk"
    assert part.parameters["original_max_position_embeddings"] == 2048
    assert decide_rope({**LLAMA, "ntk_alpha": 4}).parameters["alpha"] == 4
    assert decide_rope({**LLAMA, "position_interpolation_scale": 0.25}).parameters["factor"] == 4
    with pytest.raises(RopeError, match="expected one rotary scaling, found part_ntk_scale and ntk_alpha"):
        decide_rope({**LLAMA, "part_ntk_scale": 4, "ntk_alpha": 4})


def test_models_without_rotary_embedding():
    decision = decide_rope({"model_type": "mpt", "d_model": 64})
    assert decision.type == "none"
    assert decision.parameters == {}
    assert "ALiBi" in decision.why
    assert decide_rope({"model_type": "mpt"}, "none").type == "none"
    with pytest.raises(RopeError, match=r"expected auto for mpt, .*found 'linear:2'"):
        decide_rope({"model_type": "mpt"}, "linear:2")


def test_a_set_for_each_kind_of_layer_is_left_alone():
    sets = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 8.0}}
    config = {**LLAMA, "model_type": "gemma3_text", "rope_parameters": sets}
    decision = decide_rope(config)
    assert decision.type == "per-layer"
    assert decision.parameters == sets
    with pytest.raises(RopeError, match="expected auto for gemma3_text"):
        decide_rope(config, "linear:2")


@pytest.mark.parametrize(
    ("override", "rope_type", "parameters"),
    [
        ("none", "default", {}),
        ("default", "default", {}),
        ("linear:2", "linear", {"factor": 2}),
        ("linear", "linear", {"factor": 4.0}),  # what the config implies
        ("dynamic:2", "dynamic", {"factor": 2, "original_max_position_embeddings": 4096}),
        ("ntk:2.5", "ntk", {"alpha": 2.5}),
        ("ntk:alpha=2.5", "ntk", {"alpha": 2.5}),
        ("ntk:2,theta=5e5", "ntk", {"alpha": 2, "rope_theta": 5e5}),
        ("yarn", "yarn", {"factor": 4.0, "original_max_position_embeddings": 4096}),
        ("yarn:8,original=2048", "yarn", {"factor": 8, "original_max_position_embeddings": 2048}),
        ("yarn:factor=2,truncate=false", "yarn", {"factor": 2, "truncate": False}),
        ("partial-ntk", "partial-ntk", {"factor": 4.0, "original_max_position_embeddings": 4096}),
        (
            "partial-ntk:factor=8,original=2048",
            "partial-ntk",
            {"factor": 8, "original_max_position_embeddings": 2048},
        ),
        (" partial-ntk:8 ", "partial-ntk", {"factor": 8}),
    ],
)
def test_overrides(override, rope_type, parameters):
    decision = decide_rope(AIROPHIN, override)
    assert decision.type == rope_type
    assert {k: decision.parameters[k] for k in parameters} == parameters
    assert decision.why == f"asked for: {override}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "expected auto, none or one of default, linear.*found 'foo'"),
        ("", "expected auto, none or one of"),
        ("linear:two", "factor: expected a number, found 'two'"),
        ("linear:beta=2", "expected parameters factor, rope_theta, found 'beta=2'"),
        ("none:2", "found '2'"),
        ("longrope:2", "found '2'"),
    ],
)
def test_overrides_that_are_not_understood(override, message):
    with pytest.raises(RopeError, match=message):
        parse_rope(override)


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        (LLAMA, "linear", "expected a factor .*found none"),
        (AIROPHIN, "linear:0", "factor: expected a number above 0, found 0"),
        (AIROPHIN, "yarn:original=0", "expected a factor .*found none"),
        (AIROPHIN, "ntk", "expected parameter 'alpha', found none"),
        (AIROPHIN, "partial-ntk:4,original=0", "positive number of positions, found 0"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": -1}}, "auto", "above 0, found -1"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "auto", "'factor', found none"),
        ({**LLAMA, "rope_scaling": "linear"}, "auto", "an object or null, found 'linear'"),
        ({**LLAMA, "max_position_embeddings": "4096"}, "auto", "max_position_embeddings: expected"),
        ({**LLAMA, "max_position_embeddings": True}, "auto", "found True"),
        ({**LLAMA, "head_dim": 127}, "auto", "found 127|even number"),
        ({**LLAMA, "rope_theta": 0}, "auto", "rope_theta: expected a number above 1, found 0"),
    ],
)
def test_impossible_decisions_are_found_before_a_model_is_built(config, override, message):
    with pytest.raises(RopeError, match=message):
        decide_rope(config, override)
