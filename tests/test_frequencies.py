"""Inverse frequencies: the July 2023 reference values, transformers' own functions, and impossible settings."""

import math
import random

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.errors import RopeError
from ropewalk.rope import ROPE_TYPES, inverse_frequencies, rotary_dim
from ropewalk.rope.frequencies import partial_ntk

# dim 128, base 1e4, scale 4, original 4096, computed with 40 digits.
PARTIAL_NTK = {
    0: 1.000000000e00,
    8: 3.162277660e-01,
    16: 1.000000000e-01,
    24: 3.162277660e-02,
    32: 7.788564305e-03,
    40: 1.427092617e-03,
    48: 2.500000000e-04,
    63: 2.886954962e-05,
}


def relative(found, expected):
    return ((found.double() - expected.double()).abs() / expected.double().abs()).max().item()


def test_partial_ntk_has_the_reference_values():
    inv_freq, scaling = inverse_frequencies(
        "partial-ntk", dim=128, base=1e4, factor=4, original_max_position_embeddings=4096
    )
    assert inv_freq.dtype == torch.float32
    assert inv_freq.shape == (64,)
    assert scaling == 1.0
    for i, expected in PARTIAL_NTK.items():
        assert abs(inv_freq[i].item() - expected) <= 2e-7 * expected


def test_partial_ntk_has_its_factors_and_constants():
    settings = {"dim": 128, "base": 1e4, "factor": 4, "original_max_position_embeddings": 4096}
    full, _ = partial_ntk(**settings)
    plain = 1e4 ** -(torch.arange(0, 128, 2).double() / 128)
    # Without the NTK blend and the extrapolation nothing is left but linear interpolation; without the NTK blend
    # alone, plain where the head turns fast and linear elsewhere.
    off, _ = partial_ntk(**settings, ntk_factor=0, extrapolation_factor=0)
    assert relative(torch.from_numpy(off), plain / 4) < 1e-12
    no_ntk, _ = partial_ntk(**settings, ntk_factor=0)
    assert relative(torch.from_numpy(no_ntk[:26]), plain[:26]) < 1e-12
    assert relative(torch.from_numpy(no_ntk[41:]), plain[41:] / 4) < 1e-12
    for constant in ("beta_0", "beta_1", "gamma_0", "gamma_1"):
        default = {"beta_0": 1.25, "beta_1": 0.75, "gamma_0": 16.0, "gamma_1": 2.0}[constant]
        assert (partial_ntk(**settings, **{constant: default})[0] == full).all()
        assert (partial_ntk(**settings, **{constant: default * 1.5})[0] != full).any()


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_partial_ntk_agrees_with_its_definition(scale):
    """The formula once more, written the way its authors describe it, a channel at a time, in floats."""
    dim, base, original = 64, 10000.0, 2048
    found, _ = inverse_frequencies(
        "partial-ntk", dim=dim, base=base, factor=scale, original_max_position_embeddings=original
    )

    def channel(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    def share(i, most, least):
        low, high = max(math.floor(channel(most)), 0), min(math.ceil(channel(least)), dim - 1)
        return 1 - min(max((i - low) / (high - low), 0), 1)

    for i in range(dim // 2):
        plain = base ** (-2 * i / dim)
        ntk = (base * scale ** (dim / (dim - 2))) ** (-2 * i / dim)
        mixed = plain / scale * (1 - share(i, 1.25, 0.75)) + ntk * share(i, 1.25, 0.75)
        expected = mixed * (1 - share(i, 16, 2)) + plain * share(i, 16, 2)
        assert found[i].item() == pytest.approx(expected, rel=2e-7)


def test_ntk_by_parts_is_yarn_without_its_temperature():
    settings = {"dim": 128, "factor": 4, "original_max_position_embeddings": 4096}
    parts, one = inverse_frequencies("ntk-by-parts", **settings)
    yarn, temperature = inverse_frequencies("yarn", **settings)
    july, _ = inverse_frequencies("partial-ntk", **settings)
    assert torch.equal(parts, yarn)
    assert one == 1.0
    assert temperature == pytest.approx(0.1 * math.log(4) + 1)
    assert 0.15 < relative(parts, july) < 0.17


def test_ntk_multiplies_the_base():
    inv_freq, scaling = inverse_frequencies("ntk", dim=128, base=1e4, alpha=2.5)
    expected = (1e4 * 2.5 ** (128 / 126)) ** -(torch.arange(0, 128, 2).double() / 128)
    assert scaling == 1.0
    assert relative(inv_freq, expected) < 2e-7


def settings_of(rope_type, rng):
    """Return (config arguments, rope_parameters, seq_len) drawn at random for a type that transformers has."""
    head_dim = rng.choice([32, 64, 80, 96, 128])
    original = rng.choice([256, 1024, 2048, 4096, 8192])
    factor = round(rng.uniform(1.0, 16.0), 2)
    parameters = {"rope_type": rope_type, "rope_theta": rng.choice([1e4, 5e5, 1e6])}
    if rng.random() < 0.5:
        parameters["partial_rotary_factor"] = rng.choice([0.25, 0.5, 0.75, 1.0])
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    seq_len = None
    if rope_type in ("linear", "dynamic", "yarn", "llama3"):
        parameters["factor"] = factor
    if rope_type in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = original
    if rope_type == "dynamic":
        seq_len = rng.choice([None, 17, original // 2, original * 3])
    if rope_type == "yarn" and rng.random() < 0.5:
        parameters |= {"beta_fast": rng.choice([16.0, 32.0, 64.0]), "beta_slow": rng.choice([1.0, 2.0])}
    if rope_type == "yarn" and rng.random() < 0.3:
        parameters["truncate"] = False
    if rope_type == "yarn" and rng.random() < 0.3:
        parameters["attention_factor"] = 1.25
    elif rope_type == "yarn" and rng.random() < 0.3:
        parameters |= {"mscale": 0.7, "mscale_all_dim": 1.1}
    if rope_type == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice([2.0, 4.0])}
    if rope_type == "longrope":
        parameters["short_factor"] = [round(rng.uniform(1, 2), 3) for _ in range(dim // 2)]
        parameters["long_factor"] = [round(rng.uniform(1, 40), 3) for _ in range(dim // 2)]
        seq_len = rng.choice([None, original, original + 1])
        if rng.random() < 0.5:
            parameters["factor"] = factor
        if rng.random() < 0.3:
            parameters["attention_factor"] = 1.5
    longest = original if rope_type == "dynamic" else original * 4
    config = {"hidden_size": head_dim * 2, "num_attention_heads": 2, "max_position_embeddings": longest}
    return config, parameters, seq_len


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "yarn", "llama3", "longrope"])
def test_agrees_with_transformers(rope_type):
    from ropewalk.loader.rotary import frequencies_of

    rng = random.Random(rope_type)
    for _ in range(30):
        arguments, parameters, seq_len = settings_of(rope_type, rng)
        config = LlamaConfig(**arguments, rope_parameters=dict(parameters))
        if rope_type == "default":
            head_dim = config.head_dim
            dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
            base = parameters["rope_theta"]
            theirs, their_scaling = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim), 1.0
        else:
            theirs, their_scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)
        ours, our_scaling = frequencies_of(config, seq_len=seq_len)
        # theirs is float32 throughout: a power of a base of 1e6 to an exponent with an error of half an ulp
        assert relative(ours, theirs) < 3e-6, (arguments, parameters, seq_len)
        assert our_scaling == pytest.approx(their_scaling, rel=1e-6)


def test_result_goes_to_the_device_asked_for_even_where_the_default_is_meta():
    with torch.device("meta"):
        inv_freq, _ = inverse_frequencies("default", dim=8)
    assert inv_freq.device.type == "cpu"
    assert inverse_frequencies("default", dim=8, device="meta")[0].is_meta


@pytest.mark.parametrize(
    ("rope_type", "arguments", "expected", "found"),
    [
        ("pi", {}, "default, linear", "'pi'"),
        ("linear", {}, "'factor'", "none"),
        ("linear", {"factor": 0}, "above 0", "0"),
        ("linear", {"factor": -1.0}, "above 0", "-1.0"),
        ("linear", {"factor": float("nan")}, "above 0", "nan"),
        ("linear", {"factor": True}, "a number", "True"),
        ("linear", {"factor": "2"}, "a number", "'2'"),
        ("linear", {"factor": 2, "beta_fast": 1}, "parameters factor", "'beta_fast'"),
        ("default", {"dim": 7}, "even", "7"),
        ("default", {"dim": 0}, "even", "0"),
        ("default", {"base": 1.0}, "above 1", "1.0"),
        ("ntk", {"alpha": 2, "dim": 2}, "above 2", "2"),
        ("partial-ntk", {"factor": 4, "original_max_position_embeddings": 0}, "positive", "0"),
        ("yarn", {"factor": 4, "original_max_position_embeddings": 2.5}, "positive", "2.5"),
        (
            "llama3",
            {"factor": 8, "original_max_position_embeddings": 64, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor: expected a number above 4",
            "4",
        ),
        (
            "longrope",
            {"short_factor": [1.0], "long_factor": [1.0] * 32, "original_max_position_embeddings": 64, "factor": 2},
            "32 numbers",
            "1",
        ),
        (
            "longrope",
            {"short_factor": [1.0] * 32, "long_factor": [1.0] * 32, "original_max_position_embeddings": 64},
            "factor or max_position_embeddings",
            "neither",
        ),
    ],
)
def test_impossible_settings_are_named(rope_type, arguments, expected, found):
    with pytest.raises(RopeError) as error:
        inverse_frequencies(rope_type, **{"dim": 64, **arguments})
    assert expected in str(error.value)
    assert found in str(error.value)


def test_partial_rotary_dim():
    assert rotary_dim(64) == 64
    assert rotary_dim(64, 0.25) == 16
    assert rotary_dim(80, 0.4) == 32
    for factor in (0, -1, 1.5, 0.01, 3 / 64, True, None):
        with pytest.raises(RopeError):
            rotary_dim(64, factor)


def test_every_type_is_listed():
    assert set(ROPE_TYPES) == {
        "default",
        "linear",
        "ntk",
        "dynamic",
        "partial-ntk",
        "ntk-by-parts",
        "yarn",
        "llama3",
        "longrope",
    }
