"""Loading in the benchmark: what is said of each loader, and that one which fails is reported and not the end."""

import json
import os
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from ropewalk.bench import limits, load, load_process, load_rows, model, report, summary
from ropewalk.bench.load_worker import memory, tensor_spans
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.shapes import parse_packing
from ropewalk.cli import main
from ropewalk.errors import RopewalkError

CPU = torch.device("cpu")
LIMITS = limits.Limits(10.0, 10.0, 1e12, {"float32": 1e12})
PACKING = parse_packing("4b-g32-act")
SHAPE = "2x256x512x4x2"
ROW = {
    *(
        "kernel",
        "device",
        "model",
        "bits",
        "group_size",
        "desc_act",
        "sym",
        "dtype",
        "seconds",
        "p20",
        "p80",
        "samples",
    ),
    *("total_seconds", "gb_per_s", "share_of_limit", "times_reading", "ratio_to", "checkpoint_bytes", "peak_bytes"),
    *("peak_p20", "peak_p80", "peak_most", "peak_to_checkpoint", "kept_bytes", "meets", "max_error", "verdict"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def loaded(root, peers, runs=1, **options):
    found = report.Report(CPU, LIMITS, {})
    options = {"dtype": torch.float32, "peers": peers, "runs": runs, **options}
    load.bench_load(found, [SHAPE], [PACKING], root=root, **options)
    return found


def test_load(capsys, root, tmp_path, monkeypatch):
    out, plot = tmp_path / "load.json", tmp_path / "plot.png"
    arguments = ["bench", "load", "--device", "cpu", "--shape", SHAPE, "--runs", 2, "--seconds", 0.01]
    arguments += ["--peers", "transformers-fp16", "safetensors", "--models", root, "--out", out, "--plot", plot]
    # The machine may be small or busy; what does not fit has a test of its own.
    monkeypatch.setattr(load, "available_memory", lambda device: None)
    status = main([str(a) for a in arguments])
    text = capsys.readouterr().out
    assert status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "limit", "results", "skipped"}
    assert found["skipped"] == []
    rows = {row["kernel"]: row for row in found["results"]}
    assert list(rows) == [OURS, "transformers-fp16", "safetensors", "read", "read-reused"]
    assert found["limit"]["page_cache_gb_per_s"] == rows["read"]["gb_per_s"]
    assert found["limit"]["page_cache_reused_gb_per_s"] == rows["read-reused"]["gb_per_s"]
    made = model.packed_model(SHAPE, PACKING, root, CPU, rounded=False)
    for name, row in rows.items():
        assert set(row) >= ROW
        assert (row["model"], row["bits"], row["group_size"], row["samples"]) == (SHAPE, 4, 32, 2)
        assert 0 < row["p20"] <= row["seconds"] <= row["p80"] < row["total_seconds"] + 1
        unpacked = name == "transformers-fp16"
        assert row["checkpoint_bytes"] == (load.float16_bytes(made) if unpacked else made.checkpoint.nbytes())
        assert row["gb_per_s"] == pytest.approx(row["checkpoint_bytes"] / row["seconds"] / 1e9)
        assert row["times_reading"] == pytest.approx(1 / row["share_of_limit"])
        assert row["share_of_limit"] == pytest.approx(row["gb_per_s"] / rows["read"]["gb_per_s"])
        assert row["peak_bytes"] > 0
        assert row["peak_most"] >= row["peak_p80"] >= row["peak_p20"]
        assert row["device_peak_bytes"] is None
        for other in set(rows) - {name}:
            assert row["ratio_to"][other] == pytest.approx(rows[other]["seconds"] / row["seconds"])
    assert rows["read"]["peak_bytes"] > 0.9 * made.checkpoint.nbytes()
    ours, plain = rows[OURS], rows["transformers-fp16"]
    assert ours["dtype"] == "float32"
    assert ours["verdict"] == "ok"
    assert ours["same_logits"]
    assert ours["meets"]["memory"]  # 200 MB are allowed besides
    assert plain["verdict"] == "ok"
    assert plain["first_call_seconds"] > 0
    assert rows["read"]["dtype"] is None
    assert f"{SHAPE}, 4 bits, groups of 32, act-order, symmetric" in text
    assert "times reading (target: at most 1.5: " in text
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    summary.main()
    assert "reading " in capsys.readouterr().out
    assert not [name for name in os.listdir(root) if name.startswith(".")]


def test_one_that_fails_is_reported_with_its_reason(root):
    found = loaded(root, [load.Loader("dead", "nothing"), load.Loader("safetensors", "safetensors")], runs=2)
    assert [row["kernel"] for row in found.results] == ["safetensors", "read", "read-reused"]
    (note,) = found.skipped
    assert (note["kernel"], note["why"]) == ("dead", "KeyError: 'nothing'")
    assert note["failed"]
    assert found.fault(OURS) is None
    assert "KeyError" in str(found.fault("dead"))


def test_our_own_failure_ends_in_exit_1(capsys, root, monkeypatch):
    def peers():
        return [load.Loader(OURS, "nothing")]

    monkeypatch.setattr(load, "load_peers", peers)
    arguments = ["bench", "load", "--device", "cpu", "--shape", SHAPE, "--runs", "1", "--seconds", "0.01", "--json"]
    status = main([*arguments, "--models", str(root)])
    captured = capsys.readouterr()
    assert status == 1
    assert [row["kernel"] for row in json.loads(captured.out)["results"]] == ["read", "read-reused"]
    assert captured.err == "ropewalk bench: ropewalk: KeyError: 'nothing'\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit('no\\nsuch thing')", "the process ended with 1: such thing"),
        ("import os; os.kill(os.getpid(), 9)", r"the process ended by signal 9 \(out of memory\?\)"),
        ('print(\'{"event": "failed", "why": "ValueError: no"}\')', "ValueError: no"),
    ],
)
def test_how_a_process_ended(code, expected):
    with pytest.raises(load_process.LoadError, match=expected):
        load_process.run_worker({}, [sys.executable, "-c", code])


def test_a_process_has_a_terminal_and_its_memory_is_seen(tmp_path, monkeypatch):
    """It holds memory until that was seen, however long a busy machine takes for it."""
    look, seen = load_process._look, tmp_path / "seen"

    def look_and_say(process, before, found):
        look(process, before, found)
        if found.get("peak_anonymous_bytes", 0) > 45e6:
            seen.touch()

    monkeypatch.setattr(load_process, "_look", look_and_say)
    code = f"""
import json, os, sys, time
from ropewalk.bench.load_worker import memory, reset_peak
before = reset_peak()
print(json.dumps({{"event": "imported", **before}}), flush=True)
held, end = bytearray(50_000_000), time.monotonic() + 60
while not os.path.exists({str(seen)!r}) and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.2)
del held
print("\\r50%", file=sys.stderr)
print(json.dumps({{"event": "loaded", "terminal": sys.stderr.isatty()}}), flush=True)
print("no event")
print(json.dumps({{"event": "called", "peak_bytes": memory()["peak"] - before["peak"]}}), flush=True)
"""
    found = load_process.run_worker({}, [sys.executable, "-c", code])
    assert found["terminal"]
    assert 45e6 < found["peak_bytes"] < 60e6
    assert 45e6 < found["peak_anonymous_bytes"] < 60e6
    assert found["peak_file_bytes"] < 10e6
    assert found["total_seconds"] > 0.2


def test_what_does_not_fit_is_skipped_with_its_reason(root, monkeypatch):
    monkeypatch.setattr(load, "available_memory", lambda device: load.SPARE + 50_000_000.0)
    (note,) = loaded(root, load.load_peers()[:1]).skipped  # not even the model that is right in float32
    assert note["kernel"] == "all"
    assert "GB of memory" in note["why"]
    monkeypatch.setattr(load, "_cannot_check", lambda name, packing, device: None)
    found = loaded(root, load.load_peers()[:1])
    assert [note["kernel"] for note in found.skipped] == [OURS, "read"]
    assert "for cached files; 50 MB are left" in found.skipped[0]["why"]
    assert found.skipped[0]["why"].startswith("needs about ")
    assert [row["share_of_limit"] for row in found.results] == [None]
    assert "read-reused" in load_rows.load_table(found.results, OURS)


def test_no_turn_begins_after_the_deadline(root):
    assert [note["why"] for note in loaded(root, [], deadline=0.0).skipped] == ["out of time"]
    found = loaded(root, [], runs=1000, deadline=time.monotonic() + 3)
    assert "of 1000 runs" in found.skipped[0]["why"]
    assert 0 < found.results[0]["samples"] < 1000


@pytest.mark.parametrize("name", ["4b-g32-act", "3b-none", "8b-g64-act-asym"])
def test_a_model_of_random_codes_is_whole_and_lively(root, name):
    packing = parse_packing(name)
    made = model.packed_model(SHAPE, packing, root, CPU, rounded=False)
    before = (made.folder / "model.safetensors").stat().st_mtime_ns
    again = model.packed_model(SHAPE, packing, root, CPU, rounded=False)
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == before
    weight = made.weight("model.layers.1.mlp.down_proj")
    assert weight.act_order == packing.act_order
    assert 0.7 < float(weight.dense().std()) * 512**0.5 < 1.5
    # Other tokens, other logits: a check of them means something.
    one, other = (load._expected(made, ids, CPU)[-1] for ids in ([1, 2, 3], [3, 2, 1]))
    assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.9


def test_the_float16_folder_has_the_same_weights(root):
    made = model.packed_model(SHAPE, PACKING, root, CPU, rounded=False)
    folder = load.float16_folder(made)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        assert sum(span[2] for span in tensor_spans(file)) == sum(t.nbytes for t in load_file(file).values())
    assert sum(t.nbytes for t in tensors.values()) == load.float16_bytes(made)
    layer = "model.layers.1.self_attn.k_proj"
    assert torch.equal(tensors[f"{layer}.weight"], made.weight(layer).dense().half().t())


def test_memory_of_a_process_that_is_gone():
    assert memory()["resident"] > 0
    with pytest.raises((OSError, RopewalkError)):
        memory(2**22 + 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "nothing"],
        ["--pack", "5b-g128"],
        ["--bits", "3"],
        ["--desc-act"],
        ["--runs", "0"],
        ["--peers", "nobody"],
        ["--device", "cpu", "--mode", "int8"],
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys, arguments):
    try:
        status = main(["bench", "load", *arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["tiny-mpt", "tiny-mixtral"])
def test_other_families_load_packed_and_unpacked(root, name):
    """Of random codes, whose norms have both signs: a router that did not follow them would choose by rounding."""
    from transformers import AutoModelForCausalLM

    import ropewalk

    made = model.packed_model(name, PACKING, root, CPU, rounded=False)
    ids = list(range(7))
    expected = load._expected(made, ids, CPU)
    assert float(expected.std()) > 0.1
    ours, _ = ropewalk.load(made.folder, device_map="cpu", dtype="bfloat16")
    unpacked = AutoModelForCausalLM.from_pretrained(load.float16_folder(made), dtype=torch.float32)
    for found, tolerance in ((ours, 0.06), (unpacked, 0.003)):
        with torch.inference_mode():
            logits = found(torch.tensor([ids])).logits[0].float()
        assert float((logits - expected).abs().max() / expected.abs().max()) < tolerance
    if name == "tiny-mixtral":
        gates = [found.model.layers[1].mlp.gate.weight for found in (ours, unpacked)]
        assert torch.equal(gates[0].float(), gates[1])
        assert gates[1].count_nonzero() == 4
