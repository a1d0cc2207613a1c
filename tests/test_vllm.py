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
