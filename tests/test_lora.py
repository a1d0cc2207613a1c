"""LoRA on a packed base: loading an adapter, and its gradient through the packed layers."""

import pytest
import torch

import ropewalk
from ropewalk.errors import MissingFileError

peft = pytest.importorskip("peft")


def adapter(base_folder, weights, reference_model, out):
    """Train nothing: write an adapter with random factors, made on the plain model as its makers would."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    rope = {"rope_type": "partial-ntk", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    plain = reference_model(base_folder, weights, rope)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    return model.eval()


def test_an_adapter_made_on_float_weights_loads_on_the_packed_base(tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path / "base")
    expected = adapter(tmp_path / "base", weights, reference_model, tmp_path / "lora")
    model, _ = ropewalk.load(tmp_path / "base", lora=tmp_path / "lora")
    ids = torch.arange(3, 90)[None]
    with torch.inference_mode():
        found = model(ids).logits
        assert (found - expected(ids).logits).abs().max() < 1e-4
        with model.disable_adapter():
            assert (model(ids).logits - found).abs().max() > 1e-2


def test_gradients_reach_the_adapter(tmp_path, make_checkpoint):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.gptq import GPTQLoraLinear

    make_checkpoint(tmp_path)
    base, _ = ropewalk.load(tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({ropewalk.QuantLinear: GPTQLoraLinear})
    model = get_peft_model(base, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_no_adapter_in_the_folder(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "base")
    with pytest.raises(MissingFileError, match=r"a PEFT adapter \(adapter_config.json\), found none"):
        ropewalk.load(tmp_path / "base", lora=tmp_path)
