"""Whole models in the benchmark: how they are made, what is said of them, and that wrong ones are found out."""

import importlib.util
import json
import struct

import pytest
import torch
from torch import nn

from ropewalk.bench import decode, gguf, limits, model, plots, report, summary
from ropewalk.bench.peers.decode import decode_peers
from ropewalk.bench.peers.decode.llamacpp import LlamaCpp
from ropewalk.bench.peers.decode.models import Dense, Ropewalk, plain_model
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.peers.weight import random_weight
from ropewalk.cli import main
from ropewalk.loader.load import load
from ropewalk.loader.quant_linear import QuantLinear

CPU = torch.device("cpu")
LIMITS = limits.Limits(10.0, 10.0, 1e12, {"float32": 1e12})
LENGTHS = decode.Lengths(6, 4)
FULL = model.parse_packing("4b-g128")
ROW = {
    *("kernel", "device", "model", "bits", "group_size", "desc_act", "sym", "dtype", "prompt_tokens", "tokens"),
    *("seconds_per_token", "tokens_per_s", "prefill_tokens_per_s", "share_of_limit", "max_error", "ratio_to"),
}
needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def timed(root, peers, packing=FULL):
    found = report.Report(CPU, LIMITS, {})
    decode.bench_decode(found, ["tiny"], [packing], LENGTHS, root=root, dtype=torch.float32, peers=peers, seconds=0.01)
    return found


def test_decode(capsys, root, tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    arguments = ["bench", "decode", "--device", "cpu", "--shape", "tiny", "--tokens", 4, "--prompt-tokens", 6]
    arguments += ["--pack", "4b-g32-act", "3b-g128-asym", "--seconds", 0.01, "--peers", "torch-bf16"]
    status = main([str(a) for a in [*arguments, "--models", root, "--out", out, "--plot", plot]])
    text = capsys.readouterr().out
    assert status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "limit", "results", "skipped"}
    assert {"ropewalk", "ropewalk-bf16", "torch-bf16"} <= {row["kernel"] for row in found["results"]}
    for row in found["results"]:
        assert set(row) >= ROW
        assert (row["model"], row["prompt_tokens"], row["tokens"]) == ("tiny", 6, 4)
        assert row["samples"] % 4 == 0
        assert row["verdict"] in ("ok", "approximate")
        assert row["tokens_per_s"] == pytest.approx(1 / row["seconds_per_token"])
        seconds = row["token_bytes"] / found["limit"]["read_gb_per_s"] / 1e9
        assert row["limit_tokens_per_s"] == pytest.approx(1 / seconds)
        assert row["share_of_limit"] == pytest.approx(seconds / row["seconds_per_token"])
        same = [r for r in found["results"] if r["bits"] == row["bits"] and r is not row]
        assert set(row["ratio_to"]) == {r["kernel"] for r in same}
        for other in same:
            expected = other["seconds_per_token"] / row["seconds_per_token"]
            assert row["ratio_to"][other["kernel"]] == pytest.approx(expected)
        if row["kernel"] == OURS:
            assert sum(row["time_in"].values()) == pytest.approx(1)
            assert min(row["time_in"].values()) > 0
    assert "tiny, 4 bits, groups of 32, act-order, symmetric" in text
    assert "a token of ropewalk spends" in text


class Wrong(Dense):
    """A layer of the model has another sign."""

    def load(self, model, dtype, device, capacity):
        decoder = super().load(model, dtype, device, capacity)
        decoder.model.model.layers[0].mlp.down_proj.weight.data.neg_()
        return decoder


def test_a_wrong_model_is_said_to_be_wrong_and_has_no_speed(root):
    found = timed(root, [Ropewalk(), Wrong("wrong", torch.float32), Dense("right", torch.float32)])
    ours, wrong, right = found.results
    assert wrong["verdict"] == "wrong"
    assert right["verdict"] == "ok"
    assert set(ours["ratio_to"]) == {"right"}
    assert "WRONG" in report.decode_table(found.results, OURS)
    assert found.fault(OURS) is None
    assert "tiny, 4 bits" in str(found.fault("wrong"))
    assert wrong["same_choice"] < 1 == right["same_choice"]


def test_what_does_not_load_or_fit_is_said_and_not_the_end(root, monkeypatch):
    class Failing(Dense):
        def load(self, model, dtype, device, capacity):
            raise ValueError("no such\nmodel")

    found = timed(root, [Failing("failing", torch.float32), Ropewalk()])
    assert [note["why"] for note in found.skipped] == ["ValueError: no such model"]
    assert [row["kernel"] for row in found.results] == [OURS]
    monkeypatch.setattr(decode, "available_memory", lambda device: 1e9)
    (note,) = timed(root, [Dense("dense", torch.float32)]).skipped
    assert "GB of memory, of which 0.0 are left" in note["why"]
    assert timed(root, [LlamaCpp()], model.parse_packing("3b-g32")).skipped[0]["why"] == "has no 3-bit kernel"


@pytest.mark.parametrize("name", ["4b-g128", "4b-g32-act", "3b-none", "8b-g64-act-asym"])
def test_a_model_is_what_its_packing_says_and_made_once(root, name):
    packing = model.parse_packing(name)
    assert packing.name == name
    made = model.packed_model("tiny", packing, root, CPU)
    before = (made.folder / "model.safetensors").stat().st_mtime_ns
    assert model.packed_model("tiny", packing, root, CPU).folder == made.folder
    assert (made.folder / "model.safetensors").stat().st_mtime_ns == before
    assert not list(root.glob(".*"))
    weight = made.weight("model.layers.1.mlp.down_proj")
    assert (weight.in_features, weight.out_features) == (256, 128)
    assert weight.act_order == packing.act_order
    assert 0.04 < float(weight.dense().std()) < 0.1  # 1 / sqrt(256), and what rounding adds
    loaded, _ = load(made.folder, device_map="cpu")
    packed = [module for module in loaded.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == 2 * 7
    # What a token must read: all the layers' bytes, and nothing of zero points that are all the same.
    layers = sum(made.weight(layer).nbytes for layer, _, _ in made.shape.linears())
    assert made.token_bytes(0) == layers + 2 * 128 * (512 + 5) + 2 * 128
    assert made.token_bytes(10) - made.token_bytes(0) == 10 * 2 * 2 * 2 * (2 * 32)
    assert made.dense_count() == sum(p.numel() for p in plain_model(made, torch.float32, CPU).parameters()) - 512 * 128


def test_both_plain_models_are_the_same(root):
    made = model.packed_model("tiny", FULL, root, CPU)
    ids = torch.randint(0, 512, (1, 9))
    eager, late = (plain_model(made, torch.float32, CPU, unpack=unpack)(input_ids=ids).logits for unpack in (1, 0))
    torch.testing.assert_close(eager, late, rtol=0, atol=1e-5)
    assert any(isinstance(module, nn.Linear) for module in plain_model(made, torch.float32, CPU).modules())


@pytest.mark.parametrize("shape", ["1x64x96x2x1", "tiny"])
def test_shapes(shape):
    assert model.parse_shape(shape, model.parse_packing("4b-g32")).head_dim == 32


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "nothing"],
        ["--shape", "2x64x96x3x1"],
        ["--shape", "2x64x96x4x3"],
        ["--shape", "1x60x96x2x1"],
        ["--pack", "5b-g128"],
        ["--pack", "4b-g0"],
        ["--tokens", "0"],
        ["--peers", "nobody"],
        ["--device", "cpu", "--mode", "nothing"],
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys, arguments):
    try:
        status = main(["bench", "decode", *arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_a_gguf_file_has_the_tensors_that_llama_cpp_wants(root, tmp_path):
    made = model.packed_model("tiny", FULL, root, CPU)
    path = tmp_path / "model.gguf"
    gguf.write_gguf(made, path)
    data = path.read_bytes()
    magic, version, tensors, _ = struct.unpack_from("<4sIQQ", data)
    assert (magic, version, tensors) == (b"GGUF", 3, 2 * 9 + 3)
    assert len(data) % 32 == 0
    for name in (b"blk.1.attn_q.weight", b"output_norm.weight", b"token_embd.weight"):
        assert data.count(name) == 1
    blocks = gguf.q4_0(made.weight("model.layers.0.mlp.up_proj")).numpy().tobytes()
    assert data.find(blocks) % 32 == 0 < data.find(blocks)
    assert not path.with_name("model.gguf.part").exists()


def test_rows_for_a_rotation_of_neighbours():
    rows = torch.arange(16)  # two heads of 8 channels
    assert gguf.interleaved(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_q8_0_rounds_to_a_127th():
    matrix = random_weight(64, 8, group_size=32).dense().t().contiguous()
    blocks = gguf.q8_0(matrix)
    assert blocks.shape == (8, 2, 34)
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    found = (blocks[..., 2:].contiguous().view(torch.int8).float() * scales).reshape(8, 64)
    assert float((found - matrix).abs().max()) <= float(matrix.abs().max()) / 127


@needs_llama
def test_llama_cpp_computes_the_same_model_and_a_wrong_one_shows(root, monkeypatch):
    (right,) = timed(root, [LlamaCpp()]).results
    assert right["verdict"] == "approximate"
    assert right["max_error"] < 0.03
    monkeypatch.setattr(gguf, "interleaved", lambda rows, heads: rows)
    (root / "tiny-4b-g128-1-f16.gguf").unlink()
    (wrong,) = timed(root, [LlamaCpp()]).results
    assert wrong["verdict"] == "wrong", wrong["max_error"]


def test_peers_on_each_device():
    names = [peer.name for peer in decode_peers(torch.float32, CPU)]
    assert names[0] == OURS
    assert len(set(names)) == len(names)
    assert "ropewalk-bf16" not in [peer.name for peer in decode_peers(torch.bfloat16, CPU)]
    assert decode_peers(torch.float16, torch.device("cuda"))[1].name == "torch-fp32"


def test_the_summary(capsys, tmp_path, monkeypatch):
    arguments = ["bench", "matmul", "--device", "cpu", "--shape", "256x128", "512x128", "--m", "1", "3", "--pack"]
    arguments += ["4b-g128", "3b-g32", "--seconds", "0.004", "--peers", "torch-bf16", "--out", tmp_path / "matmul.json"]
    assert main([str(a) for a in arguments]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    summary.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("256x128, 4 bits, groups of 128, symmetric, M=1") for line in lines)
    assert any("torch-bf16" in line and "llama.cpp" in line for line in lines)
    assert (tmp_path / "matmul-share.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_ours(tmp_path):
    row = {**dict.fromkeys(ROW, 1), "kernel": "other", "dtype": "float32", "verdict": "ok", "limit_tokens_per_s": 2}
    plots.plot_decode([row], str(tmp_path / "plot.png"), title="", ours=OURS)
    assert (tmp_path / "plot.png").is_file()
