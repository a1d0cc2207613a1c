"""The benchmark of experts: what it prints, and that it checks what it times."""

import json

import pytest
import torch

from ropewalk.bench import limits, moe, report, summary
from ropewalk.bench.peers import choose
from ropewalk.bench.peers.experts import (
    OneByOne,
    Ropewalk,
    Sizes,
    TorchAll,
    Transformers,
    experts_peers,
    random_mixture,
    reference,
)
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.peers.ours import Ropewalk as RopewalkLinear
from ropewalk.bench.peers.torch_linear import TorchLinear
from ropewalk.bench.shapes import parse_packing
from ropewalk.cli import main

CPU = torch.device("cpu")
FAST = limits.Limits(1e6, 1e6, 1e18, {"float32": 1e18})
SIZES = Sizes(4, 64, 96)
DENSE = [OneByOne(TorchLinear("dense", torch.float32)), Transformers("eager"), Transformers("batched_mm")]


def timed(peers, packing="4b-g32", ms=(3,), sizes=SIZES, **options):
    torch.manual_seed(0)
    found = report.Report(CPU, FAST, {})
    options = {"dtype": torch.float32, "seconds": 0.002, "rotate": 1, **options}
    moe.bench_moe(found, [sizes], [parse_packing(packing)], ms, peers=peers, **options)
    return found


def test_moe(capsys, tmp_path, monkeypatch):
    files = {name: tmp_path / f"{name}" for name in ("moe.json", "plot.png", "share.png")}
    arguments = ["bench", "moe", "--device", "cpu", "--shapes", "4x64x128", "6x64x128:3", "--m", 1, 40]
    arguments += ["--pack", "4b-g32-act", "3b-none-asym", "--seconds", 0.004, "--peers", "transformers-grouped"]
    arguments += ["torch-all-experts", "--out", files["moe.json"], "--plot", files["plot.png"]]
    assert main([str(a) for a in [*arguments, "--plot-share", files["share.png"]]]) == 0
    text = capsys.readouterr().out
    found = json.loads(files["moe.json"].read_text())
    assert set(found) == {"machine", "limit", "results", "skipped"}
    names = {row["kernel"] for row in found["results"]}
    assert names >= {OURS, f"{OURS}-one-by-one", "transformers-grouped", "torch-all-experts"}
    assert len(found["results"]) == len(names) * 2 * 2 * 2
    for row in found["results"]:
        assert row["verdict"] in ("ok", "approximate")
        assert (row["K"], row["N"]) == (64, 128)
        assert (row["experts"], row["top_k"]) in {(4, 2), (6, 3)}
        assert row["experts_hit"] == (row["top_k"] if row["M"] == 1 else row["experts"])
        assert set(row["ratio_to"]) == names - {row["kernel"]}
        packing = parse_packing("4b-g32-act" if row["bits"] == 4 else "3b-none-asym")
        layers = 2 * packing.nbytes(64, 128) + packing.nbytes(128, 64)
        if not row["kernel"].startswith(OURS):
            layers = 3 * 64 * 128 * 2  # bfloat16
        nbytes = row["experts_hit"] * layers + 2 * row["M"] * 64 * (4 if row["dtype"] == "float32" else 2)
        assert row["gb_per_s"] == pytest.approx(nbytes / row["seconds"] / 1e9)
    assert "2 of 4 experts of 64x128, 4 bits, groups of 32, act-order, symmetric, M=40" in text
    for name in ("plot.png", "share.png"):
        assert files[name].read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    summary.main()
    assert "3 of 6 experts of 64x128, 3 bits, one group, asymmetric, M=1" in capsys.readouterr().out
    assert (tmp_path / "moe-share.png").is_file()


@pytest.mark.parametrize("packing", ["4b-g32-act", "8b-g32", "3b-none-asym"])
def test_all_of_them_compute_the_same(packing):
    peers = [Ropewalk(mode="exact"), OneByOne(RopewalkLinear(mode="exact")), *DENSE, TorchAll()]
    found = timed([*peers, Transformers("grouped_mm")], packing, (1, 5))
    assert found.skipped == []
    assert {row["verdict"] for row in found.results} == {"ok"}
    assert len(found.results) == 2 * 7
    assert all(row["tolerance"] < 0.2 for row in found.results)


def test_what_is_right_is_the_definition():
    mixture = random_mixture(SIZES, parse_packing("4b-g32-act"), CPU)
    assert torch.equal(mixture.layers[0][0].g_idx, mixture.layers[0][1].g_idx)
    assert not torch.equal(mixture.layers[0][0].g_idx, mixture.layers[1][0].g_idx)
    x, ids, weights = torch.randn(5, 64), torch.rand(5, 4).argsort(1)[:, :2], torch.rand(5, 2)
    both, down = mixture.dense(torch.float32)
    expected = torch.zeros(5, 64)
    for token in range(5):
        for place, expert in enumerate(ids[token].tolist()):
            gate, up = (both[expert] @ x[token]).chunk(2)
            expected[token] += weights[token, place] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(reference(mixture, x, ids, weights, torch.float32), expected, rtol=1e-4, atol=1e-4)
    assert 0.3 < float(expected.std()) < 10


def test_a_wrong_expert_is_said_to_be_wrong_and_has_no_speed():
    class Wrong(Transformers):
        """One expert's down is that of another one."""

        def prepare(self, mixture, dtype):
            module = super().prepare(mixture, dtype)
            module.down_proj = torch.nn.Parameter(mixture.dense(dtype)[1].roll(1, 0), requires_grad=False)
            return module

    wrong = Wrong("eager")
    wrong.name = "wrong"
    found = timed([Ropewalk(), wrong, Transformers("eager")], ms=(1,))
    ours, off, right = found.results
    assert [row["verdict"] != "wrong" for row in (ours, off, right)] == [True, False, True]
    assert set(ours["ratio_to"]) == {"transformers-eager"}
    assert "4 experts" in str(found.fault("wrong"))
    assert found.fault(OURS) is None


def test_who_takes_no_part_says_why(monkeypatch):
    class Failing(Transformers):
        def prepare(self, mixture, dtype):
            raise ValueError("no such\nkernel")

    failing = Failing("eager")
    failing.name = "failing"
    monkeypatch.setattr(Transformers, "MOST_COPIED", 100)
    found = timed([failing, Transformers("batched_mm"), TorchAll(), Ropewalk()], ms=(2, 129))
    reasons = [(note["kernel"], note.get("M"), note["why"]) for note in found.skipped]
    assert reasons == [
        ("failing", None, "ValueError: no such kernel"),
        ("transformers-batched", 2, "would copy 0 GB of weights"),
        ("transformers-batched", 129, "would copy 0 GB of weights"),
        ("torch-all-experts", 129, "is timed up to 128 tokens"),
    ]
    monkeypatch.setattr(moe, "available_memory", lambda device: 1e9)
    (note,) = timed([Ropewalk()]).skipped
    assert note["kernel"] == "all"
    assert "GB of memory" in note["why"]
    assert [note["why"] for note in timed([Ropewalk()], deadline=0.0).skipped] == ["out of time"]


def test_every_copy_has_its_turn():
    used = []

    class Spy(Ropewalk):
        def prepare(self, mixture, dtype):
            right = super().prepare(mixture, dtype)

            def call(*given):
                used.append(id(mixture))
                return right(*given)

            return call

    found = timed([Spy()], rotate=10**9)
    assert found.results[0]["copies"] == 8
    assert len(set(used)) == 8


def test_peers():
    peers = experts_peers(CPU)
    names = [peer.name for peer in peers]
    assert names[0] == OURS
    assert len(set(names)) == len(names)
    chosen, missing = choose(peers, None, CPU)
    assert {"transformers-grouped", "transformers-eager", "transformers-batched", "torch-all-experts"} <= {
        peer.name for peer in chosen
    }
    _, missing = choose(peers, ["marlin-one-by-one"], CPU)
    assert missing == {"marlin-one-by-one": "runs on cuda only"}
