"""`load_in_4bit`: a float16 checkpoint, quantized by bitsandbytes as it is loaded, with the rope that it means."""

import json
import sys

import pytest
import torch

import ropewalk
from ropewalk.errors import MissingPackageError, UsageError
from ropewalk.loader.bitsandbytes import keep_ragged_layers, load_arguments
from ropewalk.loader.checkpoint import open_checkpoint

bnb = pytest.importorskip("bitsandbytes")

ROPE = {"rope_type": "partial-ntk", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
IDS = torch.arange(3, 90)[None]


def quantized(folder, dtype=torch.float32, **options):
    arguments = load_arguments(open_checkpoint(folder), dtype)
    model, _ = ropewalk.load(folder, device_map="cpu", dtype=dtype, **arguments, **options)
    keep_ragged_layers(model)
    return model


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}


def dequantized(model, weights):
    """Return the weights with those that bitsandbytes packed as it unpacks them; before the first call."""
    found = dict(weights)
    for name, layer in packed(model).items():
        assert layer.weight.quant_state.nested and layer.weight.quant_type == "nf4"
        found[f"{name}.weight"] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_logits_are_those_of_the_dequantized_weights_with_the_right_rope(
    tmp_path, make_plain, reference_model, dtype
):
    weights = make_plain(tmp_path)
    model = quantized(tmp_path, dtype)
    assert len(packed(model)) == 14 and "lm_head" not in packed(model)
    assert all(layer.compute_dtype == dtype for layer in packed(model).values())
    assert model.config.rope_parameters == ROPE
    rounded = dequantized(model, weights)
    with torch.inference_mode():
        found = model(IDS).logits.float()
        expected = reference_model(tmp_path, rounded, ROPE)(IDS).logits
        unscaled = reference_model(tmp_path, rounded, {"rope_type": "default", "rope_theta": 1e4})(IDS).logits
        original = reference_model(tmp_path, weights, ROPE)(IDS).logits
    # bfloat16 whatever the dtype on a processor that has AVX512-BF16
    error = (found - expected).std() / expected.std()
    assert error < 0.03
    assert error < 0.2 * (unscaled - expected).std() / expected.std()
    assert (found - original).std() < 0.5 * original.std()


def test_an_override_of_the_rope(tmp_path, make_plain):
    make_plain(tmp_path)
    assert quantized(tmp_path, rope="linear:2").config.rope_parameters["rope_type"] == "linear"


def test_layers_of_any_size_compute(tmp_path, make_plain):
    """down_proj has 96 inputs here, one block and a half, which stops bitsandbytes 0.50 on some processors."""
    make_plain(tmp_path)
    model = quantized(tmp_path)
    for layer in packed(model).values():
        assert not layer.support_avx512bf16_for_cpu or layer.in_features % 64 == 0
    assert model(IDS).logits.isfinite().all()


def test_lora_trains_on_it(tmp_path, make_plain):
    peft = pytest.importorskip("peft")
    make_plain(tmp_path)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(quantized(tmp_path)), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_a_packed_checkpoint_is_packed_already(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"found a checkpoint that is packed in 4 bits already .*without load_in_4bit"):
        load_arguments(open_checkpoint(tmp_path), torch.float32)


@pytest.mark.parametrize("found", [None, "0.40.0"])
def test_no_bitsandbytes(tmp_path, make_plain, monkeypatch, found):
    make_plain(tmp_path)
    from importlib import metadata

    from transformers import utils

    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(utils, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(metadata, "version", version)
    expected = r"\(pip install 'ropewalk\[bitsandbytes\]'\), found " + ("none" if found is None else "version 0.40.0")
    with pytest.raises(MissingPackageError, match=expected):
        load_arguments(open_checkpoint(tmp_path), torch.float32)


def test_bitsandbytes_is_not_imported_for_the_config(tmp_path, make_plain, monkeypatch):
    make_plain(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = load_arguments(open_checkpoint(tmp_path), torch.bfloat16)["quantization_config"]
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert json.loads(config.to_json_string())["bnb_4bit_quant_type"] == "nf4"
