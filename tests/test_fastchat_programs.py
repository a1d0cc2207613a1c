"""FastChat's programs by the recipes of the README: its command line, by a pipe and in a terminal, and its servers on
loopback.
"""

import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ropewalk
from ropewalk.cli import main

pytest.importorskip("fastchat", reason="pip install 'ropewalk[fastchat]'")

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text().partition("### FastChat\n")[2].partition("\n##")[0]
RECIPES = [shlex.split(line) for line in README.splitlines() if line.startswith("    ropewalk fastchat ")]
MODEL = "strand-4m-pntk-1k-gptq"
PROMPT = "And the LORD said unto Moses,"
# FastChat writes logs into the working directory unless LOGDIR is empty.
ENVIRONMENT = {**os.environ, "LOGDIR": "", "PYTHONUNBUFFERED": "1", "ROPEWALK_CPU_MODE": "exact"}


def command(recipe, *more):
    """A recipe of the README as this interpreter runs it, with more arguments, of which the last count."""
    assert recipe[0] == "ropewalk"
    return [sys.executable, "-m", "ropewalk", *recipe[1:], *more]


def ask(recipe, text, *more):
    done = subprocess.run(
        command(recipe, "--temperature", "0", "--max-new-tokens", "24", "--debug", *more),
        input=text,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^\{'conv_template.*\}$", done.stdout, re.MULTILINE)
    return done.stdout, [ast.literal_eval(line) for line in shown]


def test_the_command_line_without_history(shipped):
    """Two questions by a pipe; the second prompt knows nothing of the first."""
    recipe = next(r for r in RECIPES if "--no-history" in r)
    out, turns = ask(recipe, "Who art thou?\nWhere dwellest thou?\n")
    prompts = [f"A chat.\nUSER: {text}\nASSISTANT:" for text in ("Who art thou?", "Where dwellest thou?")]
    assert [turn["prompt"] for turn in turns] == prompts
    assert out.rstrip().endswith("exit...")
    # what it answers is what the model answers
    from ropewalk.generation import generate

    model, tokenizer = ropewalk.load(shipped)
    expected = generate(model, tokenizer, prompts[0], max_new_tokens=24, stop=["USER:"]).text
    assert expected.strip()
    assert turns[0]["outputs"] == expected.strip()
    assert f"ASSISTANT: {expected.strip()}" in out


def test_the_command_line_with_history_and_weights_elsewhere(tmp_path, shipped):
    recipe = next(r for r in RECIPES if "--gptq-ckpt" in r)
    folder, file = tmp_path / "model", tmp_path / "llama-13b-4bit-32g.pt"
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.safetensors", "quantize_config.json"))
    torch.save(load_file(next(shipped.glob("*.safetensors"))), file)
    recipe = [str({"FOLDER": folder, file.name: file}.get(word, word)) for word in recipe]
    _, (first, second) = ask(recipe, "Who art thou?\nWhy?\n", "--conv-template", "vicuna-1.1")
    assert first["prompt"].endswith("USER: Who art thou? ASSISTANT:")
    assert second["prompt"] == f"{first['prompt']} {first['outputs'].strip()}</s>USER: Why? ASSISTANT:"


def test_prompts_of_several_lines_by_a_terminal(in_terminal):
    """Ctrl-D on an empty line ends a prompt, and the next one can have several lines as well."""
    recipe = next(r for r in RECIPES if "--multiline" in r)
    arguments = command(recipe, "--temperature", "0", "--max-new-tokens", "8", "--debug", "--no-history")
    terminal = in_terminal(arguments[1:], ENVIRONMENT)
    question = "USER [ctrl-d/z on empty line to end]: "
    terminal.read_until(question)
    for lines in (["BEGININPUT", "", "The sky is blue.", "ENDINPUT", "What is blue?"], ["And", "why?"]):
        terminal.type("".join(f"{line}\n" for line in lines))
        terminal.read_until(lines[-1])
        terminal.type("\x04")
        answered = terminal.read_until(question)
        assert "'prompt': 'A chat.\\nUSER: " + "\\n".join(lines) + "\\nASSISTANT:'" in answered
    terminal.type("\x04")
    terminal.read_until("exit...")


def test_prompts_of_several_lines_by_a_pipe():
    recipe = next(r for r in RECIPES if "--multiline" in r)
    _, (only,) = ask(recipe, "BEGININPUT\nThe sky is blue.\nENDINPUT\nWhat is blue?\n")
    assert only["prompt"] == "A chat.\nUSER: BEGININPUT\nThe sky is blue.\nENDINPUT\nWhat is blue?\nASSISTANT:"


@contextmanager
def running(*arguments):
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, text=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def test_a_deployment_on_loopback(shipped):
    """Controller, worker and API as the README starts them; a completion at once and in pieces, and a chat."""
    import requests

    programs = {recipe[2]: recipe for recipe in RECIPES if recipe[2] != "cli"}
    assert programs.keys() == {"controller", "worker", "openai_api_server"}
    ports = free_ports(3)
    controller, worker, api = (f"http://127.0.0.1:{port}" for port in ports)
    host = [["--host", "127.0.0.1", "--port", str(port)] for port in ports]
    places = ["--controller-address", controller]
    with (
        running(*command(programs["controller"], *host[0])) as first,
        running(*command(programs["openai_api_server"], *host[2], *places)) as third,
    ):
        wait_for(f"{controller}/test_connection", first)
        with running(
            *command(programs["worker"], *host[1], *places, "--worker-address", worker, "--conv-template", "airoboros")
        ) as second:
            wait_for(f"{api}/v1/models", second, third, what=MODEL)
            asked = {"model": MODEL, "temperature": 0, "max_tokens": 16}
            whole = requests.post(f"{api}/v1/completions", json={**asked, "prompt": PROMPT}, timeout=300).json()
            text = whole["choices"][0]["text"]
            pieces = streamed(f"{api}/v1/completions", {**asked, "prompt": PROMPT})
            said = {**asked, "messages": [{"role": "user", "content": "Who art thou?"}]}
            answer = requests.post(f"{api}/v1/chat/completions", json=said, timeout=300).json()
            parts = streamed(f"{api}/v1/chat/completions", said)
            # more than the context holds is answered as far as it goes
            long = requests.post(
                f"{api}/v1/completions", json={**asked, "prompt": PROMPT, "max_tokens": 5000, "stop": ","}, timeout=300
            ).json()
    from ropewalk.generation import generate
    from ropewalk.templates import apply

    model, tokenizer = ropewalk.load(shipped)
    assert text == generate(model, tokenizer, PROMPT, max_new_tokens=16).text
    assert len(pieces) > 3
    assert "".join(piece["text"] for piece in pieces) == text
    chat = generate(model, tokenizer, apply("Who art thou?", "airoboros")[0], max_new_tokens=16, stop=["USER:"]).text
    assert chat.strip()
    assert answer["choices"][0]["message"]["content"].strip() == chat.strip()
    assert "".join(part["delta"].get("content") or "" for part in parts).strip() == chat.strip()
    assert long["choices"][0]["finish_reason"] == "stop"


def wait_for(url, *processes, what="", seconds=300):
    import requests

    end = time.monotonic() + seconds
    while True:
        for process in processes:
            assert process.poll() is None, process.communicate()[0][-2000:]
        try:
            if what in requests.get(url, timeout=10).text:
                return
        except requests.ConnectionError:
            pass
        assert time.monotonic() < end, f"{url} did not answer"
        time.sleep(0.3)


def streamed(url, asked):
    import requests

    found = []
    with requests.post(url, json={**asked, "stream": True}, stream=True, timeout=300) as reply:
        for line in reply.iter_lines():
            data = line.decode().removeprefix("data: ")
            if data and data != "[DONE]":
                found += json.loads(data)["choices"]
    assert data == "[DONE]" or not data
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "cli", "--model-path", "demo"], "--json: expected none"),
        (["--rope", "round", "cli"], "--rope: rope: expected auto"),
        (["cli", "--model-path", "demo", "--conv-template", "nothing"], "--conv-template: expected one of"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    try:
        assert main(["fastchat", *arguments]) == 2
    finally:
        ropewalk.unpatch("fastchat", "transformers")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_the_programs_own_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fastchat", "cli", "--help"])
    assert stop.value.code == 0
    assert "--gptq-ckpt" in capsys.readouterr().out
