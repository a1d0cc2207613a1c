"""Whole models in the benchmark: how they are made, what is said of them, and that wrong ones are found out."""

import importlib.util
import json
import struct

import pytest
import torch
from torch import nn

from ropewalk.bench import decode, decode_rows, gguf, limits, memory, model, plots_models, report, summary
from ropewalk.bench.peers import choose
from ropewalk.bench.peers.decode import decode_peers
from ropewalk.bench.peers.decode import models as decode_models
from ropewalk.bench.peers.decode.llamacpp import LlamaCpp
from ropewalk.bench.peers.decode.models import Dense, Ropewalk
from ropewalk.bench.peers.decode.plain import plain_model
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.peers.weight import random_weight
from ropewalk.bench.shapes import parse_packing, parse_shape
from ropewalk.cli import main
from ropewalk.loader.load import load
from ropewalk.loader.quant_linear import QuantLinear

CPU = torch.device("cpu")
LIMITS = limits.Limits(10.0, 10.0, 1e12, {"float32": 1e12})
LENGTHS = decode.Lengths((6,), 4)
FULL = parse_packing("4b-g128")
ROW = {
    *("kernel", "device", "model", "bits", "group_size", "desc_act", "sym", "dtype", "prompt_tokens", "tokens"),
    *("seconds_per_token", "tokens_per_s", "prefill_tokens_per_s", "share_of_limit", "max_error", "ratio_to"),
}
UNFUSED = "ropewalk-unfused"
FAMILIES = ("tiny", "tiny-mpt", "tiny-mixtral")
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
    arguments = ["bench", "decode", "--device", "cpu", "--shapes", "tiny", "--tokens", 4, "--context", 6]
    arguments += ["--pack", "4b-g32-act", "3b-g128-asym", "--seconds", 0.01, "--peers", "torch-bf16", UNFUSED]
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
        reading = row["token_bytes"] / found["limit"]["read_gb_per_s"] / 1e9
        assert row["limit_tokens_per_s"] <= 1 / reading * 1.0001
        assert row["share_of_limit"] == pytest.approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        assert (row["context"], row["batch"]) == (6, 1)
        same = [r for r in found["results"] if r["bits"] == row["bits"] and r is not row]
        assert set(row["ratio_to"]) == {r["kernel"] for r in same}
        for other in same:
            expected = other["seconds_per_token"] / row["seconds_per_token"]
            assert row["ratio_to"][other["kernel"]] == pytest.approx(expected)
        assert ("time_in" in row) == (row["kernel"] == UNFUSED)
        if row["kernel"] == UNFUSED:
            assert sum(row["time_in"].values()) == pytest.approx(1)
            assert min(row["time_in"].values()) > 0
    assert "tiny, 4 bits, groups of 32, act-order, symmetric, context 6" in text
    assert f"a token of {UNFUSED} spends" in text


class Wrong(Dense):
    """A layer of the model has another sign."""

    def load(self, model, dtype, device):
        decoder = super().load(model, dtype, device)
        decoder.model.model.layers[0].mlp.down_proj.weight.data.neg_()
        return decoder


def test_a_wrong_model_is_said_to_be_wrong_and_has_no_speed(root):
    found = timed(root, [Ropewalk(), Wrong("wrong", torch.float32), Dense("right", torch.float32)])
    ours, wrong, right = found.results
    assert wrong["verdict"] == "wrong"
    assert right["verdict"] == "ok"
    assert set(ours["ratio_to"]) == {"right"}
    assert "WRONG" in decode_rows.decode_table(found.results, OURS)
    assert found.fault(OURS) is None
    assert "tiny, 4 bits" in str(found.fault("wrong"))
    assert wrong["same_choice"] < 1 == right["same_choice"]


def test_what_does_not_load_or_fit_is_said_and_not_the_end(root, monkeypatch):
    class Failing(Dense):
        def load(self, model, dtype, device):
            raise ValueError("no such\nmodel")

    found = timed(root, [Failing("failing", torch.float32), Ropewalk()])
    assert [note["why"] for note in found.skipped] == ["ValueError: no such model"]
    assert [row["kernel"] for row in found.results] == [OURS]
    monkeypatch.setattr(decode, "available_memory", lambda device: memory.SPARE + 1.5e6)  # for what to check against
    (note,) = timed(root, [Dense("dense", torch.float32)]).skipped
    assert (note["kernel"], note["model"]) == ("dense", "tiny")
    assert "GB of memory, of which 0.0 are left" in note["why"]
    assert timed(root, [LlamaCpp()], parse_packing("3b-g32")).skipped[0]["why"] == "has no 3-bit kernel"


@pytest.mark.parametrize("name", FAMILIES)
def test_contexts_and_sequences(root, tmp_path, name):
    """Each case is checked: with the wrong keys in the cache, or a sequence in another's place, logits are wrong."""
    found = report.Report(CPU, LIMITS, {})
    lengths = decode.Lengths((6, 160), 2, (1, 3))
    packing = parse_packing("4b-g32-act")
    peers = [Ropewalk(mode="exact"), Dense("dense", torch.float32)]
    decode.bench_decode(found, [name], [packing], lengths, root=root, dtype=torch.float32, peers=peers, seconds=0.002)
    assert found.skipped == []
    cases = [(row["batch"], row["context"], row["kernel"]) for row in found.results]
    assert cases == [(b, c, k) for b in (1, 3) for c in (6, 160) for k in (OURS, "dense")]
    shape = parse_shape(name, packing)
    for row in found.results:
        assert row["verdict"] == "ok"
        assert row["same_choice"] == 1
        assert row["prompt_tokens"] == min(row["context"], 128)
        assert row["filled_by"] == (None if row["context"] == 6 else "keys")
        assert row["seconds_per_step"] == pytest.approx(row["batch"] * row["seconds_per_token"])
        assert row["kv_bytes"] == row["batch"] * row["context"] * 4 * 2 * shape.layers * shape.kv_heads * shape.head_dim
        assert row["peak_bytes"] >= 0
    ours = {(row["batch"], row["context"]): row["token_bytes"] for row in found.results if row["kernel"] == OURS}
    assert ours[1, 160] - ours[1, 6] == pytest.approx(154 * shape.kv_bytes(1, 4))
    grows = ours[3, 6] - ours[1, 6] - 2 * (shape.kv_bytes(6.5, 4) + 2 * shape.hidden)
    assert grows > 0 if name == "tiny-mixtral" else grows == pytest.approx(0)  # more sequences hit more experts
    plots_models.plot_decode(found.results, str(tmp_path / "plot.png"), title="", ours=OURS)
    assert (tmp_path / "plot.png").is_file()
    lines = summary.contexts_summary(found.results).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["6", "1"], ["160", "1"], ["6", "3"], ["160", "3"]]


@pytest.mark.parametrize("fault", ["keys", "sequences"])
def test_a_wrong_cache_is_found_out(root, monkeypatch, fault):
    class Faulty(Dense):
        def load(self, model, dtype, device):
            decoder = super().load(model, dtype, device)
            fill, step = decoder.fill, decoder.step
            if fault == "keys":
                decoder.fill = lambda tokens: (fill(tokens), decoder._cache.layers[0].keys.neg_())
            else:
                decoder.step = lambda tokens: step(tokens.flip(0)).flip(0)
            return decoder

    found = report.Report(CPU, LIMITS, {})
    lengths = decode.Lengths((160,), 2, (2,))
    peers = [Faulty("faulty", torch.float32)]
    decode.bench_decode(found, ["tiny"], [FULL], lengths, root=root, dtype=torch.float32, peers=peers, seconds=0.002)
    (row,) = found.results
    assert row["verdict"] == "wrong"


def test_what_a_case_has_no_room_for_is_said(root, monkeypatch):
    def tried(lengths, peers):
        found = report.Report(CPU, LIMITS, {})
        options = {"root": root, "dtype": torch.float32, "peers": peers, "seconds": 0.002}
        decode.bench_decode(found, ["tiny-mpt"], [FULL], lengths, **options)
        return found

    found = tried(decode.Lengths((6, 9000), 2), [Dense("dense", torch.float32)])
    assert [row["context"] for row in found.results] == [6]
    assert [(note["kernel"], note["why"]) for note in found.skipped] == [("all", "has positions for 8192 tokens")]
    one = Dense("one", torch.float32)
    one.most_sequences = 1
    found = tried(decode.Lengths((6,), 2, (2,)), [one])
    assert [note["why"] for note in found.skipped] == ["is driven with 1 sequence here"]
    # What is needed for the model is there, and for its keys and values is not.
    shape = parse_shape("tiny-mpt", FULL)
    monkeypatch.setattr(shape.__class__, "kv_bytes", lambda self, context, itemsize=2: 1e15 if context else 0)
    (note,) = tried(decode.Lengths((6,), 2), [Dense("dense", torch.float32)]).skipped
    assert "GB of memory" in note["why"]
    monkeypatch.setattr(model, "_disk_free", lambda folder: 1000)
    found = report.Report(CPU, LIMITS, {})
    other = parse_packing("8b-g32")
    decode.bench_decode(found, ["tiny"], [other], LENGTHS, root=root, dtype=torch.float32, peers=[one], seconds=0.002)
    assert "on the disk with" in found.skipped[0]["why"]


def test_the_step_is_compiled_as_generate_compiles_it(root, monkeypatch):
    given, calls = [], []

    def compile(function, **options):
        given.append(options)

        def compiled(**arguments):
            calls.append(tuple(arguments["input_ids"].shape))
            return function(**arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    found = report.Report(CPU, LIMITS, {})
    peers = [Ropewalk(mode="exact", compiled=True)]
    lengths = decode.Lengths((6, 160), 2, (2,))
    decode.bench_decode(found, ["tiny"], [FULL], lengths, root=root, dtype=torch.float32, peers=peers, seconds=0.002)
    assert [row["verdict"] for row in found.results] == ["ok", "ok"]
    assert all(options["mode"] == "reduce-overhead" and options["fullgraph"] is True for options in given)
    assert set(calls) == {(2, 1)}  # steps, and never a prompt
    assert "time_in" not in found.results[0]  # hooks would break the graph


def test_options_of_load_reach_it(root, monkeypatch):
    given = []
    right = decode_models.loading.load

    def load(folder, rope="auto", **options):
        given.append(rope)
        return right(folder, rope=rope, **options)

    monkeypatch.setattr(decode_models.loading, "load", load)
    timed(root, [Ropewalk("ropewalk-variant", rope="none")])
    assert given == ["none"]


@pytest.mark.parametrize("name", ["4b-g128", "4b-g32-act", "3b-none", "8b-g64-act-asym"])
def test_a_model_is_what_its_packing_says_and_made_once(root, name):
    packing = parse_packing(name)
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
    assert made.step_bytes(0) == layers + 2 * 128 * (512 + 5) + 2 * 128
    assert made.step_bytes(10) - made.step_bytes(0) == 10 * 2 * 2 * 2 * (2 * 32)
    assert made.step_bytes(10, 3, 4) - made.step_bytes(0, 3, 4) == 3 * 10 * 4 * 2 * 2 * (2 * 32)
    numbers = sum(p.numel() for p in plain_model(made, torch.float32, CPU).parameters())
    assert made.shape.dense_count() == numbers - 512 * 128
    assert made.shape.parameters() == numbers


@pytest.mark.parametrize("name", FAMILIES)
def test_both_plain_models_are_the_same(root, name):
    made = model.packed_model(name, FULL, root, CPU)
    ids = torch.randint(0, 512, (1, 9))
    eager, late = (plain_model(made, torch.float32, CPU, unpack=unpack)(input_ids=ids).logits for unpack in (1, 0))
    torch.testing.assert_close(eager, late, rtol=0, atol=1e-5)
    assert any(isinstance(module, nn.Linear) for module in plain_model(made, torch.float32, CPU).modules())


@pytest.mark.parametrize(
    "shape",
    ["1x64x96x2x1", "tiny", "llama:1x64x96x2x1", "codellama:1x64x96x2x1", "mpt:1x64x2", "mixtral:1x64x96x2x1x3"],
)
def test_shapes(shape):
    assert parse_shape(shape, parse_packing("4b-g32")).head_dim == 32


@pytest.mark.parametrize(
    ("name", "packing", "gigabytes", "billions"),
    [
        # GB that a token reads, as worked out by hand: bits + 16 / group size for each weight, and a float16 head.
        ("llama-2-13b", "4b-g32", 7.47, 13.0),
        ("codellama-34b", "4b-none", 17.13, 33.7),
        ("codellama-34b", "3b-g128", 13.50, 33.7),
        ("mpt-30b", "4b-g128", 15.98, 30.0),
        ("mixtral-8x7b", "4b-g128", 6.77, 46.7),
    ],
)
def test_true_sizes(name, packing, gigabytes, billions):
    packing = parse_packing(packing)
    shape = parse_shape(name, packing)
    linears = sum(packing.nbytes(k, n) * shape.share_read(layer, 1) for layer, k, n in shape.linears())
    assert (linears + 2 * shape.vocab * shape.hidden) / 1e9 == pytest.approx(gigabytes, rel=0.005)
    assert shape.parameters() / 1e9 == pytest.approx(billions, rel=0.005)


def test_sequences_share_experts():
    shape = parse_shape("mixtral-8x7b", FULL)
    assert shape.share_read("model.layers.0.self_attn.q_proj", 4) == 1
    shares = [shape.share_read("model.layers.0.block_sparse_moe.experts.3.w1", batch) for batch in (1, 2, 1000)]
    assert shares == pytest.approx([2 / 8, 1 - (6 / 8) ** 2, 1])


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
        ["--shapes", "mpt:1x64x96x2x1"],
        ["--shapes", "mixtral:1x64x96x2x1x1"],
        ["--shapes", "opt:1x64x96x2x1"],
        ["--context", "0"],
        ["--batch", "0"],
        ["--plot-share", "share.png"],
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
    (root / f"tiny-4b-g128-{model.RECIPE}-f16.gguf").unlink()
    (wrong,) = timed(root, [LlamaCpp()]).results
    assert wrong["verdict"] == "wrong", wrong["max_error"]


def test_peers_on_each_device():
    chosen, _ = choose(decode_peers(torch.float32, CPU), None, CPU)
    assert not any("compiled" in peer.name for peer in chosen)
    chosen, _ = choose(decode_peers(torch.float32, CPU), ["ropewalk-compiled"], CPU)
    assert "ropewalk-compiled" in [peer.name for peer in chosen]
    gpu = decode_peers(torch.float16, torch.device("cuda"))
    compiled = {peer.name for peer in gpu if "compiled" in peer.name and "cuda" in peer.by_default}
    assert compiled == {"ropewalk-compiled", "torch-fp16-compiled"}
    names = [peer.name for peer in decode_peers(torch.float32, CPU)]
    assert names[0] == OURS
    assert len(set(names)) == len(names)
    assert "ropewalk-bf16" not in [peer.name for peer in decode_peers(torch.bfloat16, CPU)]


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
    plots_models.plot_decode([row], str(tmp_path / "plot.png"), title="", ours=OURS)
    assert (tmp_path / "plot.png").is_file()
