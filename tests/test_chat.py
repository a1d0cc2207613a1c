"""A chat: what each prompt has of the conversation, by a pipe, in a terminal and with Ctrl-C."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ropewalk
from ropewalk.chat import Chat, choose_template
from ropewalk.cli import main
from ropewalk.errors import ContextLengthError, UsageError
from ropewalk.generation import generate

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def loaded():
    from ropewalk.shipped import FOLDER

    return ropewalk.load(FOLDER)


@pytest.fixture
def prompts(monkeypatch):
    """Return the prompts that a chat has made, as they come."""
    found = []

    def spy(model, tokenizer, prompt, **settings):
        found.append(prompt)
        return generate(model, tokenizer, prompt, **settings)

    monkeypatch.setattr("ropewalk.chat.generate", spy)
    return found


def run(capsys, monkeypatch, typed, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    status = main(["chat", "demo", "--temperature", "0", "--max-new-tokens", "12", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_chat_by_a_pipe(shipped):
    typed = 'Who art thou?\n"""\nAnd he said,\n\n  Go up.\n"""\n/reset\nWhy?\n/exit\nnever read\n'
    line = next(line for line in README.read_text().splitlines() if line.startswith("    ropewalk chat demo"))
    arguments = [*shlex.split(line, comments=True)[1:], "--temperature", "0", "--max-new-tokens", "12", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ropewalk", *arguments], input=typed, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["template"] == "airoboros-2.1"
    assert found["rope"]["type"] == "partial-ntk"
    assert [turn["user"] for turn in found["turns"]] == ["Who art thou?", "And he said,\n\n  Go up.", "Why?"]
    assert "forgotten" in done.stderr
    tokenizer = ropewalk.load(shipped)[1]
    first, second, third = found["turns"]
    prompt = "A chat.\nUSER: Who art thou?\nASSISTANT:"
    one = f"{prompt}{first['answer']}</s>USER: And he said,\n\n  Go up.\nASSISTANT:"
    for turn, text in ((first, prompt), (second, one), (third, "A chat.\nUSER: Why?\nASSISTANT:")):
        assert turn["prompt_tokens"] == len(tokenizer(text)["input_ids"])
    assert all(turn["answer"].strip() and turn["stopped"] == "length" for turn in found["turns"])


def test_what_is_shown_and_what_the_prompts_have(capsys, monkeypatch, prompts):
    status, out, err = run(capsys, monkeypatch, "Hear, O Israel\nWhy?\n", "--template", "none")
    assert status == 0
    answer = prompts[1].removeprefix("Hear, O Israel").removesuffix("\nWhy?")
    assert prompts == ["Hear, O Israel", f"Hear, O Israel{answer}\nWhy?"]
    assert answer.strip() and out.startswith(f"{answer}\n")
    assert "template: none, as asked for" in err
    prompts.clear()
    status, _, _ = run(capsys, monkeypatch, "Hear\nWhy?\n", "--template", "vicuna-1.1", "--system", "S", "--no-history")
    assert status == 0
    assert prompts == ["S USER: Hear ASSISTANT:", "S USER: Why? ASSISTANT:"]


def test_bad_usage_before_the_model_is_loaded(capsys, monkeypatch):
    status, out, err = run(capsys, monkeypatch, "x\n", "--template", "nothing")
    assert (status, out) == (2, "")
    assert "--template: expected auto, none or one of" in err
    status, _, err = run(capsys, monkeypatch, "x\n", "--temperature", "-1")
    assert status == 2
    assert "--temperature: expected 0 or more, found -1" in err
    status, _, err = run(capsys, monkeypatch, "x\n", "--system", "Be")
    assert status == 2
    assert "--system: expected a --template" in err


def test_which_template(loaded):
    _, tokenizer = loaded
    assert choose_template("auto", "demo", tokenizer)[0] is None
    assert choose_template("none", "airoboros-2.1", tokenizer)[0] is None
    assert choose_template("auto", "TheBloke/Airoboros-c34B-2.1-GPTQ", tokenizer)[0] == "airoboros-2.1"
    assert choose_template("alpaca", "TheBloke/Airoboros-c34B-2.1-GPTQ", tokenizer)[0] == "alpaca"

    class Own:
        chat_template = "yes"

    assert choose_template("auto", "TheBloke/Airoboros-c34B-2.1-GPTQ", Own())[0] == "auto"


def test_a_conversation_longer_than_the_context_goes_on(loaded, prompts):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, "airoboros-2.1", max_new_tokens=8)
    assert chat.context == 1024
    long = "And the LORD spake unto Moses, saying, " * 45
    size = len(tokenizer(long)["input_ids"])
    assert 350 < size < 480  # two of them fit
    dropped = [chat.answer(f"{i} {long}").dropped for i in range(4)]
    assert dropped == [0, 0, 1, 1]
    assert len(chat.turns) == 2
    for i, prompt in enumerate(prompts):
        first = max(0, i - 1)
        assert prompt.startswith(f"A chat.\nUSER: {first} And")  # the system text stays, and turns go as a whole
        assert prompt.count("USER:") == min(i + 1, 2)
        assert len(tokenizer(prompt)["input_ids"]) <= 1024 - 8
    kept = list(chat.turns)
    with pytest.raises(ContextLengthError, match="expected fewer tokens than the context of 1024"):
        chat.answer(long * 3)
    assert chat.turns == kept
    # an answer that may be long is left a quarter of the context
    chat.sampling["max_new_tokens"] = 5000
    _, count, out = chat._fitting("Why?")
    assert (count <= 768, out) == (True, 1)


def test_an_answer_that_is_interrupted_counts_as_far_as_it_came(loaded, prompts):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, "vicuna-1.1", max_new_tokens=40)
    whole = chat.answer("Who art thou?").answer
    chat.reset()
    pieces = []

    def interrupt(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    reply = chat.answer("Who art thou?", interrupt)
    assert reply.stopped == "interrupt"
    assert reply.answer == "".join(pieces)
    assert whole.startswith(reply.answer) and len(reply.answer) < len(whole)
    chat.answer("Why?")
    assert f"ASSISTANT:{reply.answer}</s>USER: Why?" in prompts[-1]


def test_the_tokenizers_own_template(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    own = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(tokenizer, "chat_template", own)
    chat = Chat(model, tokenizer, "auto", system="Be", max_new_tokens=4)
    answer = chat.answer("Hi").answer
    chat.answer("Why?")
    assert prompts == ["<system>Be<user>Hi<assistant>", f"<system>Be<user>Hi<assistant>{answer}<user>Why?<assistant>"]


def test_stop_strings_of_the_template_and_the_users(loaded):
    model, tokenizer = loaded
    assert Chat(model, tokenizer, "vicuna-1.1", stop=["\n"]).stop == ["USER:", "\n"]
    with pytest.raises(UsageError, match="--template"):
        Chat(model, tokenizer, "nothing")


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(in_terminal):
    terminal = in_terminal(["-m", "ropewalk", "chat", "demo", "--temperature", "0", "--max-new-tokens", "1000"])
    terminal.read_until("> ")
    terminal.type("And the LORD said unto Moses,\n")
    terminal.read_until("words")
    terminal.type("\x03")
    terminal.read_until("\n> ", seconds=60)
    terminal.type("Why?\n")
    terminal.read_until(" the ")
    terminal.type("\x03")
    terminal.read_until("\n> ")
    terminal.type("\x04")
    with pytest.raises(OSError, match=r"Input/output|\[Errno 5\]"):  # the program has ended
        terminal.read_until("nothing of the kind", seconds=60)
