"""Compute logits with a program that was not written here: GPTQModel or AutoGPTQ, in its own environment.

    python oracle_logits.py gptqmodel|autogptq FOLDER IDS OUT

IDS is a .safetensors file with `ids` [1, T]; OUT gets `logits` [1, T, vocabulary], float32. Both programs build
the model with transformers' default rotary embedding. Nothing of ropewalk is imported.
"""

import sys

import torch
from safetensors.torch import load_file, save_file


def load_with_gptqmodel(folder):
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


def load_with_autogptq(folder):
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(folder, device="cpu", use_safetensors=True).model


def main():
    program, folder, ids, out = sys.argv[1:]
    model = {"gptqmodel": load_with_gptqmodel, "autogptq": load_with_autogptq}[program](folder)
    packed = [
        name for name, module in model.named_modules() if type(module).__name__.endswith(("Linear", "QuantLinear"))
    ]
    # Both compute in float16 by default; in float32 a wrong bit cannot hide behind rounding.
    model = model.float().eval()
    with torch.no_grad():
        logits = model(load_file(ids)["ids"], use_cache=False).logits.float()
    save_file({"logits": logits.contiguous()}, out)
    kinds = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
    assert not [name for name in sys.modules if name.partition(".")[0] == "ropewalk"]
    print(f"{program}: {len(packed)} linear layers, packed ones of {kinds}")


if __name__ == "__main__":
    main()
