"""Format x architecture x bits: each cell is a folder written so, loaded, and computing what its weights compute in
plain transformers. How each format is read, bit for bit, is in test_formats.py; the real models' proportions are in
test_architectures.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ropewalk
from ropewalk.gptq.format import dequantize, unpack, zeros_v1_to_v2
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.quant_linear import QuantLinear

ARCHITECTURES = ["airophin", "codellama", "orca", "mistral", "qwen2", "mpt", "mixtral"]
PARTIAL = {"rope_type": "partial-ntk", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# Marlin's tiles are 64 columns wide; groups of 32 leave several to each layer.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
MPT_SIZES = {"d_model": 128, "n_heads": 4}

FORMATS = {
    # name -> (bits, arguments of make_checkpoint)
    "AutoGPTQ v1": ((2, 3, 4, 8), {}),
    "AutoGPTQ v1, no groups, asymmetric": ((3, 4), {"group_size": -1, "sym": False}),
    "v2, config.json": ((2, 3, 4, 8), {"checkpoint_format": "gptq_v2", "sym": False, "config_in": "config.json"}),
    "quant_config.json, 2023's file name": ((4,), {"config_in": "quant_config.json"}),
    "static groups": ((4,), {"desc_act": False}),
    "shards": ((4,), {}),
    "one file by its name": ((4,), {}),
    "dynamic": ((4,), {}),
    "packed output embedding": ((4,), {}),
    "GPTQ-for-LLaMa v1 .pt": ((2, 3, 4, 8), {"group_size": -1, "desc_act": False, "sym": False}),
    "GPTQ-for-LLaMa v2 .safetensors": ((4,), {"desc_act": False}),
    "GPTQ-for-LLaMa v3 .pt": ((2, 3, 4, 8), {}),
    "Marlin": ((4,), {"group_size": -1, "desc_act": False}),
    "planar": ((3,), {"checkpoint_format": "gptq_v2"}),
}
# transformers' own from_pretrained, with the patch, is asked for these.
CELL_BITS = {name: max(bits for bits in every if bits < 8) for name, (every, _) in FORMATS.items()}
CELLS = [(name, arch, bits) for name, (every, _) in FORMATS.items() for arch in ARCHITECTURES for bits in every]


def packed_layers(tensors):
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def rewrite(folder, change, file="model.safetensors", settings=True):
    """Write the tensors anew as another format has them; without settings the file's name must do."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for layer in packed_layers(tensors):
        parts = {p: tensors.pop(f"{layer}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")}
        changed = {f"{layer}.{part}": tensor.contiguous() for part, tensor in change(parts).items()}
        tensors = changed | tensors  # a bias that is there stays
    save = save_file if file.endswith(".safetensors") else torch.save
    save(tensors, folder / file)
    if not settings:
        (folder / "quantize_config.json").unlink()
    return folder


def with_bias(parts):
    """GPTQ-for-LLaMa gave every layer one."""
    return parts | {"bias": torch.zeros(parts["qweight"].shape[1])}


def float_zeros(bits):
    def change(parts):
        zeros = unpack(zeros_v1_to_v2(parts["qzeros"], bits), bits, dim=1)
        scales = parts["scales"].float()
        return with_bias({"qweight": parts["qweight"], "zeros": (zeros * scales).t(), "scales": scales.t()})

    return change


def marlin(parts):
    """The places of a tile's codes, as Marlin's threads read them: see `ropewalk.loader.marlin`."""
    codes = unpack(parts["qweight"], 4).long()
    k, n = torch.meshgrid(torch.arange(codes.shape[0]), torch.arange(codes.shape[1]), indexing="ij")
    column = n // 64 * 128 + ((n % 8) * 4 + (k % 8) // 2) * 4 + n // 16 % 4
    shift = 4 * ((k % 2) * 4 + (n // 8 % 2) * 2 + k // 8 % 2)
    words = torch.zeros(codes.shape[0] // 16, codes.shape[1] * 2, dtype=torch.int64)
    words.index_put_((k // 16, column), codes << shift, accumulate=True)
    at = torch.arange(codes.shape[1])
    scales = torch.empty_like(parts["scales"])
    scales[:, at // 32 * 32 + at % 8 // 2 * 8 + at % 32 // 8 * 2 + at % 2] = parts["scales"]
    return {"B": words.to(torch.int32), "s": scales}


def planes(words):
    codes = unpack(words, 3).long().unflatten(0, (-1, 32))
    place = torch.arange(16)[:, None] * 2
    low = ((codes & 3).unflatten(1, (2, 16)) << place).sum(2)
    high = ((codes >> 2) << torch.arange(32)[:, None]).sum(1, keepdim=True)
    return torch.cat((low, high), dim=1).flatten(0, 1).to(torch.int32)


def planar(parts):
    zeros = planes(parts["qzeros"].t().contiguous()).t()
    return parts | {"qweight": planes(parts["qweight"]), "qzeros": zeros}


def edit(folder, **changes):
    path = folder / "quantize_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def dynamic(folder, make_checkpoint, arguments, weights):
    """One kind of layer in 8 bits with groups of 64, another not packed; the rest as it was."""
    other = folder.parent / "other"
    finer = make_checkpoint(other, **(arguments | {"bits": 8, "group_size": 64}))
    tensors, from_other = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    for layer in packed_layers(tensors):
        if layer.endswith(("Wqkv", "q_proj")):
            tensors |= {n: t for n, t in from_other.items() if n.startswith(f"{layer}.")}
            weights[f"{layer}.weight"] = finer[f"{layer}.weight"]
        elif layer.endswith(("out_proj", "o_proj")):
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{layer}.{part}"]
            tensors[f"{layer}.weight"] = weights[f"{layer}.weight"].half()
            weights[f"{layer}.weight"] = tensors[f"{layer}.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    edit(folder, dynamic={r"+:.*(Wqkv|q_proj)$": {"bits": 8, "group_size": 64}, r"-:.*(out_proj|o_proj)$": {}})


def packed_head(folder, weights):
    tensors = load_file(folder / "model.safetensors")
    packed = quantize_rtn(tensors.pop("lm_head.weight"), bits=4, group_size=32)
    zeros = zeros_v1_to_v2(packed["qzeros"], 4)
    dense = dequantize(packed["qweight"], packed["scales"], zeros, None, bits=4, group_size=32)
    weights["lm_head.weight"] = dense.t().contiguous()
    save_file(tensors | {f"lm_head.{part}": tensor for part, tensor in packed.items()}, folder / "model.safetensors")
    edit(folder, lm_head=True)


@pytest.mark.parametrize(("form", "arch", "bits"), CELLS)
def test_cell(tmp_path, make_checkpoint, reference_model, form, arch, bits):
    folder = tmp_path / "model"
    arguments = {"arch": arch, "bits": bits, "sizes": MPT_SIZES if arch == "mpt" else SIZES, **FORMATS[form][1]}
    weights = make_checkpoint(folder, **arguments)
    name = folder
    if form == "shards":
        shards(folder)
    elif form == "quant_config.json, 2023's file name":
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    elif form == "one file by its name":
        name = (folder / "model.safetensors").rename(folder / "some-4bit-32g.safetensors")
        shutil.copy(name, folder / "another-4bit-32g.safetensors")
    elif form == "static groups":
        edit(folder, desc_act=True, static_groups=True)
    elif form == "dynamic":
        dynamic(folder, make_checkpoint, arguments, weights)
    elif form == "packed output embedding":
        if arch == "mpt":
            pytest.skip("MPT has none of its own: it is the input embedding")
        packed_head(folder, weights)
    elif form == "GPTQ-for-LLaMa v1 .pt":
        rewrite(folder, float_zeros(bits), f"model-{bits}bit.pt", settings=False)
    elif form == "GPTQ-for-LLaMa v2 .safetensors":
        rewrite(folder, lambda p: with_bias({n: t for n, t in p.items() if n != "g_idx"}), "model-4bit-32g.safetensors")
        (folder / "quantize_config.json").unlink()
    elif form == "GPTQ-for-LLaMa v3 .pt":
        rewrite(folder, with_bias, f"model-{bits}bit-32g.pt", settings=False)
    elif form == "Marlin":
        rewrite(folder, marlin)
        edit(folder, is_marlin_format=True)
    elif form == "planar":
        rewrite(folder, planar)
        edit(folder, checkpoint_format="gptq_p")

    model, _ = ropewalk.load(name)
    reference = reference_model(folder, weights, PARTIAL if arch == "airophin" else None)
    ids = torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = model(ids).logits, reference(ids).logits
    assert expected.std() > 0.1  # they do depend on the input
    assert (found - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
    if bits == CELL_BITS[form] and arch in ("airophin", "mpt", "mixtral") and name == folder:
        ropewalk.patch()
        try:
            by_transformers = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        finally:
            ropewalk.unpatch()
        with torch.inference_mode():
            assert torch.equal(by_transformers(ids).logits, found)
    layers = sum(isinstance(module, QuantLinear) for module in model.modules())
    blocks = 2 * {"mpt": 4, "mixtral": 28}.get(arch, 7)
    assert layers == blocks + {"dynamic": -2, "packed output embedding": 1}.get(form, 0)
