"""vLLM as it is published, with no plug-in, computes what is meant from a folder that `ropewalk export` wrote."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import ropewalk
from ropewalk.loader.rotary import frequencies_of

pytest.importorskip("vllm")

ORIGINAL, LONGEST, PROMPT, NEW = 32, 128, 48, 60

# What a user of vLLM runs who does not have ropewalk. First what the parts of an engine make of several configs, then
# an engine with all defaults.
STOCK = """
import json, sys
from types import SimpleNamespace

import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope
from vllm.transformers_utils.config import get_config

folders, prompt, new = json.loads(sys.argv[1])
found = {"lengths": {}}
getter = phi3_long_rope_scaled_rope.get_current_vllm_config
for folder in folders:
    config = get_config(folder, trust_remote_code=False)
    model = SimpleNamespace(max_model_len=config.max_position_embeddings)
    phi3_long_rope_scaled_rope.get_current_vllm_config = lambda: SimpleNamespace(model_config=model)
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            config.hidden_size // config.num_attention_heads,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            dtype=torch.float32,
        )
    table = rope.long_short_cos_sin_cache if hasattr(rope, "long_short_cos_sin_cache") else rope.cos_sin_cache
    torch.save(table, folder + ".table")
phi3_long_rope_scaled_rope.get_current_vllm_config = getter
llm = LLM(folders[0], dtype="float32", skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False)
found["max_model_len"] = llm.llm_engine.model_config.max_model_len
sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
(output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
found["tokens"] = list(output.outputs[0].token_ids)
assert not any(name.startswith("ropewalk") for name in sys.modules)
print("FOUND " + json.dumps(found))
"""

AIROPHIN = {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": LONGEST, "rope_scaling": None}
PLAIN = {"max_position_embeddings": LONGEST, "rope_scaling": None}
ROPES = {
    "airophin": (AIROPHIN, "auto"),
    "a quarter of each head": ({**PLAIN, "partial_rotary_factor": 0.25}, "partial-ntk:factor=4,original=32"),
    "NTK by parts": (PLAIN, "ntk-by-parts:factor=4,original=32"),
    "NTK of 2023": ({**PLAIN, "ntk_alpha": 2}, "auto"),
    "linear": ({**PLAIN, "rope_scaling": {"type": "linear", "factor": 2}}, "auto"),  # whole: vLLM fails for it
    "linear of 2023": ({**PLAIN, "position_interpolation_scale": 0.25}, "auto"),
    "YaRN": (AIROPHIN, "yarn:4"),
    "llama3": (AIROPHIN, "llama3:factor=4,low_freq_factor=1,high_freq_factor=4"),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory, make_float_model):
    """Return (name -> (folder, folder exported, what `ropewalk.export` returned), prompt, what vLLM made of them)."""
    root = tmp_path_factory.mktemp("vllm")
    plain, model, weights = make_float_model("airophin", num_key_value_heads=1)
    plain = {k: v for k, v in plain.items() if k not in AIROPHIN}
    made = {}
    for i, (name, (said, rope)) in enumerate(ROPES.items()):
        folder = root / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**plain, **said, "architectures": [type(model).__name__]}))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        made[name] = (folder, root / f"{i}-out", ropewalk.export(folder, root / f"{i}-out", rope=rope))
    prompt = torch.randint(3, 96, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "",  # none is loaded, ours among them
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    work = json.dumps([[str(out) for _, out, _ in made.values()], prompt, NEW])
    done = subprocess.run(
        [sys.executable, "-c", STOCK, work], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return made, prompt, json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize("name", ROPES)
def test_tables(stock, name):
    """Cosine and sine of every position, in float32, against float64: the largest angle has 128 rad, whose rounding is
    2^-18, and vLLM rounds the frequency and the angle.
    """
    _, out, found = stock[0][name]
    table = torch.load(f"{out}.table").double()
    model = ropewalk.load(stock[0][name][0], rope=ROPES[name][1])[0].config
    inv_freq, scaling = frequencies_of(model)
    angles = torch.arange(found["context"], dtype=torch.float64)[:, None] * inv_freq.double()
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1) * scaling
    assert table.shape[0] >= found["context"] and table.shape[1] == expected.shape[1]
    assert (table[: found["context"]] - expected).abs().max() <= 2**-15
    if found["rope_written"]["type"] == "longrope":  # there, both sets; and both are the same
        assert torch.equal(table[:LONGEST], table[LONGEST : 2 * LONGEST]) and len(table) == 2 * LONGEST


def test_the_engine(stock):
    """The whole context without any option, and beyond the original one the tokens that transformers writes."""
    made, prompt, found = stock
    assert found["max_model_len"] == LONGEST

    def greedy(rope):
        model = ropewalk.load(made["airophin"][0], rope=rope)[0]
        ids = torch.tensor([prompt])
        return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, PROMPT:].tolist()

    assert found["tokens"] == greedy("auto")
    assert found["tokens"] != greedy("none")  # other ropes write others
