"""`ropewalk serve`: transformers' own server in a process of its own, asked over the loopback."""

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

import ropewalk
from ropewalk import templates
from ropewalk.chat_templates import chat_template
from ropewalk.cli import main
from ropewalk.errors import PatchError, UsageError

pytest.importorskip("fastapi")
pytest.importorskip("openai")

README = Path(__file__).parents[1] / "README.md"
PROMPT = "And it came to pass"
SECONDS = 300  # within which it must be up on a busy machine


def ask(url, body=None):
    """Return (status, JSON), or the data of each event of a stream."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            if "event-stream" in answer.headers["Content-Type"]:
                lines = [line.decode().strip() for line in answer]
                return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def recipe():
    """Return (arguments of `ropewalk serve`, (path, body) of each request), as README has them."""
    section = README.read_text().split("### transformers serve\n")[1].split("\n### ")[0]
    commands = [shlex.split(line) for line in section.replace("\\\n", "").splitlines() if line.startswith("    ")]
    server, *asked = commands
    assert server[:2] == ["ropewalk", "serve"]
    found = []
    for command in asked:
        address = f"http://127.0.0.1:{server[server.index('--port') + 1]}"
        assert command[0] == "curl" and command[1].startswith(address)
        found.append((command[1].removeprefix(address), json.loads(command[command.index("-d") + 1])))
    return server[2:], found


@contextmanager
def serving(home, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ropewalk", "serve", *arguments, "--port", str(port), "--json"]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while server.poll() is None:
            try:
                ask(f"{url}/health")
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.2)
        assert server.poll() is None, server.communicate()[1]
        yield url, server
    finally:
        server.kill()
        server.communicate(timeout=120)


def test_the_model_that_ships_is_served(tmp_path, shipped):
    """README's commands; both endpoints, streaming or not, give what the model itself gives; an interrupt ends it."""
    model, tokenizer = ropewalk.load(shipped, dtype="float16", device_map="auto")

    def continued(prompt, tokens):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        return tokenizer.decode(model.generate(ids, max_new_tokens=tokens)[0, ids.shape[1] :], skip_special_tokens=True)

    arguments, requests = recipe()
    assert arguments[0] == "demo"
    filled, _ = templates.apply("Who went up?", arguments[arguments.index("--template") + 1])
    with serving(tmp_path, *arguments) as (url, server):
        status, listed = ask(f"{url}/v1/models")
        assert status == 200
        assert [entry["id"] for entry in listed["data"]] == ["demo"]
        for path, body in requests:
            answer = ask(url + path, body)
            assert len(answer) > 10 if body.get("stream") else answer[0] == 200
        assert {path for path, _ in requests} == {"/v1/completions", "/v1/chat/completions"}
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 12}
        status, found = ask(f"{url}/v1/completions", body)
        assert status == 200
        expected = continued(PROMPT, 12)
        assert found["choices"][0]["text"] == expected
        assert found["usage"]["completion_tokens"] == 12
        events = ask(f"{url}/v1/completions", body | {"stream": True})
        assert "".join(event["choices"][0]["text"] for event in events) == expected
        assert len(events) > 5
        body = {"model": "demo", "messages": [{"role": "user", "content": "Who went up?"}], "max_tokens": 10}
        status, found = ask(f"{url}/v1/chat/completions", body)
        assert status == 200
        expected = continued(filled, 10)
        assert found["choices"][0]["message"]["content"] == expected
        events = ask(f"{url}/v1/chat/completions", body | {"stream": True})
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
        status, found = ask(f"{url}/v1/completions", {"model": "another", "prompt": PROMPT})
        assert status == 400
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=120)
    assert server.returncode in (0, 130)
    assert json.loads(out) == {"model": "demo", "url": url}
    assert "Traceback" not in err


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_chat_templates_are_those_of_the_command(shipped, name):
    _, tokenizer = ropewalk.load(shipped)
    tokenizer.chat_template = chat_template(name, tokenizer)
    odd = "Say \"{user}\" in 'quotes',\nand \\n: é"

    def fill(*texts):
        roles = ["system", "user", "assistant", "user"][-len(texts) :] if len(texts) != 2 else ["system", "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert fill(odd) == "<s>" + templates.apply(odd, name)[0]
    one = fill("Be brief.", odd)
    assert one == "<s>" + templates.apply(odd, name, system="Be brief.")[0]
    many = fill("Be brief.", odd, "Yes.", "Why?")
    chosen = templates.TEMPLATES[name]
    answer = " Yes." if chosen.turn.endswith((":", "]")) else "Yes."
    assert many == "<s>" + chosen.conversation([(odd, answer), ("Why?", None)], system="Be brief.")
    with pytest.raises(Exception, match=f"{name} takes a system text first"):
        tokenizer.apply_chat_template([{"role": "assistant", "content": "Yes."}], tokenize=False)
    with pytest.raises(UsageError, match="--template: expected one of airoboros"):
        chat_template("nope")


def test_who_chats_without_a_template_gets_a_sentence(shipped, caplog):
    from fastapi import HTTPException
    from transformers.cli.serving.model_manager import ModelManager

    from ropewalk.serving import manager_class

    manager = manager_class(ModelManager, None)()
    tokenizer = manager._load_processor(manager.process_model_name("demo"))
    assert tokenizer(PROMPT).input_ids
    with pytest.raises(HTTPException) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert caught.value.status_code == 400
    assert "demo: expected a chat template for /v1/chat/completions, found none" in caught.value.detail
    assert caught.value.detail in caplog.text
    assert manager.process_model_name("user/name:some-branch") == "user/name@some-branch"
    with_one = manager_class(ModelManager, "alpaca")()._load_processor("demo@main")
    assert "### Instruction" in with_one.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["/no/such"], 1, "/no/such: expected a folder with a model"),
        (["demo", "--template", "nope"], 2, "--template: expected one of airoboros"),
        (["demo", "--log-level", "loud"], 2, "--log-level: expected one of"),
        (["demo", "--dtype", "int9"], 1, "ropewalk serve: Unsupported dtype"),
    ],
)
def test_failures_are_one_line(capsys, arguments, status, message):
    try:
        assert main(["serve", *arguments]) == status
    finally:
        ropewalk.unpatch()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_the_extra(capsys, monkeypatch):
    # transformers keeps in mind what it found when its server is first imported, for all tests of the process.
    import transformers.cli.serving.chat_completion  # noqa: F401

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else real(name, *a))
    assert main(["serve", "demo"]) == 1
    assert "(pip install 'ropewalk[serve]'), found no fastapi" in capsys.readouterr().err


def test_a_server_of_another_make_is_refused(monkeypatch, capsys):
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    from ropewalk.serving import _our_manager

    theirs = model_manager.ModelManager
    with _our_manager(None):
        assert model_manager.ModelManager is not theirs
    assert model_manager.ModelManager is theirs
    monkeypatch.setattr(theirs, "_load_processor", lambda self, folder: None)
    with (
        pytest.raises(PatchError, match=r"ModelManager._load_processor\(self, model_id_and_revision"),
        _our_manager(None),
    ):
        pass
    assert model_manager.ModelManager is theirs
    monkeypatch.setattr(Serve, "__init__", lambda self, model: None)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "demo"])
    assert caught.value.code == 1
    assert "expected serve with force_model, host and port, found" in capsys.readouterr().err
