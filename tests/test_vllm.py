"""vLLM with our method in it computes what transformers computes with the dequantized weights.

Engines run in this process, one after the other. What takes several processes is in test_vllm_several.py.
"""

import contextlib
import gc
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ropewalk.gptq.rtn import quantize_rtn

vllm = pytest.importorskip("vllm")

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


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("desc_act", [True, False], ids=["act", "in order"])
@pytest.mark.parametrize("arch", ["codellama", "mixtral"])
def test_greedy_tokens(arch, desc_act, sym, bits, tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, arch, bits=bits, sym=sym, desc_act=desc_act)
    model = reference_model(tmp_path, weights)
    with engine(tmp_path) as llm:
        assert llm.model_config.quantization == "ropewalk"
        check(llm, model, 5, 40)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("desc_act", [True, False], ids=["act", "in order"])
@pytest.mark.parametrize("arch", ["codellama", "mixtral"])
def test_greedy_tokens_compiled(arch, desc_act, sym, bits, tmp_path, make_checkpoint, reference_model):
    weights = make_checkpoint(tmp_path, arch, bits=bits, sym=sym, desc_act=desc_act)
    model = reference_model(tmp_path, weights)
    with engine(tmp_path, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name == "DYNAMO_TRACE_ONCE"
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
    save_file({**tensors, **{f"lm_head.{part}": t.contiguous() for part, t in packed.items()}}, tmp_path / "model.safetensors")
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
}


@pytest.mark.parametrize("case", ROPES)
def test_ropes(case, tmp_path, make_checkpoint, reference_model):
    sizes = {**ROPES[case]} | ({} if case == "unnamed" else {"original_max_position_embeddings": None})
    weights = make_checkpoint(tmp_path, "airophin", sizes=sizes)
    rope = ROPES[case].get("rope_parameters", PARTIAL)
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
