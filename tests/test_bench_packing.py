"""What packing costs: `ropewalk bench packing`, rounding to nearest; GPTQ's part is in test_gptqmodel.py."""

import json
import math
import shutil

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from ropewalk.bench.modes import unpack
from ropewalk.bench.packing import PACKINGS, Texts, Variant, bench_packing, divide, variants
from ropewalk.bench.perplexity import perplexity
from ropewalk.bench.shapes import Packing
from ropewalk.cli import main
from ropewalk.commands import bench_packing as command
from ropewalk.errors import CheckpointError, ContextLengthError, RopewalkError
from ropewalk.loader.load import load
from ropewalk.loader.write import write_json, write_weights
from ropewalk.shipped import FOLDER, held_out_text

CONTEXT, TOKENS = 128, 512


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    """Return a folder with the shipped model's weights in float16, moved off their grid."""
    folder = tmp_path_factory.mktemp("float")
    model, _ = load(FOLDER, device_map="cpu")
    unpack(model)
    torch.manual_seed(0)
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    write_weights(((name, weight.half()) for name, weight in weights.items()), folder)
    config = json.loads((FOLDER / "config.json").read_text())
    write_json(folder / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})
    for file in FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def run(capsys, *arguments):
    status = main(["bench", "packing", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def logits_of(folder, ids):
    model, _ = load(folder, device_map="cpu", dtype=torch.float32)
    unpack(model)
    with torch.inference_mode():
        return model(ids.view(-1, CONTEXT), use_cache=False).logits[:, :-1].double()


def test_rounding_costs_less_with_more_bits(capsys, tmp_path, float_model):
    options = ["--context", CONTEXT, "--tokens", TOKENS, "--models", tmp_path / "models", "--methods", "rtn"]
    out, plot = tmp_path / "packing.json", tmp_path / "packing.png"
    packs = ["2b-g32", "4b-g32", "4b-none", "8b-g32", "4b-g32-act"]
    found = run(capsys, float_model, *options, "--pack", *packs, "--out", out, "--plot", plot)
    assert found == json.loads(out.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    positions = TOKENS // CONTEXT * (CONTEXT - 1)
    assert {row["positions"] for row in found["results"]} == {positions}
    whole, two, four, four_in_one, eight = found["results"]  # to nearest there is no order to follow
    assert (whole["bits"], whole["kl"], whole["same_top"]) == (None, 0, 1)
    assert [row["bits"] for row in (two, four, four_in_one, eight)] == [2, 4, 4, 8]
    assert two["kl"] > 4 * four["kl"] > 16 * eight["kl"] > 0
    assert four["kl"] < four_in_one["kl"]
    assert two["same_top"] < four["same_top"] <= eight["same_top"] <= 1
    assert two["perplexity"] > four["perplexity"]
    assert eight["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-3)
    assert four["bits_per_weight"] == pytest.approx(4.5)

    folders = sorted((tmp_path / "models").glob("*/*"))
    assert [folder.name for folder in folders] == sorted(f"{pack}-rtn" for pack in packs[:4])
    model, tokenizer = load(float_model, device_map="cpu", dtype=torch.float32)
    ids = torch.tensor(tokenizer(divide(held_out_text()).held_out, verbose=False)["input_ids"])[:TOKENS]
    assert whole["perplexity"] == pytest.approx(perplexity(model, ids, CONTEXT), rel=1e-5)
    expected, packed = (log_softmax(logits_of(folder, ids), -1) for folder in (float_model, folders[0]))
    by_torch = kl_div(packed, expected, reduction="sum", log_target=True) / positions
    assert two["kl"] == pytest.approx(float(by_torch), rel=1e-4)
    assert two["same_top"] == pytest.approx(float((packed.argmax(-1) == expected.argmax(-1)).double().mean()))

    made = {folder: (folder / "config.json").stat().st_mtime_ns for folder in folders}
    assert main(["bench", "packing", str(float_model), *map(str, options), "--pack", "2b-g32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "float16"
    assert lines[3].startswith("2 bits, groups of 32, to nearest")
    assert {folder: (folder / "config.json").stat().st_mtime_ns for folder in folders} == made  # packed once


def test_what_was_measured_before_an_error_is_kept(capsys, tmp_path, float_model, monkeypatch):
    def fail(*_arguments, **_options):
        raise RopewalkError("GPTQModel failed")

    monkeypatch.setattr("ropewalk.bench.packing.quantize", fail)
    out = tmp_path / "packing.json"
    options = ["--tokens", "16", "--context", "16", "--models", str(tmp_path), "--out", str(out)]
    assert main(["bench", "packing", str(float_model), *options]) == 1
    assert "GPTQModel failed" in capsys.readouterr().err
    assert [row["kl"] for row in json.loads(out.read_text())["results"]] == [0]


def test_other_texts_and_models_are_packed_anew(tmp_path, float_model):
    text = held_out_text()
    wanted = [Variant(Packing(8, -1, False, True), "rtn")]
    for calibration in ("One.", "Another."):
        assert (
            len(list(bench_packing(float_model, Texts(calibration, text), wanted, 16, root=tmp_path, tokens=16))) == 2
        )
    assert len(list(tmp_path.iterdir())) == 2


def test_a_text_is_divided():
    text = held_out_text()
    calibration, held_out = divide(text)
    assert sorted((calibration + held_out).splitlines()) == sorted(text.splitlines())
    assert 0.2 < len(calibration) / len(text) < 0.3
    assert calibration[:4000] not in held_out


def test_variants():
    both = variants(PACKINGS, ("gptq", "rtn"))
    assert len(both) == len(set(both)) == 28 + 16
    assert not any(variant.packing.desc_act for variant in both if variant.method == "rtn")
    assert Variant(Packing(3, 32, True, True), "gptq").name == "3b-g32-act-gptq"


def test_what_is_refused(tmp_path, float_model):
    texts = Texts("In the beginning", "In the beginning")
    with pytest.raises(CheckpointError, match="float weights"):
        list(bench_packing(FOLDER, texts, [], 8, root=tmp_path))
    with pytest.raises(ContextLengthError, match="at least one window of 64 tokens"):
        list(bench_packing(float_model, texts, [], 64, root=tmp_path))
    bare = tmp_path / "bare"
    shutil.copytree(float_model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="a tokenizer"):
        list(bench_packing(bare, texts, [], 8, root=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["packing", "--bits", "3"], "--pack: expected it for packing"),
        (["packing", "--dtype", "float16"], "--dtype: expected float32 for packing, found float16"),
        (["packing", "--pack", "5b"], "--pack: expected 4b-g128"),
        (["matmul", "folder"], "FLOAT16-MODEL: expected it for packing, found folder for matmul"),
    ],
)
def test_options_of_the_others(capsys, monkeypatch, tmp_path, arguments, complaint):
    monkeypatch.setattr(command, "_folder", lambda named: tmp_path)
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    assert complaint in capsys.readouterr().err


def test_without_the_model_of_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "DEFAULT_MODEL", tmp_path / "nowhere")
    assert main(["bench", "packing"]) == 1
    assert "expected this model in float16, which a checkout of ropewalk has" in capsys.readouterr().err


def test_perplexity_is_that_of_the_positions(float_model, tmp_path):
    texts = divide(held_out_text())
    (row,) = bench_packing(float_model, texts, [], CONTEXT, root=tmp_path, tokens=CONTEXT)
    assert row["positions"] == CONTEXT - 1
    assert math.log(row["perplexity"]) == pytest.approx(math.log(22), abs=1)
