"""vLLM on several ranks, on what stands for several machines, and as a server, with our method in it."""

import contextlib
import json
import os
import re
import shlex
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
    "an adapter's engine": ({"arch": "codellama", "sym": False}, {"enable_lora": True, "max_lora_rank": 8}),
    "expert parallel": ({"arch": "mixtral"}, {"enable_expert_parallel": True}),
    "experts, act-order, compiled": ({"arch": "mixtral", "sym": False}, {"enforce_eager": False}),
    "act-order, asymmetric": ({"arch": "codellama", "sym": False}, {}),
    "in order": ({"arch": "codellama", "desc_act": False, "sym": False}, {}),
    "one group, 3 bits": ({"arch": "codellama", "bits": 3, "group_size": -1, "sym": False}, {}),
    "pipeline, compiled": (
        {"arch": "codellama"},
        {"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "enforce_eager": False},
    ),
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
    check(generate(tmp_path / "model", tmp_path, asked, **{"tensor_parallel_size": 2, **options}), asked, model)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def recipe(start):
    """Return the commands of the README's section on vLLM that begin so, as lists of arguments."""
    section = README.split("### vLLM\n")[1].split("\n### ")[0]
    lines = re.findall(rf"^    ({re.escape(start)}.*)$", section, flags=re.M)
    assert lines
    return [shlex.split(line, comments=True) for line in lines]


class Server:
    """What a command of the README starts, or one for each of several machines, all of them this one.

    Args:
        commands: lists of arguments.
        folder: where they are run.
        arguments: more of them, for each.
    """

    def __init__(self, commands, folder, *arguments):
        self.port, master = free_port(), str(free_port())
        self.started, self.logs = [], []
        for rank, command in enumerate(commands):
            bind = "0-1"
            each = [*command, *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
            if len(commands) > 1:
                each = ["127.0.0.1" if argument == "10.0.0.1" else argument for argument in each]
                each += ["--master-port", master]
                bind = str(rank)
            each[0] = Path(sys.executable).parent / each[0]
            self.logs.append(folder / f"serve-{rank}.log")
            with self.logs[-1].open("w") as log:
                options = {"cwd": folder, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
                env = environment(folder, VLLM_CPU_OMP_THREADS_BIND=bind)
                self.started.append(subprocess.Popen(each, env=env, **options))

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

    def post(self, address, body):
        """Return the first choice of an answer of the server."""
        address = address.replace(":8000", f":{self.port}")
        request = urllib.request.Request(address, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["text"]


@pytest.fixture(scope="module")
def demo(dequantized_folder, reference_model):
    """Return a function from ids to the text that transformers finds to follow them, on the dequantized weights."""
    from transformers import AutoTokenizer

    from ropewalk.shipped import FOLDER

    rope = {"rope_type": "partial-ntk", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    model = reference_model(FOLDER, dequantized_folder(FOLDER), rope)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

    def follow(text, tokens, count=None):
        ids = tokenizer(text).input_ids[:count]
        with torch.no_grad():
            found = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        return ids, tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)

    return follow


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_the_commands_of_the_readme(machines, tmp_path, demo):
    """Run them as they stand there, but for the port, the machine's address and float32; and ask for what comes after a
    prompt that is longer than the context that the model was trained with at first.
    """
    from ropewalk.shipped import held_out_text

    (convert,) = recipe("ropewalk convert")
    convert[0] = Path(sys.executable).parent / convert[0]
    subprocess.run(convert, cwd=tmp_path, check=True, timeout=120)
    one, *several = recipe("vllm serve")
    ((*_, address, _, _, _, asked),) = recipe("curl")
    with Server([one] if machines == 1 else several, tmp_path, "--dtype", "float32", "--max-num-seqs", "4") as server:
        body = json.loads(asked)
        assert server.post(address, asked) == demo(body["prompt"], body["max_tokens"])[1]
        ids, expected = demo(held_out_text()[:4000], TOKENS, count=700)
        longer = {**body, "prompt": ids, "max_tokens": TOKENS}
        assert server.post(address, json.dumps(longer)) == expected
