"""What the modes of packed layers on the CPU cost, on the model that ships."""

import json

import pytest
import torch
from torch import nn

from ropewalk import cpu
from ropewalk.bench.modes import REFERENCE, WINDOW, bench_modes, unpack
from ropewalk.cli import main
from ropewalk.errors import MissingPackageError
from ropewalk.gptq.cpu_ops import DEFAULT_MODE, MODES
from ropewalk.loader.load import load
from ropewalk.loader.quant_linear import QuantLinear

needs_kernels = pytest.mark.skipif(not cpu.load(), reason="no kernels for the CPU")


def run_json(capsys, *arguments):
    status = main(["bench", "modes", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


@needs_kernels
def test_int8_is_the_default_since_it_costs_less_than_a_thousandth(capsys, tmp_path):
    """Packing to 4 bits costs the model 0.6 % of perplexity; what comes on top must not matter beside that."""
    out = tmp_path / "modes.json"
    found = run_json(capsys, "--tokens", 2048, "--out", out)
    assert found == json.loads(out.read_text())
    assert (found["model"], found["tokens"], found["rope"]["type"]) == ("demo", 2048, "partial-ntk")
    rows = {row["mode"]: row for row in found["results"]}
    assert list(rows) == [REFERENCE, *MODES]
    for row in rows.values():
        for n in ("256", "1024"):
            assert 10 < row["perplexity"][n] < 60
            expected = rows[REFERENCE]["perplexity"][n]
            assert row["relative_difference"][n] == pytest.approx(row["perplexity"][n] / expected - 1)
    assert rows[REFERENCE]["largest_logit_difference"] == 0
    assert all(abs(difference) < 1e-4 for difference in rows["exact"]["relative_difference"].values())
    assert rows["exact"]["largest_logit_difference"] < 1e-5 * rows["exact"]["largest_logit"]
    assert all(abs(difference) < 1e-3 for difference in rows["int8"]["relative_difference"].values())
    # Activations were rounded indeed.
    assert rows["int8"]["largest_logit_difference"] > 100 * rows["exact"]["largest_logit_difference"]
    assert DEFAULT_MODE == "int8"


@needs_kernels
def test_the_table(capsys):
    assert main(["bench", "modes", "--tokens", "600", "--context", "64", "--threads", "1"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"576 tokens in disjoint windows, logits of the first {WINDOW}"
    assert [line.split()[0] for line in lines] == ["perplexity", REFERENCE, *MODES]
    assert lines[1].count("–") == 2


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [False, True])
def test_the_reference_is_plain_torch(tmp_path, make_checkpoint, reference_model, checkpoint_format, sym):
    """Also with biases, zero points and act-order."""
    weights = make_checkpoint(tmp_path, "qwen2", sym=sym, checkpoint_format=checkpoint_format)
    model, _ = load(tmp_path, device_map="cpu")
    unpack(model)
    layers = [layer for layer in model.modules() if isinstance(layer, (QuantLinear, nn.Linear))]
    assert [type(layer) for layer in layers] == [nn.Linear] * 15
    assert {layer.weight.dtype for layer in layers} == {torch.float32}
    ids = torch.arange(40)[None]
    expected = reference_model(tmp_path, weights)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_without_kernels_there_are_no_modes(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: False)
    with pytest.raises(MissingPackageError, match="expected kernels for the CPU, found none"):
        bench_modes(nn.Identity(), torch.arange(4), [2])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--mode", "int8"], "--mode: expected it for matmul, moe and decode on a CPU, found modes"),
        (["--dtype", "bfloat16"], "--dtype: expected float32 for modes, found bfloat16"),
        (["--plot", "plot.png"], "--plot: expected it for rope, matmul, moe, decode and load, found modes"),
    ],
)
def test_options_of_the_others(capsys, arguments, complaint):
    assert main(["bench", "modes", "--device", "cpu", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_text_that_is_too_short(capsys, tmp_path):
    text = tmp_path / "text"
    text.write_text("In the beginning")
    assert main(["bench", "modes", "--text", str(text)]) == 1
    assert "--text: expected at least 1024 tokens, found" in capsys.readouterr().err
