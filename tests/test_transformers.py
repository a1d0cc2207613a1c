"""transformers with `ropewalk.patch()`: what `from_pretrained` takes, what then works as in any model, whose code is
run, and that `unpatch` gives everything back.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StaticCache,
    dynamic_module_utils,
    pipeline,
)

import ropewalk
from ropewalk.errors import CheckpointError, UsageError
from ropewalk.loader.packed_name import is_packed
from ropewalk.loader.quant_linear import QuantLinear

IDS = torch.arange(3, 60)[None]
GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def patched():
    ropewalk.patch()
    yield
    ropewalk.unpatch()


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids).logits


def prompts():
    return torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))


# What from_pretrained takes.


def test_formats_of_gptq_for_llama(tmp_path, make_checkpoint, patched):
    """No settings anywhere, and the weights in a pickle, or beside the folder as text-generation-webui had them."""
    make_checkpoint(tmp_path / "model", file="model-4bit-32g.safetensors", config_in="")
    expected = logits(ropewalk.load(tmp_path / "model")[0])
    weights = load_file(tmp_path / "model" / "model-4bit-32g.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")), expected)
    (tmp_path / "model" / "model-4bit-32g.safetensors").rename(tmp_path / "model-4bit-32g.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")), expected)
    (tmp_path / "model-4bit-32g.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "model-4bit-32g.pt")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")), expected)


def test_a_subfolder_and_a_devicemap_of_modules(tmp_path, make_checkpoint, patched):
    make_checkpoint(tmp_path / "some" / "model", config_in="config.json")
    expected = logits(ropewalk.load(tmp_path / "some" / "model")[0])
    places = {"model": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "some", subfolder="model", device_map=places, dtype=torch.float32, revision="main"
    )
    assert torch.equal(logits(model), expected)
    assert model.config.rope_parameters["rope_type"] == "partial-ntk"


def test_settings_of_the_config_are_taken_and_others_refused(tmp_path, make_checkpoint, patched):
    make_checkpoint(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, use_cache=False, rms_norm_eps=1e-2, dtype=torch.float32)
    assert not model.config.use_cache
    assert model.model.norm.variance_epsilon == 1e-2
    assert (logits(model) - logits(ropewalk.load(tmp_path)[0])).abs().max() > 1e-3
    with pytest.raises(UsageError, match="from_pretrained: expected no key_mapping for a packed model"):
        LlamaForCausalLM.from_pretrained(tmp_path, key_mapping={"a": "b"})


def test_a_folder_with_an_adapter_is_its_base_with_the_adapter(tmp_path, make_checkpoint, reference_model, patched):
    peft = pytest.importorskip("peft", "0.19", reason="transformers itself does not take an older PEFT")
    weights = make_checkpoint(tmp_path / "base", "codellama")
    plain = reference_model(tmp_path / "base", weights)
    plain.name_or_path = str(tmp_path / "base")
    plain = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    plain.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    plain.save_pretrained(tmp_path / "adapter")
    expected, without = logits(plain), logits(ropewalk.load(tmp_path / "base")[0])
    assert (expected - without).abs().max() > 1e-2
    for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
        model = model_class.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        assert (logits(model) - expected).abs().max() < 1e-4


def test_which_folders_are_packed(tmp_path, make_checkpoint, make_plain):
    make_checkpoint(tmp_path / "packed", config_in="")
    assert is_packed(tmp_path / "packed", {})
    (tmp_path / "plain").mkdir()
    make_plain(tmp_path / "plain")
    assert not is_packed(tmp_path / "plain", {})
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert not is_packed(tmp_path / "packed", {})  # AWQ's tensors have the same names
    for name in (None, 3, "", tmp_path / "nothing", tmp_path):
        assert not is_packed(name, {})


def test_saved_and_loaded_again(tmp_path, make_checkpoint, patched):
    make_checkpoint(tmp_path / "first", "mixtral", file="gptq_model-4bit-32g.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    model.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    before = load_file(tmp_path / "first" / "gptq_model-4bit-32g.safetensors")
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_pipeline_from_a_name(patched, shipped):
    pipe = pipeline("text-generation", model=str(shipped), dtype=torch.float32, device_map="auto")
    assert any(isinstance(module, QuantLinear) for module in pipe.model.modules())
    found = pipe("And it came to pass", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    model, tokenizer = ropewalk.load(shipped)
    inputs = tokenizer("And it came to pass", return_tensors="pt", return_token_type_ids=False)
    assert found == tokenizer.decode(model.generate(**inputs, max_new_tokens=12)[0], skip_special_tokens=True)


def test_a_rope_type_of_ours_in_a_config(tmp_path, patched):
    """Of a model that is not packed: built, saved and loaded by transformers alone."""
    rope = {"rope_type": "partial-ntk", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=96, max_position_embeddings=128, rope_parameters=rope, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"] == rope
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == rope
    assert torch.equal(logits(again), logits(model))
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    assert (logits(other) - logits(model)).abs().max() > 1e-4


# What then works as in any model.


@pytest.mark.parametrize("arch", ["airophin", "mixtral"])
def test_generate_compiles_by_itself(tmp_path, make_checkpoint, patched, arch):
    """Transformers' own criteria, told that this device counts; one graph without a break, and the same tokens."""
    make_checkpoint(tmp_path, arch, file="gptq_model-4bit-32g.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="auto")
    expected = model.generate(prompts(), **GREEDY)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = model.generate(prompts(), cache_implementation="static", compile_config=config, **GREEDY)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]


def test_on_an_accelerator_it_compiles_without_being_asked(tmp_path, make_checkpoint, patched, monkeypatch):
    make_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    static = StaticCache(config=model.config, max_cache_len=32)
    calls = {name: {"past_key_values": cache, "cache": cache} for name, cache in (("static", static), ("no", None))}
    calls["dynamic"] = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    assert not model._valid_auto_compile_criteria(calls["static"], GenerationConfig())  # on a CPU
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    chosen = {name: model._valid_auto_compile_criteria(call, GenerationConfig()) for name, call in calls.items()}
    assert chosen == {"static": True, "no": False, "dynamic": False}
    monkeypatch.setattr(model.hf_quantizer.__class__, "is_compileable", False)
    assert not model._valid_auto_compile_criteria(calls["static"], GenerationConfig())


def test_continuous_batching_gives_the_same_tokens(tmp_path, make_checkpoint, patched):
    make_checkpoint(tmp_path, "codellama", config_in="config.json")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = model.generate(prompts(), **GREEDY)[:, 20:].tolist()
    config = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    made = model.generate_batch(prompts().tolist(), generation_config=config, continuous_batching_config=small)
    assert [list(output.generated_tokens) for output in made.values()] == expected


# The Python of the model cards: these calls, with these arguments, a name of the Hub and one of its branches.

EXAMPLE = """
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model_name_or_path = "TheBloke/Airoboros-c34B-2.1-GPTQ"
model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path, torch_dtype=torch.float16, device_map="auto", revision="main"
)
tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, use_fast=True)

prompt = "And it came to pass"
prompt_template = f'''A chat.
USER: {prompt}
ASSISTANT:
'''

input_ids = tokenizer(prompt_template, return_tensors='pt').input_ids.cuda()
output = model.generate(inputs=input_ids, temperature=0.7, max_new_tokens=512)
first = tokenizer.decode(output[0])

pipe = pipeline(
    "text-generation",
    model=model,
    tokenizer=tokenizer,
    max_new_tokens=512,
    temperature=0.7,
    top_p=0.95,
    repetition_penalty=1.15
)
second = pipe(prompt_template)[0]['generated_text']
"""


def put_into_cache(home, repo, branches):
    """Lay folders out as the Hub's cache has a repository: branch -> folder."""
    place = home / "hub" / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    for number, (branch, folder) in enumerate(branches.items()):
        commit = f"{number:040x}"
        (place / "refs" / branch).write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)


def offline(home, code, **more):
    """Run a program that knows of the Hub only what lies in a cache."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **more}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_example_of_the_model_cards(tmp_path, make_checkpoint, shipped):
    """CodeLlama's shape with act-order. Only where there is no GPU, `.cuda()` stays on the CPU."""
    sizes = {"vocab_size": 2048, "max_position_embeddings": 2048}
    make_checkpoint(tmp_path / "model", "codellama", group_size=32, config_in="config.json", sizes=sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, tmp_path / "model")
    put_into_cache(tmp_path / "home", "TheBloke/Airoboros-c34B-2.1-GPTQ", {"main": tmp_path / "model"})
    before = """
import json, torch
import ropewalk
ropewalk.patch()
if not torch.cuda.is_available():
    torch.Tensor.cuda = lambda tensor: tensor
"""
    after = """
kinds = [type(module).__name__ for module in model.modules()]
counted = kinds.count("QuantLinear"), input_ids.shape[1], output.shape[1]
print(json.dumps([first, second, prompt_template, str(model.dtype), *counted]))
"""
    first, second, prompt, dtype, layers, prompt_tokens, tokens = offline(tmp_path / "home", before + EXAMPLE + after)
    assert (dtype, layers) == ("torch.float16", 14)
    assert second.startswith(prompt) and len(second) > len(prompt)
    model, tokenizer = ropewalk.load(tmp_path / "model", dtype="float16", device_map="auto")
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    assert ids.shape[1] == prompt_tokens < tokens <= prompt_tokens + 512
    expected = model.generate(ids, max_new_tokens=512)[0]
    assert first == tokenizer.decode(expected)


def test_the_recipes_of_the_readme(tmp_path, make_checkpoint, shipped):
    """Those for transformers and for PEFT, in one program, with an adapter that PEFT itself has saved."""
    pytest.importorskip("peft", "0.19")
    section = (Path(__file__).parents[1] / "README.md").read_text().split("\n## Front ends\n")[1].split("\n## ")[0]
    blocks = [part.split("```")[0] for part in section.split("```python\n")[1:]]
    by_transformers = next(block for block in blocks if "from_pretrained(name" in block)
    by_peft = next(block for block in blocks if "PeftModel" in block)
    branch = re.search(r'revision="(.+?)"', by_transformers)[1]
    make_checkpoint(tmp_path / "model", "codellama", config_in="config.json", sizes={"vocab_size": 2048})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, tmp_path / "model")
    of_name = re.search(r'name = "(.+?)"', by_transformers)[1]
    put_into_cache(tmp_path / "home", of_name, {"main": tmp_path / "model", branch: tmp_path / "model"})
    between = f"""
import json, os, peft, torch
os.chdir({str(tmp_path)!r})
text = pipe("In those days", max_new_tokens=4)[0]["generated_text"]
adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
adapter.save_pretrained("adapter-folder")
model = adapter.unload()
"""
    after = """
trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
print(json.dumps([text, len(trained)]))
"""
    text, trained = offline(tmp_path / "home", by_transformers + between + by_peft + after)
    assert text.startswith("In those days") and len(text) > len("In those days")
    assert trained == 28


def test_branches_of_2023_without_settings_in_config_json(tmp_path, make_checkpoint):
    """Each branch is another packing; nothing but the names of its files says that there is one."""
    bits = {"main": 4, "gptq-3bit-32g-actorder_True": 3}
    for branch, number in bits.items():
        make_checkpoint(tmp_path / branch, bits=number, file=f"gptq_model-{number}bit-32g.safetensors")
    make_checkpoint(tmp_path / "older", file="model-4bit-32g.safetensors", config_in="")
    put_into_cache(tmp_path / "home", "user/model", {branch: tmp_path / branch for branch in bits})
    put_into_cache(tmp_path / "home", "user/older", {"main": tmp_path / "older"})
    code = f"""
import json, ropewalk
from transformers import AutoModelForCausalLM, LlamaForCausalLM
ropewalk.patch()
found = [
    model_class.from_pretrained("user/model", revision=branch).model.layers[0].mlp.up_proj.bits
    for model_class in (AutoModelForCausalLM, LlamaForCausalLM) for branch in {list(bits)}
]
print(json.dumps([*found, AutoModelForCausalLM.from_pretrained("user/older").model.layers[0].mlp.up_proj.bits]))
"""
    assert offline(tmp_path / "home", code) == [4, 3, 4, 3, 4]


# Whose code is run.


@pytest.fixture
def with_code(tmp_path, make_checkpoint, shipped, monkeypatch):
    """Return (a packed folder whose code, when it is run, leaves a file; that file)."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, marker = tmp_path / "model", tmp_path / "it-was-run"
    make_checkpoint(folder, sizes={"vocab_size": 2048})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, folder)
    for kind, base in (("configuration", "LlamaConfig"), ("modeling", "LlamaForCausalLM"), ("tokenizer", "")):
        lines = [f"open({str(marker)!r}, 'a').write({kind!r})"]
        lines += [f"from transformers import {base}", f"class Evil({base}): pass"] if base else ["class Evil: pass"]
        (folder / f"{kind}_evil.py").write_text("\n".join(lines))
    of = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit(folder / "config.json", auto_map=of)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenizer_evil.Evil"]})
    return folder, marker


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_of_a_packed_folder_is_not_run(with_code):
    folder, marker = with_code
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.read_text() == "configuration"  # so transformers does it without us
    marker.unlink()
    ropewalk.patch()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert type(config).__module__.startswith("transformers.")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        again = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, dtype=torch.float32)
    finally:
        ropewalk.unpatch()
    assert not marker.exists()
    assert type(tokenizer).__module__.startswith("transformers.")
    for loaded in (again, pipe.model):
        assert torch.equal(logits(loaded), logits(model))
    assert not hasattr(model.config, "auto_map")


def test_a_packed_model_that_only_its_own_code_builds_is_refused(with_code, patched):
    folder, marker = with_code
    edit(folder / "config.json", model_type="evil")
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(CheckpointError, match="expected a model_type of transformers, as no code of a packed"):
            auto.from_pretrained(folder, trust_remote_code=True)
    assert not marker.exists()


# What is given back.

SNAPSHOT = """
import gc, inspect, json, logging, sys
from pathlib import Path
import torch, peft, transformers
from peft.tuners.lora.model import LoraModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2 import modeling_qwen2
import ropewalk, ropewalk.loader.load

PACKAGES = ("transformers", "peft", "accelerate", "huggingface_hub", "torch.nn", "safetensors", "tokenizers")

def snapshot():
    found = {("sys", "meta_path"): list(map(id, sys.meta_path))}
    for name, module in list(sys.modules.items()):
        if not name.startswith(PACKAGES):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if type(value) is dict and not key.startswith("__"):
                found.update({(name, key, "at", str(k)): id(v) for k, v in value.items()})
                found[name, key, "keys"] = sorted(map(str, value))
            if inspect.isclass(value) and value.__module__ == name:
                names = [k for k in vars(value) if k == "__init__" or not k.startswith(("__", "_abc"))]
                inner = {k: id(vars(value)[k]) for k in names}
                found.update({(name, key, "in", k): v for k, v in inner.items()})
                found[name, key, "names"] = sorted(inner)
    return found

def changed(before, after):
    return sorted(".".join(map(str, key)) for key, value in before.items() if after.get(key) != value)
"""


def test_unpatch_gives_everything_back(tmp_path, make_checkpoint):
    """Every attribute of every module and class of these packages that there was before, by identity, is there
    again: after models were loaded, failed to load, generated and got adapters.
    """
    make_checkpoint(tmp_path / "llama")
    make_checkpoint(tmp_path / "mixtral", "mixtral", file="gptq_model-4bit-32g.safetensors")
    shutil.copytree(tmp_path / "llama", tmp_path / "faulty")
    edit(tmp_path / "faulty" / "config.json", num_hidden_layers=3)
    code = (
        SNAPSHOT
        + f"""
folder = Path({str(tmp_path)!r})

def use():
    ids = torch.arange(3, 20)[None]
    for name in ("llama", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        model.generate(ids, max_new_tokens=3, pad_token_id=0)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config)
    try:
        AutoModelForCausalLM.from_pretrained(folder / "faulty")
    except ropewalk.errors.CheckpointError:
        return
    raise AssertionError("the faulty one was loaded")

ropewalk.patch()
use()  # what transformers and peft import lazily, and remember, is there from here on
ropewalk.unpatch()
before = snapshot()
types = sorted(transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS)
ropewalk.patch()
ropewalk.patch("peft")
patched = changed(before, snapshot())
use()
ropewalk.unpatch()
after = snapshot()
print(json.dumps([patched, changed(before, after), types]))
"""
    )
    patched, left, types = offline(tmp_path / "home", code)
    assert left == []
    assert not {"partial-ntk", "ntk-by-parts", "ntk"} & set(types)
    for owner in ("AutoConfig", "AutoProcessor", "AutoTokenizer", "PreTrainedModel"):
        assert any(name.endswith(f"{owner}.in.from_pretrained") for name in patched), owner
    for name in (
        "transformers.modeling_utils.PreTrainedModel.in.__init__",
        "transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
        "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.keys",
        "transformers.modeling_rope_utils.RotaryEmbeddingConfigMixin.names",
        "peft.tuners.lora.model.LoraModel.in._prepare_model",
        "peft.tuners.lora.model.LoraModel.in._check_merge_allowed",
    ):
        assert name in patched, name


def test_a_load_that_fails_leaves_no_rope_types(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "faulty")
    edit(tmp_path / "faulty" / "config.json", num_hidden_layers=3)
    code = f"""
import json, ropewalk
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin
states = []
def look():
    checks = [name for name in vars(RotaryEmbeddingConfigMixin) if "partial-ntk" in name]
    states.append(["partial-ntk" in ROPE_INIT_FUNCTIONS, len(checks)])
for name in ("faulty", "nothing", "model", "faulty"):
    try:
        ropewalk.load({str(tmp_path)!r} + "/" + name)
    except ropewalk.errors.CheckpointError:
        pass
    look()
ropewalk.unpatch()
look()
print(json.dumps(states))
"""
    gone, there = [False, 0], [True, 1]
    assert offline(tmp_path / "home", code) == [gone, gone, there, there, gone]
