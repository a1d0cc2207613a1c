"""vLLM with our method in it computes what transformers computes with the dequantized weights.

Engines run in this process, one after the other. What takes several processes is in test_vllm_several.py.
"""

import contextlib
import gc
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.quant_linear import QuantLinear

vllm = pytest.importorskip("vllm")

from ropewalk.patches.vllm.config import RopewalkConfig  # noqa: E402

TOKENS = 12
# The largest difference of a logarithm of a probability that is left to float32.
BOUND = 2e-4


@pytest.fixture(scope="module", autouse=True)
def in_this_process(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm-cache")))
        yield


@contextlib.contextmanager
def engine(folder, **options):
    """Give an engine of vLLM, and take it away again."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4, "skip_tokenizer_init": True, **options}
    llm = vllm.LLM(str(folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def prompts(vocabulary, *lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def check(llm, model, *lengths, **options):
    """Check that an engine's greedy tokens are those of a model of transformers, and how likely it finds them."""
    asked = prompts(model.config.vocab_size, *lengths)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    results = llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False, **options)
    for ids, result in zip(asked, results, strict=True):
        found = list(result.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1].float()
        assert found == logits.argmax(-1).tolist()
        for i, (token, row) in enumerate(zip(found, logits.log_softmax(-1), strict=True)):
            assert abs(result.outputs[0].logprobs[i][token].logprob - row[token].item()) < BOUND


def grid():
    """Yield the cases of the next test; compiled, which takes half a minute each, one of them is for CI, and what vLLM
    has itself is not.
    """
    for compiled, arch, desc_act, sym, bits in itertools.product(
        (False, True), ("codellama", "mixtral"), (True, False), (True, False), (3, 4)
    ):
        case = compiled, arch, desc_act, sym, bits
        name = "-".join(
            ("compiled" if compiled else "eager", arch, "act" if desc_act else "in order", "sym" if sym else "asym")
        )
        theirs = not desc_act and sym and bits == 4
        slow = theirs or (compiled and case != (True, "codellama", True, False, 3))
        yield pytest.param(*case, id=f"{name}-{bits}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("compiled", "arch", "desc_act", "sym", "bits"), grid())
def test_greedy_tokens(compiled, arch, desc_act, sym, bits, tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, arch, bits=bits, sym=sym, desc_act=desc_act)
    model = reference_model(tmp_path, weights)
    with engine(tmp_path, enforce_eager=not compiled) as llm:
        assert llm.model_config.quantization == "ropewalk"
        mode = llm.llm_engine.vllm_config.compilation_config.mode.name
        assert mode == ("DYNAMO_TRACE_ONCE" if compiled else "NONE")
        check(llm, model, 5, 40)


# What else a checkpoint may be.
CASES = {
    "2 bits": {"bits": 2, "sym": False},
    "8 bits": {"bits": 8, "desc_act": False},
    "one group": {"group_size": -1},
    "groups of 16": {"group_size": 16},
    "v2": {"checkpoint_format": "gptq_v2", "sym": False},
    "no g_idx": {"desc_act": False, "with_g_idx": False},
    "one order for q, k and v": {"shared_order": True},
    "said in config.json": {"config_in": "config.json"},
    "biases": {"arch": "qwen2"},
    "shared experts": {"arch": "qwen2_moe"},
    "mistral": {"arch": "mistral"},
    "one weight on disk": {"arch": "mistral", "sizes": {"model_type": "phi3", "pad_token_id": 0}},
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints(case, tmp_path, make_checkpoint, reference_model):
    options = {"arch": "codellama", **CASES[case]}
    weights = make_checkpoint(tmp_path, options.pop("arch"), **options)
    with engine(tmp_path) as llm:
        check(llm, reference_model(tmp_path, weights), 5, 40)


def test_a_packed_output_embedding(tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, "codellama")
    tensors = load_file(tmp_path / "model.safetensors")
    packed = quantize_rtn(tensors.pop("lm_head.weight"), bits=4, group_size=32, sym=False)
    save_file(
        {**tensors, **{f"lm_head.{part}": t.contiguous() for part, t in packed.items()}}, tmp_path / "model.safetensors"
    )
    settings = json.loads((tmp_path / "quantize_config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps({**settings, "lm_head": True}))
    from ropewalk.gptq.format import dequantize, zeros_v1_to_v2

    weight = dequantize(
        packed["qweight"], packed["scales"], zeros_v1_to_v2(packed["qzeros"], 4), None, bits=4, group_size=32
    )
    model = reference_model(tmp_path, {**weights, "lm_head.weight": weight.t()})
    with engine(tmp_path) as llm:
        check(llm, model, 5, 40)


PARTIAL = {"rope_type": "partial-ntk", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "unnamed": {},
    "partial-ntk": {"rope_parameters": PARTIAL},
    "ntk-by-parts": {"rope_parameters": {**PARTIAL, "rope_type": "ntk-by-parts"}},
    "of 2023": {"rope_scaling": {"type": "partial-ntk", "factor": 4.0, "original_max_position_embeddings": 32}},
    "ntk": {"rope_parameters": {"rope_type": "ntk", "alpha": 2.5, "rope_theta": 10000.0}},
    "linear, a whole number": {"rope_scaling": {"type": "linear", "factor": 4}, "max_position_embeddings": 32},
    "linear of 2023": {"position_interpolation_scale": 0.25, "max_position_embeddings": 32},
}


@pytest.mark.parametrize("case", ROPES)
def test_ropes(case, tmp_path, make_checkpoint, reference_model):
    sizes = {**ROPES[case]} | ({} if case == "unnamed" else {"original_max_position_embeddings": None})
    weights = make_checkpoint(tmp_path, "airophin", sizes=sizes)
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    rope = ROPES[case].get("rope_parameters", linear if "linear" in case else PARTIAL)
    with engine(tmp_path) as llm:
        assert llm.model_config.max_model_len == 128
        check(llm, reference_model(tmp_path, weights, rope), 5, 110)


def test_a_rope_whose_config_names_the_original_length_only(tmp_path, make_checkpoint, reference_model):
    sizes = {"max_position_embeddings": 32, "rope_parameters": PARTIAL, "original_max_position_embeddings": None}
    weights = make_checkpoint(tmp_path, "airophin", sizes=sizes)
    with engine(tmp_path) as llm:
        assert llm.model_config.max_model_len == 128
        check(llm, reference_model(tmp_path, weights, PARTIAL), 110)


def test_a_float_model_with_an_unnamed_rope(tmp_path, make_plain, reference_model):
    weights = make_plain(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "inv_freq" not in name}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with engine(tmp_path) as llm:
        assert llm.model_config.quantization is None
        check(llm, reference_model(tmp_path, weights, PARTIAL), 5, 110)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_an_adapter(compiled, tmp_path, make_checkpoint, reference_model):
    peft = pytest.importorskip("peft")
    from vllm.lora.request import LoRARequest

    weights = make_checkpoint(tmp_path, "airophin")
    model = peft.get_peft_model(
        reference_model(tmp_path, weights, PARTIAL),
        peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    with engine(tmp_path, enforce_eager=not compiled, enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        check(llm, model, 5, 100, lora_request=LoRARequest("adapter", 1, str(tmp_path / "adapter")))
        with model.disable_adapter():
            check(llm, model, 5, 100)


@pytest.mark.parametrize("arch", ["codellama", "mixtral"])
@pytest.mark.parametrize("shared_order", [True, False], ids=["one order", "orders"])
def test_the_layout_of_a_gpu(arch, shared_order, tmp_path, make_checkpoint, reference_model, monkeypatch):
    """Test what a GPU would have, in plain torch."""
    monkeypatch.setattr(QuantLinear, "_best_layout", lambda self: "gpu")
    weights = make_checkpoint(tmp_path, arch, sym=False, shared_order=shared_order)
    with engine(tmp_path) as llm:
        check(llm, reference_model(tmp_path, weights), 5, 40)


@pytest.mark.parametrize("desc_act", [True, False], ids=["act", "in order"])
def test_files_that_are_not_here_to_be_looked_at(desc_act, tmp_path, make_checkpoint, reference_model, monkeypatch):
    """Test what a model on the Hub has: its config is believed."""
    monkeypatch.setattr(RopewalkConfig, "maybe_update_config", lambda *args, **kwargs: None)
    weights = make_checkpoint(tmp_path, "mixtral", desc_act=desc_act)
    with engine(tmp_path) as llm:
        check(llm, reference_model(tmp_path, weights), 5)


def test_methods_by_name(tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, "codellama")
    with engine(tmp_path, quantization="ropewalk") as llm:
        check(llm, reference_model(tmp_path, weights), 5)
    with pytest.raises(Exception, match="desc_act"):  # what vLLM's own method says
        engine(tmp_path, quantization="gptq").__enter__()


def test_rows_that_were_moved_whatever_the_config_says(tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, "codellama", desc_act=True)
    settings = json.loads((tmp_path / "quantize_config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps({**settings, "desc_act": False}))
    with engine(tmp_path) as llm:
        check(llm, reference_model(tmp_path, weights), 5)


@pytest.mark.parametrize("fault", ["scales", "half of gate and up", "another method", "a .pt file"])
def test_what_cannot_be_loaded_is_named(fault, tmp_path, make_checkpoint):
    make_checkpoint(tmp_path, "codellama")
    file, said = tmp_path / "model.safetensors", tmp_path / "quantize_config.json"
    tensors, settings = load_file(file), json.loads(said.read_text())
    layer = "model.layers.1.mlp.gate_proj"
    if fault == "scales":
        tensors[f"{layer}.scales"][0, 0] = float("nan")
        expected = f"{layer}.scales.*NaN"
    elif fault == "half of gate and up":
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{layer}.{part}"]
        tensors[f"{layer}.weight"] = torch.zeros(96, 64, dtype=torch.float16)
        expected = "gate_up_proj.*packed alike.*gate_proj: not packed"
    elif fault == "another method":
        settings["bits"] = 5
        expected = "bits.*5"
    else:
        torch.save(tensors, tmp_path / "model.pt")
        file.unlink()
        expected = "ropewalk convert"
    if fault != "a .pt file":
        save_file(tensors, file)
    said.write_text(json.dumps(settings))
    with pytest.raises(Exception, match=f"(?s){expected}"), engine(tmp_path, quantization="ropewalk"):
        pass


@pytest.fixture
def patched():
    """Return the module of the patch, applied; it is so again at the end."""
    from ropewalk.patches import vllm as patch

    patch.apply()
    yield patch
    patch.revert()
    patch.apply()


def test_apply_and_revert(patched, tmp_path, make_checkpoint):
    import vllm.config.model as model_config
    from vllm.model_executor.layers import rotary_embedding

    ours = model_config.get_config, model_config._get_and_verify_max_len, rotary_embedding.get_rope
    patched.register()
    assert ours == (model_config.get_config, model_config._get_and_verify_max_len, rotary_embedding.get_rope)
    assert patched.status()["applied"]
    patched.revert()
    theirs = model_config.get_config, model_config._get_and_verify_max_len, rotary_embedding.get_rope
    assert all(a is not b for a, b in zip(ours, theirs, strict=True))
    assert not patched.status()["applied"]
    make_checkpoint(tmp_path, "codellama", config_in="config.json")
    with pytest.raises(Exception, match="desc_act"):
        engine(tmp_path).__enter__()


def test_a_vllm_that_has_changed_starts_without_it(patched, monkeypatch, caplog):
    from vllm.model_executor.layers import rotary_embedding

    patched.revert()
    with monkeypatch.context() as changed:
        changed.setattr(rotary_embedding, "get_rope", lambda config, device: None)
        caplog.clear()
        patched.register()
        assert not patched.status()["applied"]
        assert rotary_embedding.get_rope.__name__ == "<lambda>"
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ropewalk"]
    assert "vLLM 0.32.0" in said and "get_rope" in said and "\n" not in said


def test_a_vllm_without_its_modules_starts_without_it(patched, monkeypatch, caplog):
    import sys

    patched.revert()
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "vllm.model_executor.layers.rotary_embedding", None)
        caplog.clear()
        patched.register()
        assert not patched.status()["applied"]
    assert "rotary_embedding" in caplog.text
