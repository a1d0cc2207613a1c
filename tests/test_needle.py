"""Needles: how prompts are made, what counts as found, the model that was trained for it, and how it was trained."""

import json
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch

import ropewalk
from ropewalk.bench import needle_model
from ropewalk.bench.needle import KEYS, VALUES, Needles, Prompts, chance, prompts, retrieve
from ropewalk.cli import main
from ropewalk.errors import ContextLengthError, FormatError, MissingFileError, UsageError
from ropewalk.shipped import NEEDLE_NAME, held_out_text, needle_folder, resolve


class Letters:
    """A tokenizer of single letters, behind <s>."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def decode(self, tokens):
        return "".join(chr(t) for t in tokens if t != 1)


@pytest.fixture(scope="module")
def trained():
    return ropewalk.load(needle_folder())


@pytest.fixture(scope="module")
def text(trained):
    return torch.tensor(trained[1](held_out_text(), add_special_tokens=False, verbose=False)["input_ids"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_a_prompt_has_its_length_and_the_line_at_its_depth(depth):
    letters = Letters()
    hay = torch.full((500,), ord("-"))
    made = prompts(Needles(letters), hay, 400, depth, 5, 2, generator())
    assert made.tokens.shape == (5, 400)
    assert (made.tokens[:, 0] == 1).all()
    for row, answer in zip(made.tokens.tolist(), made.answers, strict=True):
        written = letters.decode(row)
        start, _, end = written.rpartition("\nThe word of ")
        key, _, value = end.partition(" is ")
        assert answer == len(value) + 1
        assert written.count("The word of") == 4  # the needle, two others, the question
        line = f"\nThe word of {key} is {value}.\n"
        assert start.count(line) == 1
        before, after = start.split(line)
        assert before.count("-") == round(depth * start.count("-"))
        assert len({*before.split("The word of ")[1:], *after.split("The word of ")[1:]}) == 2


def test_the_same_keys_and_text_at_every_depth():
    letters = Letters()
    hay = torch.randint(97, 122, (900,), generator=generator())
    first, second = (prompts(Needles(letters), hay, 300, depth, 4, 1, generator(7)) for depth in (0, 1))
    assert first.answers == second.answers
    assert torch.equal(first.tokens[:, -20:], second.tokens[:, -20:])
    assert torch.equal(first.tokens.sort(-1).values, second.tokens.sort(-1).values)
    assert not torch.equal(first.tokens, second.tokens)


def test_impossible_prompts():
    needles, hay = Needles(Letters()), torch.full((500,), 45)
    with pytest.raises(ContextLengthError, match="length: expected at least"):
        prompts(needles, hay, 60, 0, 1, 2, generator())
    with pytest.raises(ContextLengthError, match="length: expected at most"):
        prompts(needles, hay, 900, 0, 1, 2, generator())
    with pytest.raises(UsageError, match="distractors: expected 0 to 25, found 26"):
        prompts(needles, hay, 400, 0, 1, len(KEYS), generator())

    def joining(text, add_special_tokens=True):
        return {"input_ids": [len(text)]}

    with pytest.raises(FormatError, match="in tokens of its own"):
        Needles(joining).line("Moses", "gold")


class Reader:
    """Copies what stood behind the last occurrence of the last `look` tokens; says `wrong` where there is none."""

    device = torch.device("cpu")

    def __init__(self, look, wrong=0, sure=20.0):
        self.look, self.wrong, self.sure = look, wrong, sure

    def __call__(self, tokens, use_cache):
        logits = torch.zeros(*tokens.shape, 256)
        for row, ids in enumerate(tokens.tolist()):
            for place in range(len(ids)):
                seen = ids[max(place + 1 - self.look, 0) : place + 1]
                ends = [e for e in range(self.look, place + 1) if ids[e - self.look : e] == seen]
                logits[row, place, ids[ends[-1]] if ends else self.wrong] = self.sure
        return SimpleNamespace(logits=logits)


def test_what_counts_as_found():
    made = prompts(Needles(Letters()), torch.full((500,), 45), 200, 0.5, 6, 1, generator())
    right, probabilities = retrieve(Reader(12), made, tokens_per_batch=400)  # looks back over the key
    assert right == [True] * 6
    assert min(probabilities) > 0.99
    assert retrieve(Reader(4), made)[0] != [True] * 6  # "is " alone: the line before last is as good
    # One letter of a value wrong, and all of it is.
    spoilt = made.tokens.clone()
    spoilt[0, -1] += 1
    right, probabilities = retrieve(Reader(12), Prompts(spoilt, made.answers))
    assert right == [False] + [True] * 5
    assert probabilities[0] < 0.01
    # Not sure, but the likeliest: right, and its probability is that of all its letters together.
    right, probabilities = retrieve(Reader(12, sure=1.0), made)
    assert right == [True] * 6
    share = torch.tensor([1.0] + [0.0] * 255).softmax(0)[0].item()
    assert probabilities == pytest.approx([share**n for n in made.answers], rel=1e-4)


def test_chance():
    found = chance(3)
    assert found["any_value"] == 1 / 64 == 1 / len(set(VALUES))
    # By counting: a random line's value among all that four lines can have.
    values = torch.randint(64, (100_000, 4), generator=generator())
    picked = values.gather(1, torch.randint(4, (100_000, 1), generator=generator(1)))[:, 0]
    assert found["value_in_prompt"] == pytest.approx((picked == values[:, 0]).double().mean().item(), abs=0.01)


def test_found_is_what_generate_writes(trained, text):
    model, tokenizer = trained
    made = prompts(Needles(tokenizer), text, 200, 0.2, 6, 3, generator())
    right, _ = retrieve(model, made)
    assert retrieve(model, made, chunk=64)[0] == right
    for row, answer, found in zip(made.tokens, made.answers, right, strict=True):
        written = model.generate(row[None, :-answer], max_new_tokens=answer, do_sample=False)[0, -answer:]
        assert torch.equal(written, row[-answer:]) == found


def test_the_command(capsys, tmp_path):
    """With its rope the model finds lines at four times its original context; with none it finds none there."""
    plot, file = tmp_path / "plot.png", tmp_path / "found.json"
    arguments = [
        "needle",
        "--lengths",
        "128",
        "1024",
        "--depths",
        "0",
        "0.5",
        "--samples",
        "6",
        "--rope",
        "auto",
        "none",
    ]
    assert main([*arguments, "--json", "--plot", str(plot), "--out", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == found
    assert plot.read_bytes().startswith(b"\x89PNG")
    right, none = found["columns"]
    assert {key: found[key] for key in right} == right
    assert right["rope"]["type"] == "partial-ntk"
    assert right["accuracy"].keys() == none["accuracy"].keys() == {"128", "1024"}
    assert right["accuracy"]["1024"].keys() == {"0", "0.5"}
    assert min(right["accuracy"]["128"].values()) >= 5 / 6
    assert min(right["accuracy"]["1024"].values()) >= 5 / 6
    assert min(right["probability"]["1024"].values()) > 0.5
    assert min(none["accuracy"]["128"].values()) >= 0.5
    assert max(none["accuracy"]["1024"].values()) <= 1 / 6
    assert found["samples"] == 6
    assert found["chance"] == chance(3)
    assert main(["needle", "--lengths", "96", "128", "--depths", "1", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "partial-ntk: 100.0 on average\ndepth, length   96  128\n1              100  100\n" in out
    assert "by guessing among all values 1.6, among those in the prompt 26.2" in out


def test_where_the_model_is(monkeypatch, tmp_path):
    assert resolve("needle") == needle_folder()
    assert needle_folder().name == NEEDLE_NAME
    weights = (needle_folder() / "model.safetensors").read_bytes()
    assert json.loads((needle_folder() / "training.json").read_text())["sha256"] == sha256(weights).hexdigest()
    monkeypatch.setattr("ropewalk.shipped.__file__", str(tmp_path / "a/b/c/shipped.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="repository"):
        resolve("needle")
    (tmp_path / "needle").mkdir()
    assert resolve("needle") == "needle"  # a user's own


def test_unpacked_weights(shipped, dequantized_folder):
    found, expected = needle_model.unpacked(shipped), dequantized_folder(shipped)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("seed", range(6))
def test_hiding_lines_to_learn_from(trained, text, seed):
    tokenizer = trained[1]
    needles = Needles(tokenizer)
    whole, as_text, values = needle_model.hide(text[:512], needles, 8, generator(seed))
    assert len(whole) == len(as_text) == len(values) == 512
    lines = [line for line in tokenizer.decode(whole).split("\n") if line.startswith("The word of")]
    assert len(lines) == 2 * len(set(lines)) <= 16  # each stated and asked for
    asked = [tokenizer.decode(token).strip() for token in whole[values == 1]]
    assert sorted(asked) == sorted(line.split()[-1].rstrip(".") for line in set(lines))
    kept = whole[as_text == 1]
    assert torch.equal(kept, text[: len(kept)])
    assert not (as_text & values).any()


def test_a_step_of_tuning(trained, text):
    model = needle_model.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stages = [needle_model.Stage(64, 1, 2), needle_model.Stage(256, 1, 4)]
    saved = []
    log = needle_model.tune(
        model, text[:8192], text[8192:10240], Needles(trained[1]), stages, 0, lambda: saved.append(1)
    )
    assert saved == [1, 1]
    assert [stage["context"] for stage in log["stages"]] == [64, 256]
    assert set(log["held_out_perplexity"]) == {256, 1024}
    assert all(10 < value < 60 for value in log["held_out_perplexity"].values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert needle_model.NAME in needle_model.model_card({**log, "sha256": "0"})
