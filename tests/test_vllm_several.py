"""vLLM on several ranks, on what stands for several machines, and as a server, with our method in it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

TOKENS = 12
BOUND = 2e-4  # as in test_vllm.py
LENGTHS = (5, 40)

ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, options, prompts, tokens, out = json.load(open(sys.argv[1]))
    llm = LLM(model, **options)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False)
    found = []
    for result in llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False):
        first = result.outputs[0]
        found.append([[token, first.logprobs[i][token].logprob] for i, token in enumerate(first.token_ids)])
    json.dump(found, open(out, "w"))
"""


def environment(folder, **more):
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def prompts(vocabulary):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def generate(folder, tmp_path, asked, **options):
    """Return the greedy tokens of an engine in processes of its own, each with the logarithm of its probability."""
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4, "skip_tokenizer_init": True, **options}
    (tmp_path / "engine.py").write_text(ENGINE)
    (tmp_path / "asked.json").write_text(
        json.dumps([str(folder), options, asked, TOKENS, str(tmp_path / "found.json")])
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "engine.py", tmp_path / "asked.json"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((tmp_path / "found.json").read_text())


def check(found, asked, model):
    """Check tokens and their probabilities with a model of transformers."""
    for ids, results in zip(asked, found, strict=True):
        tokens = [token for token, _ in results]
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].float()
        assert tokens == logits.argmax(-1).tolist()
        for (token, logprob), row in zip(results, logits.log_softmax(-1), strict=True):
            assert abs(logprob - row[token].item()) < BOUND


# Two heads of keys and values, for two ranks to share.
TWO = {"num_key_value_heads": 2, "intermediate_size": 128}
SPLITS = {
    "experts, act-order": ({"arch": "mixtral"}, {}),
    "experts, 3 bits, in order, asymmetric": ({"arch": "mixtral", "bits": 3, "desc_act": False, "sym": False}, {}),
    "expert parallel": ({"arch": "mixtral"}, {"enable_expert_parallel": True}),
    "experts, act-order, compiled": ({"arch": "mixtral", "sym": False}, {"enforce_eager": False}),
    "act-order, asymmetric": ({"arch": "codellama", "sym": False}, {}),
    "in order": ({"arch": "codellama", "desc_act": False, "sym": False}, {}),
    "one group, 3 bits": ({"arch": "codellama", "bits": 3, "group_size": -1, "sym": False}, {}),
    "one head of keys and values, biases": ({"arch": "qwen2", "sizes": {"intermediate_size": 128}}, {}),
}


@pytest.mark.parametrize(
    "case", [each if i == 0 else pytest.param(each, marks=pytest.mark.slow) for i, each in enumerate(SPLITS)]
)
def test_two_ranks(case, tmp_path, make_checkpoint, reference_model):
    checkpoint, options = SPLITS[case]
    weights = make_checkpoint(tmp_path / "model", **{"sizes": TWO, **checkpoint})
    model = reference_model(tmp_path / "model", weights)
    asked = prompts(model.config.vocab_size)
    check(generate(tmp_path / "model", tmp_path, asked, tensor_parallel_size=2, **options), asked, model)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """`vllm serve`, on one machine or on what stands for several."""

    def __init__(self, folder, tmp_path, *arguments, nodes=1, **more):
        self.port = free_port()
        command = [Path(sys.executable).parent / "vllm", "serve", str(folder), *arguments]
        several = ["--nnodes", str(nodes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        self.started, self.logs = [], []
        for rank in range(nodes):
            each = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
            if nodes > 1:
                each += [*several, "--node-rank", str(rank), *(["--headless"] if rank else [])]
            self.logs.append(tmp_path / f"serve-{rank}.log")
            with self.logs[-1].open("w") as log:
                self.started.append(
                    subprocess.Popen(
                        each,
                        env=environment(tmp_path, VLLM_CPU_OMP_THREADS_BIND=str(rank) if nodes > 1 else "0-1", **more),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self):
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if any(process.poll() is not None for process in self.started):
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
            except OSError:
                time.sleep(0.5)
            else:
                return self
        text = "\n".join(log.read_text()[-3000:] for log in self.logs)
        self.__exit__()
        raise AssertionError(f"vllm serve: expected an answer, found\n{text}")

    def __exit__(self, *_):
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
        for process in self.started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)

    def complete(self, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]


@pytest.fixture(scope="module")
def beyond(dequantized_folder, reference_model):
    """Return a prompt longer than the context that the small model was trained with at first, and what follows it by
    transformers on the dequantized weights.
    """
    from transformers import AutoTokenizer

    from ropewalk.shipped import FOLDER, held_out_text

    rope = {"rope_type": "partial-ntk", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    model = reference_model(FOLDER, dequantized_folder(FOLDER), rope)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(held_out_text()[:4000]).input_ids[:700]
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return ids, tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "arguments"),
    [(1, []), (2, ["--tensor-parallel-size", "2", "--enforce-eager"])],
    ids=["one machine, compiled", "two machines"],
)
def test_serve_beyond_the_original_context(nodes, arguments, tmp_path, beyond):
    from ropewalk.shipped import FOLDER

    ids, text = beyond
    options = ["--dtype", "float32", "--max-num-seqs", "4", "--served-model-name", "demo"]
    with Server(FOLDER, tmp_path, *options, *arguments, nodes=nodes) as server:
        answer = server.complete(model="demo", prompt=ids, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    assert answer["text"] == text
