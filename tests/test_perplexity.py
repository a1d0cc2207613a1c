"""Perplexity: which tokens count, what they count, in which pieces they are read, and the command's table."""

import json
import math
import sys
import types

import pytest
import torch

import ropewalk
from ropewalk.bench.dataset import dataset_text
from ropewalk.bench.perplexity import logits_from, perplexity, windows
from ropewalk.cli import main
from ropewalk.errors import ContextLengthError, MissingPackageError, UsageError
from ropewalk.loader.quantizer import install_rope
from ropewalk.loader.rope import decide_rope


class Model:
    """Gives the token two places back half of the probability, where the context reaches so far."""

    device = torch.device("cpu")
    vocabulary = 8

    def __call__(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, self.vocabulary)
        guess = torch.nn.functional.one_hot(ids, self.vocabulary).float() * math.log(self.vocabulary - 1)
        logits[:, 1:] = guess[:, :-1]  # position t guesses for t + 1 what stood at t - 1
        return type("Out", (), {"logits": logits})


def test_windows():
    assert windows(10, 4) == [(0, 3), (4, 3)]
    assert windows(8, 4) == [(0, 3), (4, 3)]
    assert windows(10, 4, stride=2) == [(0, 3), (2, 2), (4, 2), (6, 2)]
    assert windows(3, 4) == []


def test_disjoint_windows_by_hand():
    # a b a b …: from the third token of a window on, the model is right with probability 1/2, before that it has 1/8.
    ids = torch.tensor([1, 2] * 16)
    for context in (4, 8, 32):
        scored = context - 1
        expected = math.exp((math.log(8) + (scored - 1) * math.log(2)) / scored)
        assert perplexity(Model(), ids, context) == pytest.approx(expected, rel=1e-5)


def test_sliding_windows_count_every_token_once():
    ids = torch.tensor([1, 2] * 16)
    expected = math.exp((math.log(8) + 30 * math.log(2)) / 31)
    assert perplexity(Model(), ids, 8, stride=4) == pytest.approx(expected, rel=1e-5)


def test_batches_do_not_matter():
    ids = torch.randint(0, 8, (100,), generator=torch.Generator().manual_seed(0))
    done = []
    one = perplexity(Model(), ids, 10, tokens_per_batch=1, progress=done.append)
    assert sum(done) == 100
    assert one == pytest.approx(perplexity(Model(), ids, 10, tokens_per_batch=1000), rel=1e-6)


def test_impossible_lengths():
    ids = torch.arange(8)
    for context, stride in ((1, None), (9, None), (4, 4), (4, 0)):
        with pytest.raises(ContextLengthError):
            perplexity(Model(), ids, context, stride=stride)


@pytest.fixture
def seen():
    """Return a function that has a model note the shapes of tokens and logits that go through it."""

    def watch(model):
        shapes = []
        forward = model.forward

        def noting(tokens, logits_to_keep=0, **options):
            made = forward(tokens, logits_to_keep=logits_to_keep, **options)
            shapes.append((tuple(tokens.shape), made.logits.shape[1]))
            return made

        model.forward = noting
        return shapes

    return watch


@pytest.mark.parametrize("arch", ["airophin", "mistral", "mpt", "mixtral"])
@pytest.mark.parametrize("stride", [None, 24])
def test_chunks_do_not_matter(make_float_model, seen, arch, stride):
    # Mistral's windows of attention are shorter than a chunk, and than what the cache holds.
    sizes = {"sliding_window": 16} if arch == "mistral" else {}
    model = make_float_model(arch, **sizes)[1].float()
    ids = torch.randint(3, 96, (260,), generator=torch.Generator().manual_seed(0))
    whole = perplexity(model, ids, 100, stride=stride, chunk=None)
    shapes = seen(model)
    # The last chunk is shorter, of a single token, and as long as the others.
    for chunk in (36, 33, 50):
        shapes.clear()
        found = perplexity(model, ids, 100, stride=stride, chunk=chunk, tokens_per_batch=1)
        assert found == pytest.approx(whole, rel=1e-4)
        assert max(tokens[1] for tokens, _ in shapes) == chunk
        assert max(logits for _, logits in shapes) <= chunk
        if stride is not None:  # most windows begin with tokens that do not count
            assert min(logits for _, logits in shapes) == 1


def test_chunks_do_not_matter_to_logits(make_float_model):
    model = make_float_model("airophin")[1].float()
    ids = torch.randint(3, 96, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
    for first in (0, 50, 71, 99):
        places, parts = zip(*logits_from(model, ids, first, 24), strict=True)
        assert places[0] == first
        torch.testing.assert_close(torch.cat(parts, 1), expected[:, first:], atol=1e-4, rtol=1e-4)


def test_a_rope_that_follows_the_length_is_read_whole(make_float_model, seen):
    model = make_float_model("airophin", rope_scaling={"rope_type": "dynamic", "factor": 4.0})[1].float()
    install_rope(model, decide_rope(model.config.to_dict(), "dynamic:factor=4,original=32"))
    ids = torch.randint(3, 96, (200,), generator=torch.Generator().manual_seed(0))
    whole = perplexity(model, ids, 100, chunk=None)
    shapes = seen(model)
    assert perplexity(model, ids, 100, chunk=32) == pytest.approx(whole, rel=1e-6)
    assert all(tokens[1] == 100 for tokens, _ in shapes)


def run_json(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


FEW = ("--context", "64", "256", "--tokens", "1024")


def test_several_ropes_are_columns(capsys, tmp_path, shipped):
    plot, file = tmp_path / "plot.png", tmp_path / "found.json"
    arguments = ["perplexity", "demo", *FEW, "--rope", "auto", "none", "linear:4", "--cpu-mode", "exact"]
    found = run_json(capsys, *arguments, "--plot", plot, "--out", file)
    assert json.loads(file.read_text()) == found
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [column["name"] for column in found["columns"]] == ["auto (partial-ntk)", "none", "linear:4"]
    assert {key: found[key] for key in found if key != "columns"} == found["columns"][0]
    ids = None
    for column, rope in zip(found["columns"], ("auto", "none", "linear:4"), strict=True):
        # A rope that is changed is as good as one that is loaded.
        model, tokenizer = ropewalk.load(shipped, rope=rope)
        ids = torch.tensor(tokenizer((shipped / "heldout.txt").read_text(), verbose=False)["input_ids"])[:1024]
        assert column["rope"]["type"] == {"auto": "partial-ntk", "none": "default", "linear:4": "linear"}[rope]
        assert column["tokens"] == 1024
        for n in (64, 256):
            assert column["perplexity"][str(n)] == pytest.approx(perplexity(model, ids, n), rel=1e-5)
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "perplexity over 1,024 tokens, disjoint windows"
    assert lines[1].split() == ["context", "auto", "(partial-ntk)", "none", "linear:4"]
    assert lines[2].split() == ["64", *(f"{column['perplexity']['64']:.3f}" for column in found["columns"])]


def test_several_models_are_columns(capsys, shipped):
    models = ["demo", shipped]
    found = run_json(capsys, "perplexity", *models, *FEW, "--text", shipped / "heldout.txt", "--stride", "32")
    assert [column["model"] for column in found["columns"]] == [str(model) for model in models]
    assert [column["name"] for column in found["columns"]] == ["demo", "strand-4m-pntk-1k-gptq"]
    assert found["columns"][0]["perplexity"] == found["columns"][1]["perplexity"]
    assert found["stride"] == 32


def test_one_column_keeps_its_shape(capsys):
    found = run_json(capsys, "perplexity", "demo", "--context", "64", "--tokens", "256")
    assert set(found) == {"model", "rope", "tokens", "stride", "perplexity", "name"}


class Rows(dict):
    column_names = property(list)


def test_a_data_set(monkeypatch, capsys, shipped):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "nothing":
            raise FileNotFoundError("no such data set")
        return Rows(label=[1]) if name == "numbers" else Rows(text=["one", "two " * 300])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert dataset_text("wikitext:wikitext-2-raw-v1:validation") == "one\n\n" + "two " * 300
    found = run_json(capsys, "perplexity", shipped, "--dataset", "folder", "--context", "64")
    assert found["tokens"] >= 256
    assert asked == [("wikitext", "wikitext-2-raw-v1", "validation"), ("folder", None, "test")]
    with pytest.raises(UsageError, match=r"NAME.* found nothing: no such data set"):
        dataset_text("nothing")
    with pytest.raises(UsageError, match="expected a column text or content or sentence in numbers, found label"):
        dataset_text("numbers")
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(MissingPackageError, match=r"ropewalk\[datasets\]"):
        dataset_text("wikitext")
