"""Every way in which a packed layer may lie on disk is read into the same tensors, bit for bit."""

import json
import os
import random
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from ropewalk.errors import FormatError, QuantizeConfigError, UsageError
from ropewalk.gptq.format import pack, unpack, zeros_v1_to_v2, zeros_v2_to_v1
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.dynamic import match_rules, parse_dynamic
from ropewalk.loader.planar import join_planes
from ropewalk.loader.weight_files import bits_and_group_in

ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
PLAIN = {"model.embed_tokens.weight": torch.zeros(8, 4), "model.norm.weight": torch.ones(4)}


def layer(rows=256, columns=128, seed=0, **settings):
    """One layer in the checkpoint layout, with random weights and without a bias."""
    settings = {"bits": 4, "group_size": 128, "sym": True} | settings
    generator = torch.Generator().manual_seed(seed)
    return quantize_rtn(torch.randn(columns, rows, generator=generator), **settings)


def write(folder, layers, settings=None, file="model.safetensors", config_in="quantize_config.json", **config):
    """Write a folder: layers, name -> part -> tensor, into one file; settings into one config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    tensors = {f"{name}.{part}": t.contiguous() for name, parts in layers.items() for part, t in parts.items()}
    tensors |= PLAIN
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    if settings is not None:
        (folder / config_in).write_text(json.dumps(settings))
    return folder


def parts_of(checkpoint, name=ATTENTION):
    with checkpoint.reader() as reader:
        return {part: t.clone() for part, t in reader.read_layer(checkpoint.layers[name]).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for part, tensor in expected.items():
        assert found[part].dtype == tensor.dtype and torch.equal(found[part], tensor), part


def refuses(folder, error, *texts, **arguments):
    with pytest.raises(error) as caught:
        open_checkpoint(folder, **arguments)
    for text in texts:
        assert text in str(caught.value)


# Configs


@pytest.mark.parametrize("place", ["quantize_config.json", "quant_config.json", "config.json"])
@pytest.mark.parametrize(
    "words",
    [
        {"bits": 4, "group_size": 128},
        {"w_bit": 4, "q_group_size": 128},
        {"wbits": 4, "groupsize": 128, "wbits_too": 1},
        {"bits": 4, "group_size": 128, "quant_method": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32"},
        {"bits": 4, "w_bit": 4, "group_size": 128, "method": "gptq", "format": "gptq", "meta": {"mse": 0.0}},
        {"bits": 4, "group_size": 128, "desc_act": None, "sym": None, "is_marlin_format": False},
    ],
)
def test_configs(tmp_path, place, words):
    expected = layer()
    if place == "config.json":
        folder = write(tmp_path, {ATTENTION: expected}, quantization_config=words)
    else:
        folder = write(tmp_path, {ATTENTION: expected}, words, config_in=place)
    checkpoint = open_checkpoint(folder)
    same(parts_of(checkpoint), expected)
    assert checkpoint.warnings == []
    raw = checkpoint.quantize_config.raw
    assert (raw["bits"], raw["group_size"]) == (4, 128)
    assert not {"w_bit", "wbits", "q_group_size", "groupsize"} & set(raw)


def test_configs_that_differ(tmp_path):
    right, wrong = {"bits": 4, "group_size": 128, "sym": True}, {"bits": 4, "group_size": 64}
    for first, second in ((right, wrong), (wrong, right)):
        folder = write(tmp_path, {ATTENTION: layer()}, first, quantization_config=second)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.layers[ATTENTION].settings.group_size == 128
        (warning,) = checkpoint.warnings
        assert "the configs differ: group_size 128 of " in warning and "is used, not 64 of " in warning
    # what says nothing contradicts nothing
    folder = write(tmp_path, {ATTENTION: layer()}, right, quantization_config={"bits": 4, "group_size": 128})
    assert open_checkpoint(folder).warnings == []
    versions = ({**right, "checkpoint_format": "gptq"}, {**right, "checkpoint_format": "gptq_v2"})
    folder = write(tmp_path, {ATTENTION: layer()}, versions[0], quantization_config=versions[1])
    refuses(
        folder,
        QuantizeConfigError,
        "config.json: quantization_config: expected checkpoint_format gptq, as in",
        "found gptq_v2",
    )
    refuses(write(tmp_path, {ATTENTION: layer()}, right, quantization_config={**right, "quant_method": "awq"}),
            QuantizeConfigError, "config.json", "quant_method gptq, found 'awq'")  # fmt: skip


def test_what_the_user_says_counts_more_than_a_config(tmp_path):
    folder = write(tmp_path, {ATTENTION: layer()}, {"bits": 8, "group_size": 64})
    checkpoint = open_checkpoint(folder, bits=4, group_size=128)
    same(parts_of(checkpoint), layer())
    assert [w.split(";")[0] for w in checkpoint.warnings] == ["bits 4 was asked for", "group_size 128 was asked for"]
    assert checkpoint.quantize_config.raw["bits"] == 4
    refuses(folder, FormatError, "qweight: expected [3 * n, N] words for 3 bits", bits=3, group_size=128)
    refuses(folder, FormatError, "qzeros: expected shape [8, 16]", "found [2, 16]", bits=4, group_size=32)
    for wrong in ({"bits": 5}, {"bits": True}, {"bits": "4"}, {"group_size": 0}, {"group_size": -2}):
        refuses(folder, UsageError, "expected", **wrong)


# dynamic


def test_dynamic_overrides(tmp_path):
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    eight, coarse = layer(bits=8, group_size=64), layer(group_size=-1, sym=False)
    ordered = layer(order=torch.randperm(256, generator=torch.Generator().manual_seed(3)))
    layers = dict(zip(names, (layer(), eight, coarse, ordered), strict=True))
    dynamic = {
        r".*\.1\.": {"bits": 8, "group_size": 64},
        r"+:.*\.[12]\..*down": {"group_size": -1, "sym": False, "mse": 2.0},
        r"+:.*\.3\.": {"desc_act": True},
        "-:model.layers.9": {},
    }
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "dynamic": dynamic}
    checkpoint = open_checkpoint(write(tmp_path, layers, settings))
    assert checkpoint.warnings == []
    for name, expected in layers.items():
        same(parts_of(checkpoint, name), expected)
    found = [(la.settings.bits, la.settings.group_size, la.settings.desc_act) for la in checkpoint.layers.values()]
    assert found == [(4, 128, False), (8, 64, False), (4, -1, False), (4, 128, True)]
    assert [la.settings.sym for la in checkpoint.layers.values()] == [True, True, False, True]
    assert checkpoint.quantize_config.raw["dynamic"] == dynamic
    settings["dynamic"] = {}
    refuses(write(tmp_path, layers, settings), FormatError, f"{names[1]}.qzeros: expected shape")


def test_dynamic_is_tried_in_gptqmodels_order():
    names = ["a.1.x", "a.1.y", "b.2.x", "x.a"]
    rules = parse_dynamic({"a": {"bits": 8}, r"+:a\.1\.x": {"bits": 2}, "-:.*y": {}, r"^b\.2\.x$": {"bits": 3}}, "here")
    found = {name: rule.text for name, rule in match_rules(rules, names, "here").items()}
    # "-:" goes first; a pattern need not reach the end of a name, but begins at its beginning
    assert found == {"a.1.x": "a", "a.1.y": "-:.*y", "b.2.x": r"^b\.2\.x$"}
    assert parse_dynamic(None, "here") == ()


def test_a_dynamic_pattern_that_takes_forever(tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.loader.dynamic.SECONDS", 0.5)
    names = {f"model.layers.{'a' * 60}.{i}": layer() for i in range(2)}
    for pattern in (r"(.*)*(.*)*(.*)*Q", ".*" * 40 + "Q", "(?:(?:[a-z.0-9]+)+)+Q"):
        settings = {"bits": 4, "group_size": 128, "dynamic": {pattern: {"bits": 8}}}
        start = time.monotonic()
        refuses(write(tmp_path, names, settings), QuantizeConfigError, "within 0.5 seconds", "longer")
        assert time.monotonic() - start < 30  # on a busy machine, too
    # one that only looks like it
    monkeypatch.setattr("ropewalk.loader.dynamic.SECONDS", 60)
    settings["dynamic"] = {r"(?!.*(down|up)_proj)(.*)\.q_(.*)$": {"bits": 8}}
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: layer(bits=8), MLP: layer()}, settings))
    assert checkpoint.layers[ATTENTION].settings.bits == 8 and checkpoint.layers[MLP].settings.bits == 4


def test_tensors_are_followed_where_dynamic_and_lm_head_say_otherwise(tmp_path):
    settings = {"bits": 4, "group_size": 128, "dynamic": {"-:.*mlp": {}}, "lm_head": True}
    layers = {ATTENTION: layer(), MLP: layer(seed=1), "model.layers.1.self_attn.q_proj": {"weight": torch.ones(4, 4)}}
    checkpoint = open_checkpoint(write(tmp_path, layers, settings))
    same(parts_of(checkpoint, MLP), layer(seed=1))
    assert [w.split(" (")[0] for w in checkpoint.warnings] == [
        f"dynamic says that {MLP} is not packed",
        "lm_head is true, but the output layer is not packed; the tensors are followed",
        "model.layers.1.self_attn.q_proj is not packed, unlike its like in other blocks",
    ]
    assert "model.layers.1.self_attn.q_proj.weight" in checkpoint.plain_tensors()
    settings["dynamic"] = {"-:model.layers.1": {}}
    checkpoint = open_checkpoint(write(tmp_path, layers, settings))
    assert len(checkpoint.warnings) == 1
    layers[MLP]["weight"] = torch.ones(128, 256)
    refuses(write(tmp_path, layers, settings), FormatError, f"{MLP}.weight: expected a layer that is either packed or")


def test_a_packed_output_layer(tmp_path):
    expected = layer(columns=96, bits=8)
    for settings in ({"lm_head": True}, {}, {"lm_head": False}):
        settings = {"bits": 4, "group_size": 128, "dynamic": {"lm_head": {"bits": 8}}} | settings
        checkpoint = open_checkpoint(write(tmp_path, {MLP: layer(), "lm_head": expected}, settings))
        same(parts_of(checkpoint, "lm_head"), expected)
        assert checkpoint.warnings == []


# The ordinary layout: versions, g_idx, values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 96, 128])
def test_the_ordinary_layout(tmp_path, bits, version, sym, group_size):
    expected = layer(bits=bits, group_size=group_size, sym=sym, checkpoint_format=version)
    settings = {"bits": bits, "group_size": group_size, "sym": sym, "checkpoint_format": version}
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: expected}, settings))
    same(parts_of(checkpoint), expected)
    assert checkpoint.warnings == []
    found = checkpoint.layers[ATTENTION]
    assert (found.in_features, found.out_features, found.has_bias, found.has_g_idx) == (256, 128, False, True)


def test_static_groups_need_no_g_idx(tmp_path):
    parts = layer()
    bare = {part: tensor for part, tensor in parts.items() if part != "g_idx"}
    settings = {"bits": 4, "group_size": 128, "desc_act": True}
    refuses(write(tmp_path, {ATTENTION: bare}, settings), FormatError, "g_idx: expected a tensor", "desc_act is true")
    for static in ({"static_groups": True}, {"meta": {"static_groups": True}}):
        checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: bare}, settings | static))
        same(parts_of(checkpoint), bare)
        assert not checkpoint.layers[ATTENTION].has_g_idx and checkpoint.warnings == []
        checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: parts}, settings | static))
        same(parts_of(checkpoint), parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(qweight=p["qweight"].long()), "qweight: expected torch.int32, found torch.int64"),
        (lambda p: p.update(qweight=p["qweight"].view(torch.float32)), "qweight: expected torch.int32"),
        (lambda p: p.update(qzeros=p["qzeros"][:1]), "qzeros: expected shape [2, 16]"),
        (lambda p: p.update(scales=p["scales"].int()), "scales: expected a floating-point dtype"),
        (lambda p: p.update(scales=p["scales"].t()), "scales: expected shape [2, 128]"),
        (lambda p: p.update(scales=p["scales"].float() * 1e7), "scales: expected numbers that float16 can hold"),
        (lambda p: p.update(scales=p["scales"].bfloat16() * float("inf")), "found NaN or infinity"),
        (lambda p: p["scales"].fill_(float("nan")), "scales: expected finite numbers"),
        (lambda p: p.update(g_idx=p["g_idx"].float()), "g_idx: expected torch.int32, found torch.float32"),
        (lambda p: p.update(g_idx=p["g_idx"][:-1]), "g_idx: expected shape [256]"),
        (lambda p: p.update(g_idx=p["g_idx"] - 1), "group numbers from 0 to 1, found -1 to 0"),
        (lambda p: p.update(bias=torch.zeros(127)), "bias: expected shape [128]"),
        (lambda p: p.update(qweight=p["qweight"][:0]), "in_features: expected a multiple of 8"),
        (lambda p: p.update(qweight=p["qweight"][0]), "qweight: expected [1 * n, N] words"),
        (lambda p: p.pop("qzeros"), "qzeros: expected a tensor of this name, found none"),
    ],
)
def test_a_faulty_layer(tmp_path, change, message):
    parts = layer()
    change(parts)
    folder = write(tmp_path, {MLP: layer(), ATTENTION: parts}, {"bits": 4, "group_size": 128})
    refuses(folder, FormatError, f"{ATTENTION}.", message, "model.safetensors")


def test_zero_points_tell_their_format(tmp_path):
    planar = dict(layer(bits=3))
    planar["qzeros"] = torch.tensor([0, 0, -1], dtype=torch.int32).repeat(2, 4)
    cases = (
        ("gptq", "gptq_v2", layer(bits=3, checkpoint_format="gptq_v2")),
        ("gptq_v2", "gptq", layer(bits=3)),
        ("gptq_p", "gptq", layer(bits=3)),
        ("gptq", "gptq_p", planar),
    )
    for said, true, parts in cases:
        folder = write(tmp_path, {ATTENTION: parts}, {"bits": 3, "group_size": 128, "checkpoint_format": said})
        checkpoint = open_checkpoint(folder)
        expected = f"checkpoint_format is {said}, but the zero points are {true}'s; {true} is used"
        assert checkpoint.warnings == [expected]
        raw = {"gptq_p": "gptq_v2"}.get(true, true)
        assert checkpoint.quantize_config.raw["checkpoint_format"] == raw
        assert checkpoint.layers[ATTENTION].encoding == ("gptq_p" if true == "gptq_p" else "gptq")


# Planar


def to_planes(codes):
    """3-bit codes [K, N] as GPTQModel's gptq_p has them, code by code."""
    words = np.zeros((codes.shape[0] // 32, 3, codes.shape[1]), dtype=np.uint32)
    for k, row in enumerate(codes.numpy().astype(np.uint32)):
        block, i = divmod(k, 32)
        words[block, i // 16] |= (row & 3) << (2 * (i % 16))
        words[block, 2] |= (row >> 2) << i
    return torch.from_numpy(words.reshape(-1, codes.shape[1]).view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_planar(tmp_path, bits, sym):
    rows = 4224  # more than are converted at once
    expected = layer(rows=rows, columns=64, bits=bits, sym=sym, checkpoint_format="gptq_v2")
    parts = dict(expected)
    if bits == 3:
        parts["qweight"] = to_planes(unpack(expected["qweight"], 3))
        parts["qzeros"] = to_planes(unpack(expected["qzeros"], 3, dim=1).t()).t().contiguous()
    settings = {"bits": bits, "group_size": 128, "sym": sym, "format": "gptq_p", "checkpoint_format": "gptq_p"}
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: parts}, settings))
    same(parts_of(checkpoint), expected)
    assert checkpoint.warnings == []
    assert checkpoint.layers[ATTENTION].settings.checkpoint_format == "gptq_v2"
    raw = checkpoint.quantize_config.raw
    assert raw["format"] == raw["checkpoint_format"] == "gptq_v2"
    with checkpoint.reader() as reader:
        assert torch.equal(reader.read_zeros(checkpoint.layers[ATTENTION]), expected["qzeros"])
    if bits == 3:
        assert ropewalk.inspect(tmp_path)["format"] == "gptq_p"
    settings["bits"] = 6
    refuses(write(tmp_path, {ATTENTION: parts}, settings), QuantizeConfigError, "bits 2, 3, 4, 8, found 6")


# Marlin


def to_marlin(parts, grouped):
    """A packed layer as Marlin has it, code by code: see the bits in `ropewalk.loader.marlin`."""
    codes, scales = unpack(parts["qweight"], 4).numpy().astype(np.uint32), parts["scales"]
    rows, columns = codes.shape
    words = np.zeros((rows // 16, columns * 2), dtype=np.uint32)
    for k in range(rows):
        for n in range(columns):
            lane = (n % 8) * 4 + (k % 8) // 2
            slot = (k % 2) * 4 + (n // 8 % 2) * 2 + k // 8 % 2
            words[k // 16, n // 64 * 128 + lane * 4 + n // 16 % 4] |= codes[k, n] << (4 * slot)
    permuted = torch.empty_like(scales)
    for n in range(columns):
        if grouped:
            at = n // 64 * 64 + (n % 8) * 8 + n % 64 // 8
        else:
            at = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
        permuted[:, at] = scales[:, n]
    return {"B": torch.from_numpy(words.view(np.int32)), "s": permuted}


@pytest.mark.parametrize(
    "said",
    [
        {"is_marlin_format": True, "quant_method": "gptq", "checkpoint_format": "gptq"},
        {"checkpoint_format": "marlin", "format": "marlin", "desc_act": False},
        {"quant_method": "marlin"},
        None,
    ],
)
@pytest.mark.parametrize("group_size", [-1, 128, 256])
def test_marlin(tmp_path, said, group_size):
    expected = layer(columns=128, group_size=group_size)
    parts = to_marlin(expected, grouped=group_size == 128)
    del expected["g_idx"]
    parts["bias"] = expected["bias"] = torch.arange(128).half()
    settings = None if said is None else said | {"bits": 4, "group_size": group_size, "sym": True}
    if settings is None and group_size == 256:
        group_size = -1  # which is the same
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: parts}, settings))
    same(parts_of(checkpoint), expected)
    found = checkpoint.layers[ATTENTION]
    assert (found.in_features, found.out_features, found.has_bias, found.has_g_idx) == (256, 128, True, False)
    assert found.settings.checkpoint_format == "gptq" and found.encoding == "marlin"
    raw = checkpoint.quantize_config.raw
    assert "is_marlin_format" not in raw and raw["sym"] and not raw["desc_act"]
    assert {raw[k] for k in ("checkpoint_format", "format", "quant_method") if k in raw} <= {"gptq"}
    assert (raw["bits"], raw["group_size"]) == (4, group_size)
    assert len(checkpoint.warnings) == (said is None)
    assert ropewalk.inspect(tmp_path)["format"] == "marlin"
    assert ropewalk.inspect(tmp_path)["sym"]


def test_marlin_where_the_config_and_the_tensors_differ(tmp_path):
    expected = layer()
    marlin = to_marlin(expected, grouped=True)
    settings = {"bits": 4, "group_size": 128, "sym": True}
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: marlin}, settings))
    assert "does not say marlin, but the tensors are Marlin's" in checkpoint.warnings[0]
    same(parts_of(checkpoint), {part: expected[part] for part in ("qweight", "qzeros", "scales")})
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: expected}, settings | {"is_marlin_format": True}))
    assert "there are no Marlin tensors" in checkpoint.warnings[0]
    same(parts_of(checkpoint), expected)
    settings = settings | {"is_marlin_format": True}
    for change, message in (
        ({"B": marlin["B"].long()}, "B: expected torch.int32"),
        ({"B": marlin["B"][:, :96]}, "B: expected shape [K / 16, 2 N] with N a multiple of 64"),
        ({"s": marlin["s"][:1]}, "s: expected shape [2, 128] (group_size 128), found [1, 128]"),
        ({"s": marlin["s"].int()}, "s: expected a floating-point dtype"),
        ({"s": marlin["s"] * float("nan")}, "finite"),
        ({"bias": torch.zeros(3)}, "bias: expected shape [128]"),
    ):
        refuses(write(tmp_path, {ATTENTION: {**marlin, **change}}, settings), FormatError, message)
    refuses(write(tmp_path, {ATTENTION: marlin}, settings | {"desc_act": True}), FormatError, "Marlin has no act-order")


# GPTQ-for-LLaMa


def to_float_zeros(parts, bits, dtype=torch.float32):
    """A layer without groups as GPTQ-for-LLaMa had it until March 2023: W = scale * code - zeros."""
    zeros = unpack(zeros_v1_to_v2(parts["qzeros"], bits), bits, dim=1)
    scales = parts["scales"].to(dtype)
    return {
        "qweight": parts["qweight"],
        "zeros": (zeros * scales).t(),
        "scales": scales.t(),
        "bias": torch.zeros(parts["qweight"].shape[1], dtype=dtype),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_float_zeros(tmp_path, bits, sym, dtype, suffix):
    expected = layer(bits=bits, group_size=-1, sym=sym)
    parts = to_float_zeros(expected, bits, dtype)
    folder = write(tmp_path, {ATTENTION: parts}, None, file=f"llama-7b-{bits}bit{suffix}")
    checkpoint = open_checkpoint(folder)
    found = parts_of(checkpoint)
    assert found.pop("bias").shape == (128,)
    assert torch.equal(found.pop("scales"), expected["scales"].to(dtype))
    version = checkpoint.layers[ATTENTION].settings.checkpoint_format
    zeros = found["qzeros"] if version == "gptq" else zeros_v2_to_v1(found["qzeros"], bits)
    assert torch.equal(zeros, expected["qzeros"]) and torch.equal(found["qweight"], expected["qweight"])
    assert f"bits {bits} (by the name llama-7b-{bits}bit{suffix})" in checkpoint.warnings[0]
    assert checkpoint.quantize_config.sym == sym
    has_zero = bool((unpack(zeros_v1_to_v2(expected["qzeros"], bits), bits, dim=1) == 0).any())
    assert version == ("gptq_v2" if has_zero else "gptq")
    # the formula of the time
    weight = parts["scales"].double() * unpack(parts["qweight"], bits).t() - parts["zeros"].double()
    ours = (unpack(expected["qweight"], bits).double() - unpack(zeros_v1_to_v2(expected["qzeros"], bits), bits, 1)) * (
        expected["scales"].double()
    )
    assert (weight - ours.t()).abs().max() <= (0 if dtype == torch.float64 else 2**-9) * weight.abs().max()
    assert ropewalk.inspect(tmp_path)["format"] == "gptq-for-llama"


def test_float_zeros_that_cannot_be(tmp_path):
    good = to_float_zeros(layer(group_size=-1), 4)
    for change, message in (
        ({"zeros": good["zeros"] + 0.3 * good["scales"]}, "zeros: expected zero points times scales"),
        ({"zeros": -good["zeros"]}, "found a zero point of -8"),
        ({"zeros": good["zeros"] * float("nan")}, "found a zero point of nan"),
        ({"zeros": good["zeros"].t()}, "zeros: expected shape [128, 1], found [1, 128]"),
        ({"zeros": good["zeros"].int()}, "zeros: expected a floating-point dtype"),
        ({"scales": good["scales"][:, 0]}, "scales: expected a tensor of 2 dimensions, found shape [128]"),
        ({"bias": good["bias"][1:]}, "bias: expected shape [128]"),
    ):
        folder = write(tmp_path, {ATTENTION: {**good, **change}}, None, file="model-4bit.safetensors")
        refuses(folder, FormatError, message)
        (folder / "model-4bit.safetensors").unlink()
    folder = write(tmp_path, {ATTENTION: good}, None)
    refuses(folder, FormatError, "there are no groups", bits=4, group_size=128)
    # a column of zeros
    good["scales"][3], good["zeros"][3] = 0, 0
    folder = write(tmp_path, {ATTENTION: good}, None)
    assert torch.isfinite(parts_of(open_checkpoint(folder, bits=4))["scales"]).all()


def test_bits_that_only_the_sizes_tell(tmp_path):
    good = to_float_zeros(layer(group_size=-1), 4)
    refuses(write(tmp_path, {ATTENTION: good}, None), QuantizeConfigError, "or bits=", "a choice of [2, 3, 4, 8]")
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: good}, None, hidden_size=256, intermediate_size=800))
    assert "bits 4 (by the sizes in config.json), group_size -1 (one row of scales)" in checkpoint.warnings[0]
    write(tmp_path, {ATTENTION: good}, None, hidden_size=256, intermediate_size=128)
    refuses(tmp_path, QuantizeConfigError, "a choice of [4, 8]")
    assert open_checkpoint(tmp_path, bits=4).layers[ATTENTION].in_features == 256
    # a name that the sizes deny
    (tmp_path / "model.safetensors").rename(tmp_path / "x-2bit.safetensors")
    refuses(tmp_path, QuantizeConfigError, "a choice of [4, 8]")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("with_g_idx", [False, True])
@pytest.mark.parametrize("group_size", [128, -1])
def test_gptq_for_llama_with_qzeros(tmp_path, suffix, with_g_idx, group_size):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3)) if with_g_idx else None
    expected = layer(group_size=group_size, order=order) | {"bias": torch.zeros(128)}
    expected["scales"] = expected["scales"].float()
    if not with_g_idx:
        del expected["g_idx"]
    name = "4bit-128g" if group_size == 128 else "4bit"
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: expected}, None, file=name + suffix))
    same(parts_of(checkpoint), expected)
    found = checkpoint.layers[ATTENTION]
    assert found.has_bias and found.has_g_idx == with_g_idx
    assert (found.settings.bits, found.settings.group_size) == (4, group_size)
    assert found.settings.desc_act == (with_g_idx and group_size == 128)
    assert "no quantize_config.json: bits 4 (by the shapes), group_size" in checkpoint.warnings[0]
    assert open_checkpoint(tmp_path, bits=4, group_size=group_size).quantize_config.group_size == group_size
    refuses(tmp_path, FormatError, "qweight: expected [3 * n, N] words for 3 bits", bits=3)
    refuses(tmp_path, FormatError, "(bits 4, group_size 64)", group_size=64)


def test_group_sizes_that_the_tensors_leave_open(tmp_path):
    bare = {part: tensor for part, tensor in layer(rows=320).items() if part != "g_idx"}  # 128, 128 and 64 rows
    checkpoint = open_checkpoint(write(tmp_path, {ATTENTION: bare}, None))
    assert checkpoint.layers[ATTENTION].settings.group_size == 128
    open_either_way = {part: tensor for part, tensor in layer(rows=2080, group_size=1040).items() if part != "g_idx"}
    folder = write(tmp_path, {ATTENTION: open_either_way}, None)
    assert open_checkpoint(folder).layers[ATTENTION].settings.group_size == 1040
    ragged = {part: tensor for part, tensor in layer(rows=200, group_size=72).items() if part != "g_idx"}
    folder = write(tmp_path, {ATTENTION: ragged}, None)
    refuses(folder, QuantizeConfigError, "or group_size=", "3 groups of 200 rows")
    assert open_checkpoint(folder, group_size=72).layers[ATTENTION].settings.group_size == 72
    ordered = layer(rows=200, group_size=72, order=torch.randperm(200))
    found = open_checkpoint(write(tmp_path, {ATTENTION: ordered}, None)).layers[ATTENTION].settings
    assert (found.group_size, found.desc_act) == (72, True)
    two = {part: tensor for part, tensor in layer(rows=288, group_size=256).items() if part != "g_idx"}
    refuses(write(tmp_path, {ATTENTION: two}, None), QuantizeConfigError, "2 groups of 288 rows")  # of 144, or 256
    write(tmp_path, {ATTENTION: ragged}, None)
    (folder / "model.safetensors").rename(folder / "x-4bit-80g.safetensors")
    assert "group_size 80 (by the name" in open_checkpoint(folder).warnings[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-7b-4bit-128g", (4, 128)),
        ("4bit-128g", (4, 128)),
        ("4bit", (4, None)),
        ("gptq_model-4bit--1g", (4, -1)),
        ("gptq_model-3bit-32g", (3, 32)),
        ("GPT4All-13B-GPTQ-4bit-128g.compat.no-act-order.latest", (4, 128)),
        ("vicuna-13B-1.1-GPTQ-4bit-128g.no-act-order", (4, 128)),
        ("opt-8bit", (8, None)),
        ("pytorch_model", (None, None)),
        ("model-00001-of-00002", (None, None)),
        ("llama-13bits", (None, None)),
    ],
)
def test_what_a_name_tells(name, expected):
    assert bits_and_group_in(name) == expected


def test_opening_is_quick(tmp_path):
    """It runs at every load: what it does besides reading scales takes some 0.1 ms a layer."""
    layers = {f"model.layers.{i}.q_proj": layer(rows=128, columns=64) for i in range(280)}
    write(tmp_path, layers, {"bits": 4, "group_size": 128, "dynamic": {r".*\.999\.": {"bits": 8}}})
    seconds = []
    for _ in range(5):
        start = time.process_time()
        open_checkpoint(tmp_path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5


# Other programs' packers, where they are installed (`make oracle`)


def test_gptqmodels_planes():
    planes = pytest.importorskip("gptqmodel.utils.planar_packing", reason="GPTQModel is not installed")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (4224, 96), generator=generator)
    zeros = torch.randint(0, 8, (33, 96), generator=generator)
    words = planes.planar_pack_rows(codes, 3)
    assert torch.equal(words, to_planes(codes))
    assert torch.equal(join_planes(words), pack(codes, 3))
    assert torch.equal(join_planes(planes.planar_pack_cols(zeros, 3).t()).t(), pack(zeros, 3, dim=1))


def test_gptqmodels_dynamic():
    config = pytest.importorskip("gptqmodel.quantization.config", reason="GPTQModel is not installed")
    names = [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.o_proj", "mlp.up_proj")] + ["lm_head"]
    patterns = [r".*\.1\..*", r"+:.*\.[1-3]\.mlp", "-:.*o_proj", r"^model\.layers\.5\.mlp\.up_proj$", "up_proj"]
    patterns += [r"-:model\.layers\.4", "-:lm_head$", "+:^lm_head$", r"-:.*\.11\..*(up|down)_proj", "+:model.layers.7"]
    for seed in range(40):
        chosen = random.Random(seed).sample(patterns, 1 + seed % 6)
        dynamic = {p: {} if p.startswith("-") else {"bits": 8, "mse": i} for i, p in enumerate(chosen)}
        theirs = config.QuantizeConfig(bits=4, group_size=128, dynamic=dynamic)
        rules = match_rules(parse_dynamic(dynamic, "here"), names, "here")
        for name in names:
            rule = rules.get(name)
            ours = None if rule is None else False if rule.excludes else rule.overrides
            assert theirs.dynamic_get(name) == ours


AUTOGPTQ = os.environ.get("ROPEWALK_AUTOGPTQ")
AUTOGPTQ_PACKS = """
import sys, torch
torch.cuda.get_device_capability = lambda *device: (8, 0)  # which only its constructor asks for
from auto_gptq.nn_modules.qlinear.qlinear_marlin import QuantLinear
from safetensors.torch import load_file, save_file
given = load_file(sys.argv[1])
linear = torch.nn.Linear(*reversed(given["weight"].shape), bias=False).half()
linear.weight.data = given["weight"]
packed = QuantLinear(4, int(sys.argv[3]), linear.in_features, linear.out_features, False)
packed.pack(linear, given["scales"])
save_file({"B": packed.B, "s": packed.s}, sys.argv[2])
"""


@pytest.mark.skipif(AUTOGPTQ is None, reason="ROPEWALK_AUTOGPTQ names no interpreter; `make oracle` does")
@pytest.mark.parametrize("group_size", [128, 512])
def test_autogptqs_marlin(tmp_path, group_size):
    expected = layer(rows=512, columns=256, group_size=group_size)
    codes, scales = unpack(expected["qweight"], 4).float(), expected["scales"]
    weight = ((codes - 8) * scales.float().repeat_interleave(group_size, dim=0)).half().t().contiguous()
    save_file({"weight": weight, "scales": scales.t().contiguous()}, tmp_path / "given")
    command = [AUTOGPTQ, "-c", AUTOGPTQ_PACKS, str(tmp_path / "given"), str(tmp_path / "packed"), str(group_size)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    settings = {"bits": 4, "group_size": group_size, "is_marlin_format": True, "sym": True}
    folder = write(tmp_path / "model", {ATTENTION: load_file(tmp_path / "packed")}, settings)
    same(parts_of(open_checkpoint(folder)), {part: expected[part] for part in ("qweight", "scales", "qzeros")})
