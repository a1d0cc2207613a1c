"""Engines in the benchmark: what is asked of their processes, what is said of them, and that wrong ones are found out.

Most of it runs without vLLM, with an engine that is a model of transformers in this process.
"""

import json
import math
import sys
import time

import pytest
import torch

import ropewalk
from ropewalk.bench import decode, decode_rows, engine, engine_process, limits, memory, model, plots_models, report
from ropewalk.bench.engine_process import EngineError, EngineProcess
from ropewalk.bench.peers import engines
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.shapes import parse_packing
from ropewalk.cli import main

CPU = torch.device("cpu")
LIMITS = limits.Limits(10.0, 10.0, 1e12, {"float32": 1e12})
PACKING = parse_packing("4b-g32-act")
ROW = {
    *("kernel", "device", "model", "bits", "group_size", "desc_act", "sym", "dtype", "context", "batch", "tokens"),
    *("prompt_tokens", "seconds_per_token", "tokens_per_s", "prefill_tokens_per_s", "share_of_limit", "max_error"),
    *("ratio_to", "verdict", "p20", "p80", "samples", "peak_bytes", "mode", "engine", "engine_version", "compiled"),
    *("quantization", "threads", "cache_bytes"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


class Stand:
    """An engine's process that is none: our loader's model, asked in its stead.

    Args:
        fault: what is wrong with it.
    """

    made: list["Stand"]

    def __init__(self, threads, mode, fault=None):
        self.threads, self.mode, self.fault, self.model, self.orders, self.closed = threads, mode, fault, None, [], 0

    def close(self):
        self.closed += 1

    def order(self, **order):
        self.orders.append(order)
        if self.model is None:
            if order["quantization"] == "gptq":
                raise EngineError("desc_act=True is no longer\nsupported")
            self.model, _ = ropewalk.load(order["folder"], device_map="cpu", dtype="float32", cpu_mode="exact")
            if self.fault == "weights":
                self.model.model.layers[0].input_layernorm.weight.data.neg_()
            facts = {"version": "0.0", "quantization": order["quantization"], "compiled": True, "nbytes": 1000}
            return facts | {"threads": self.threads}
        if self.fault == "dies" and len(self.orders) > 4:
            raise EngineError("the process ended with 1")
        return self._generate(**order)

    @torch.inference_mode()
    def _generate(self, prompts, tokens, logprobs=None):
        ids = torch.tensor(prompts)
        for _ in range(tokens):
            ids = torch.cat([ids, self.model(ids).logits[:, -1:].argmax(-1)], 1)
        length = len(prompts[0])
        logarithms = self.model(ids).logits[:, length - 1 : -1].log_softmax(-1)
        chosen = ids[:, length:]
        if self.fault == "sequences":
            logarithms, chosen = logarithms.flip(0), chosen.flip(0)
        if self.fault == "nan":
            logarithms = logarithms * math.nan
        found = {"tokens": chosen.tolist(), "prefill": 0.5, "steps": [0.1] * (tokens - 1), "peak_bytes": 100 * tokens}
        if self.fault == "not greedy" and logprobs:
            found["tokens"] = logarithms.topk(2).indices[:, :, 1].tolist()
        if self.fault == "turns":
            found["tokens"][0][0] = len(self.orders)
        top = logarithms.topk(logprobs or 1)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        rows = [[list(zip(i, v, strict=True)) for i, v in zip(*each, strict=True)] for each in pairs]
        return found | {"logprobs": rows if logprobs else None}


def timed(root, lengths=None, peers=None, fault=None, **options):
    """Return a report, and the engines that took part."""
    found, made = report.Report(CPU, LIMITS, {}), []

    def start(threads, mode):
        made.append(Stand(threads, mode, fault))
        return made[-1]

    peers = engines.engine_peers(torch.bfloat16, CPU)[:1] if peers is None else peers
    options = {"root": root, "dtype": torch.bfloat16, "seconds": 0.001, "threads": 3, "start": start, **options}
    engine.bench_engine(found, ["tiny"], [PACKING], lengths or decode.Lengths((6,), 3), peers=peers, **options)
    return found, made


def test_rows(root, tmp_path):
    peers = [
        engines.VllmPeer(OURS, "ropewalk", "int8"),
        engines.VllmPeer("vllm", "gptq"),
        engines.VllmUnpacked("vllm-bf16", None),
    ]
    said = []
    found, made = timed(
        root, decode.Lengths((6, 40), 3, (1, 4)), peers, on_case=lambda rows, skipped: said.append((rows, skipped))
    )
    (note,) = found.skipped
    assert (note["kernel"], note["why"]) == ("vllm", "desc_act=True is no longer supported")
    cases = [(row["batch"], row["context"], row["kernel"]) for row in found.results]
    assert cases == [(b, c, k) for b in (1, 4) for c in (6, 40) for k in (OURS, "vllm-bf16")]
    assert [len(rows) for rows, _ in said] == [0, 2, 2, 2, 2]
    for row in found.results:
        assert set(row) >= ROW
        assert (row["model"], row["prompt_tokens"], row["tokens"], row["dtype"]) == (
            "tiny",
            row["context"],
            3,
            "bfloat16",
        )
        assert (row["engine"], row["engine_version"], row["threads"], row["compiled"]) == ("vllm", "0.0", 3, True)
        assert (row["quantization"], row["mode"]) == (("ropewalk", "int8") if row["kernel"] == OURS else (None, None))
        assert row["verdict"] == "ok"
        assert row["max_error"] < 1e-3
        assert row["same_choice"] == 1
        assert row["seconds_per_step"] == pytest.approx(0.1)
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / 0.1)
        assert row["prefill_tokens_per_s"] == pytest.approx(row["batch"] * row["context"] / 0.5)
        assert row["samples"] % 3 == 0
        assert row["samples"] >= 9  # three turns
        assert row["peak_bytes"] == 1000 + 100 * 4
        assert row["filled_by"] is None
        assert row["limit_tokens_per_s"] == pytest.approx(row["tokens_per_s"] / row["share_of_limit"])
        assert list(row["ratio_to"].values()) == [pytest.approx(1)]
    ours, unpacked = found.results[:2]
    assert unpacked["token_bytes"] > 2 * ours["token_bytes"]
    first, refused, dense = made
    assert [one.closed for one in made] == [1, 1, 1]
    assert (first.threads, first.mode, dense.mode) == (3, "int8", None)
    folder = model.packed_model("tiny", PACKING, root, CPU, rounded=False).folder
    order = first.orders[0]
    assert order["folder"] == str(folder)
    assert refused.orders[0] == order | {"quantization": "gptq"}
    assert dense.orders[0]["folder"].startswith(f"{folder}-float16-")
    assert (order["sequences"], order["at_once"], order["eager"], order["share"]) == (4, 2048, False, None)
    assert order["length"] >= 40 + decode_rows.CHECKED + 1
    assert order["cache_bytes"] >= engine.CACHE
    checks = [one["prompts"] for one in first.orders[1:] if one.get("logprobs")]
    assert [(len(prompts), len(set(map(tuple, prompts)))) for prompts in checks] == [(1, 1), (1, 1), (4, 2), (4, 2)]
    turns = [one for one in first.orders[1:] if one["tokens"] == 4]
    assert {len(one["prompts"][0]) for one in turns} == {6, 40}
    assert all(len(set(map(tuple, one["prompts"]))) == len(one["prompts"]) for one in turns)
    plots_models.plot_decode(found.results, str(tmp_path / "plot.png"), title="", ours=OURS)
    assert (tmp_path / "plot.png").is_file()
    assert "1.00x as fast" in decode_rows.decode_table(found.results[:2], OURS)


@pytest.mark.parametrize("fault", ["weights", "sequences", "nan", "not greedy"])
def test_a_wrong_engine_is_found_out(root, fault):
    found, _ = timed(root, decode.Lengths((6,), 3, (2,)), fault=fault)
    (row,) = found.results
    assert row["verdict"] == "wrong"
    assert math.isfinite(row["max_error"])
    assert "tiny, 4 bits" in str(found.fault(OURS))


def test_a_family_that_vllm_has_dropped_is_no_fault_of_ours(root):
    found, made = report.Report(CPU, LIMITS, {}), []
    peers = engines.engine_peers(torch.bfloat16, CPU)[:1]
    options = {
        "root": root,
        "dtype": torch.bfloat16,
        "seconds": 0.001,
        "threads": 1,
        "start": lambda *_: made.append(1),
    }
    engine.bench_engine(found, ["tiny-mpt"], [PACKING], decode.Lengths((6,), 3), peers=peers, **options)
    assert made == []
    assert [note["why"] for note in found.skipped] == ["is given models of type llama and mixtral only here"]
    assert found.fault(OURS) is None


def test_turns_that_differ_are_said(root):
    found, _ = timed(root, decode.Lengths((6,), 3, (2,)), fault="turns")
    assert found.results[0]["note"].count("its turns differ in their tokens") == 1


def test_an_engine_that_dies_is_said_and_ours_is_a_fault(root):
    found, made = timed(root, fault="dies")
    assert found.results == []
    assert [note["why"] for note in found.skipped] == ["the process ended with 1"]
    assert "ended with 1" in str(found.fault(OURS))
    assert made[0].closed == 1


def test_what_does_not_fit_or_comes_late_is_said(root, monkeypatch):
    found, made = timed(root, deadline=0.0)
    assert [note["why"] for note in found.skipped] == ["out of time"]
    assert made == []
    monkeypatch.setattr(engine, "available_memory", lambda device: memory.SPARE + 1e9)  # for the one that is right
    found, made = timed(root)
    assert made == []
    assert [note["kernel"] for note in found.skipped] == [OURS]
    assert "needs about 2.6 GB of memory, of which 1.0 are left" in found.skipped[0]["why"]
    monkeypatch.setattr(engine, "available_memory", lambda device: memory.SPARE + 1e3)
    found, made = timed(root)
    assert [note["kernel"] for note in found.skipped] == ["all"]


def test_command(capsys, root, tmp_path, monkeypatch):
    made = []

    def start(threads, mode):
        made.append(Stand(threads, mode))
        return made[-1]

    monkeypatch.setattr(engine, "EngineProcess", start)
    monkeypatch.setattr("ropewalk.bench.peers.base.importlib.util.find_spec", lambda name: object())
    plot = tmp_path / "plot.png"
    arguments = ["bench", "decode", "--engine", "vllm", "--device", "cpu", "--shapes", "tiny", "--pack", PACKING.name]
    arguments += ["--context", 6, "--tokens", 2, "--seconds", 0.001, "--models", root, "--json", "--plot", plot]
    assert main([str(argument) for argument in [*arguments, "--peers", "vllm", "--threads", 1]]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["results"]
    assert {row["kernel"] for row in rows} == {one[0] for one in engines.modes()}
    assert {(row["batch"], row["dtype"], row["threads"]) for row in rows} == {(1, "bfloat16", 1), (8, "bfloat16", 1)}
    assert [note["kernel"] for note in found["skipped"]] == ["vllm"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all(one.closed == 1 for one in made)
    monkeypatch.setattr(engine, "EngineProcess", lambda threads, mode: Stand(threads, mode, "weights"))
    assert main([str(argument) for argument in [*arguments, "--peers", "--batch", 1]]) == 1
    captured = capsys.readouterr()
    assert {row["verdict"] for row in json.loads(captured.out)["results"]} == {"wrong"}
    assert "expected right results" in captured.err


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["matmul", "--engine", "vllm"], 2, "--engine: expected it for decode, found matmul"),
        (["decode", "--engine", "other"], 2, "vllm"),
        (["decode", "--engine", "vllm", "--peers", "torch-bf16"], 2, "--peers: expected some of "),
        (["decode", "--engine", "vllm"], 1, "`pip install vllm` brings it"),
    ],
)
def test_bad_usage_is_one_line(capsys, monkeypatch, arguments, status, expected):
    installed = "brings" not in expected
    monkeypatch.setattr("ropewalk.bench.peers.base.importlib.util.find_spec", lambda name: installed or None)
    try:
        found = main(["bench", *arguments, "--device", "cpu"])
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert found == status
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1


# A process that answers with what it was given.
ECHO = """
import json, os, sys
print("not an answer", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order.get("end") is not None:
        print("the last word", file=sys.stderr, flush=True)
        sys.exit(order["end"])
    names = ("OMP_NUM_THREADS", "ROPEWALK_CPU_MODE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE")
    event = "failed" if "why" in order else "done"
    print(json.dumps({"event": event, **order, "names": {name: os.environ.get(name) for name in names}}), flush=True)
"""


def test_a_process(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    process = EngineProcess(3, "exact", [sys.executable, "-c", ECHO])
    try:
        found = process.order(tokens=4)
        assert found == {"tokens": 4, "names": found["names"]}
        assert list(found["names"].values()) == ["3", "exact", "0", None]
        with pytest.raises(EngineError, match=r"^no such thing$"):
            process.order(why="no such thing")
        assert process.order(tokens=5)["tokens"] == 5  # it goes on
        with pytest.raises(EngineError, match="the process ended with 7: the last word"):
            process.order(end=7)
        with pytest.raises(EngineError, match="the process ended with 7"):
            process.order(tokens=4)
    finally:
        process.close()


def test_a_process_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(engine_process, "PATIENCE", 0.2)
    process = EngineProcess(1, command=[sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(EngineError, match="not done after"):
        process.order(tokens=4)
    begin = time.monotonic()
    process.close()
    assert time.monotonic() - begin < 20


def test_the_worker_says_why_it_cannot_start():
    """Without vLLM, that it is missing; with it, what the order lacks."""
    process = EngineProcess(1)
    try:
        with pytest.raises(EngineError, match=r"No module named 'vllm'|KeyError: 'share'"):
            process.order(device="cpu")
    finally:
        process.close()


@pytest.mark.slow
def test_in_vllm(tmp_path, monkeypatch):
    """Ours, checked, and vLLM's own, which refuses act-order.

    In bfloat16 and not compiled: on a processor with AMX vLLM's attention needs what the patch asks of the system.
    """
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    found = report.Report(CPU, LIMITS, {})
    peers = [engines.VllmPeer(OURS, "ropewalk", "exact"), engines.VllmPeer("vllm", "gptq")]
    options = {"root": tmp_path, "dtype": torch.bfloat16, "seconds": 0.001, "threads": 1, "eager": True}
    engine.bench_engine(found, ["tiny"], [PACKING], decode.Lengths((20,), 4, (1, 3)), peers=peers, **options)
    assert [row["kernel"] for row in found.results] == [OURS, OURS]
    for row in found.results:
        assert set(row) >= ROW
        assert row["verdict"] == "ok"
        assert row["same_choice"] > 0.8
        assert (row["quantization"], row["compiled"], row["threads"]) == ("ropewalk", False, 1)
        assert row["samples"] % 4 == 0
        assert row["peak_bytes"] > engine.CACHE
        assert "differ" not in row["note"]
    (note,) = found.skipped
    assert note["kernel"] == "vllm"
    assert "desc_act" in note["why"]
