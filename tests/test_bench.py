"""The benchmarks: what they print, that they check what they time, and that they time what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ropewalk.cpu
from ropewalk.bench import limits, matmul, report, rope, timing
from ropewalk.bench.peers import OURS, choose, matmul_peers, rotary_peers
from ropewalk.bench.peers.base import Peer
from ropewalk.bench.peers.llamacpp import q4_0
from ropewalk.bench.peers.ours import Ropewalk
from ropewalk.bench.peers.rotary import Ropewalk as RopewalkRotary
from ropewalk.bench.peers.rotary import Transformers
from ropewalk.bench.peers.torch_linear import TorchInt4, TorchLinear
from ropewalk.bench.peers.weight import random_weight
from ropewalk.cli import main
from ropewalk.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
ROW = {
    *("kernel", "device", "bits", "group_size", "desc_act", "sym", "dtype", "M", "N", "K"),
    *("seconds", "gb_per_s", "share_of_limit", "max_error", "ratio_to"),
}
FAST = limits.Limits(1e6, 1e6, 1e18, {"float32": 1e18})  # a machine next to which all of them are slow
SETTING = matmul.Setting(128, 64, 4, 32, False, True)


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def timed(peers, setting=SETTING, ms=(3,), **options):
    found = report.Report(CPU, FAST, {})
    options = {"dtype": torch.float32, "seconds": 0.002, "rotate": 1, **options}
    matmul.bench_matmul(found, [setting], ms, peers=peers, **options)
    return found


class Wrong(TorchLinear):
    """One output is a little off."""

    def __init__(self):
        super().__init__("wrong", torch.float32)

    def prepare(self, weight, dtype):
        right = super().prepare(weight, dtype)

        def product(x):
            y = right(x)
            y[-1, -1] += 1
            return y

        return product


class Failing(Peer):
    name = "failing"

    def prepare(self, weight, dtype):
        raise ValueError("no such\nkernel")


class FailingLater(Peer):
    name = "failing later"
    dtypes = (torch.float32,)

    def prepare(self, weight, dtype):
        calls = []
        right = TorchLinear("right", dtype).prepare(weight, dtype)

        def product(x):
            calls.append(x)
            if len(calls) > 4:
                raise RuntimeError("too often")
            return right(x)

        return product


@pytest.mark.parametrize("device", DEVICES)
def test_matmul(capsys, tmp_path, device):
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    arguments = ["bench", "matmul", "--device", device, "--shapes", "256x128", "--m", 1, 5, "--seconds", 0.004]
    arguments += ["--bits", 4, 3, "--group-size", 64, "--no-desc-act", "--desc-act", "--asym"]
    status, text, _ = run(
        capsys,
        *arguments,
        "--peers",
        "torch-bf16",
        "torch-int4",
        "--out",
        out,
        "--plot",
        plot,
        "--plot-share",
        tmp_path / "share.png",
    )
    assert status == 0
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert set(found) >= {"machine", "limit", "results"}
    assert found["machine"]["threads"] >= 1
    assert found["machine"]["torch"] == torch.__version__
    assert found["limit"]["read_gb_per_s"] > 0
    assert found["limit"]["flops"] > 0
    rows = found["results"]
    # torch's int4 has neither 3 bits nor act-order.
    others = [row for row in rows if not row["kernel"].startswith(OURS)]
    assert len(others) == 2 * (4 + 1)
    ours = {row["kernel"] for row in rows} - {"torch-bf16", "torch-int4"}
    assert OURS in ours
    assert len(rows) == len(others) + len(ours) * 2 * 4
    for row in rows:
        assert set(row) >= ROW
        assert "in_features" not in row
        assert row["seconds"] > 0
        assert 0 < row["share_of_limit"] < 2
        assert row["p20"] <= row["seconds"] <= row["p80"]
        assert row["verdict"] in ("ok", "approximate")
        assert row["copies"] >= 8
        assert (row["K"], row["N"], row["sym"]) == (256, 128, False)
        for name, ratio in row["ratio_to"].items():
            case = {key: row[key] for key in ("bits", "desc_act", "M")}
            (other,) = [r for r in rows if r["kernel"] == name and case.items() <= r.items()]
            assert ratio == pytest.approx(other["seconds"] / row["seconds"])
    assert {(row["kernel"], row["dtype"]) for row in rows} >= {("torch-bf16", "bfloat16"), ("torch-int4", "bfloat16")}
    assert "256x128, 3 bits, groups of 64, act-order, asymmetric, M=5" in text
    assert "not timed: torch-int4: has no 3-bit kernel" in text
    assert {note["kernel"] for note in found["skipped"]} == {"torch-int4"}


@pytest.mark.parametrize("device", DEVICES)
def test_rope(capsys, device):
    arguments = ["bench", "rope", "--device", device, "--shape", "4x2x32", "--m", 1, 7, "--seconds", 0.004]
    status, text, err = run(capsys, *arguments, "--dtype", "bfloat16", "--peers", "transformers", "--json")
    assert status == 0, err
    assert len(text.splitlines()) == 1
    found = json.loads(text)
    assert found["limit"]["copy_gb_per_s"] > 0
    assert [row["kernel"] for row in found["results"]] == ["ropewalk", "ropewalk-in-place", "transformers"] * 2
    for row in found["results"]:
        assert set(row) >= ROW
        assert (row["N"], row["K"], row["dtype"]) == (6 * 32, 32, "bfloat16")
        assert row["verdict"] == "ok" or row["kernel"] == "transformers"
        assert 0 < row["share_of_limit"] < 2


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_each_mode_of_ours_has_a_row(capsys, mode):
    if not ropewalk.cpu.load():
        pytest.skip("no kernels for the CPU here")
    other = {"exact": "int8", "int8": "exact"}[mode]
    arguments = ["bench", "matmul", "--device", "cpu", "--shape", "256x128", "512x64", "--m", 2, "--mode", mode]
    arguments += ["--pack", "4b-g64", "3b-g32-act", "--seconds", 0.004, "--peers"]
    status, text, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    rows = json.loads(text)["results"]
    packed = [(4, 64, False), (4, 64, False), (3, 32, True), (3, 32, True)]
    assert [(row["bits"], row["group_size"], row["desc_act"]) for row in rows[::2]] == packed
    assert [row["kernel"] for row in rows] == [OURS, f"{OURS}-{other}"] * 4
    assert [row["mode"] for row in rows] == [mode, other] * 4
    verdicts = {"exact": "ok", "int8": "approximate"}
    assert [row["verdict"] for row in rows] == [verdicts[row["mode"]] for row in rows]


def test_rounding_activations_to_int8_is_approximate_and_not_wrong():
    """With a scale for each row, which is the worst there is, and as long as a row of any model gets."""
    setting = matmul.Setting(22016, 256, 4, 128, False, True)

    class Rounding(TorchLinear):
        def prepare(self, weight, dtype):
            right = super().prepare(weight, dtype)

            def product(x):
                scale = x.abs().amax(-1, keepdim=True) / 127
                return right(torch.round(x / scale) * scale)

            return product

    for row in timed([Rounding("rounding", torch.float32)], setting, (1, 64)).results:
        assert row["verdict"] == "approximate"


def test_a_wrong_result_is_said_to_be_wrong_and_has_no_speed():
    found = timed([Ropewalk(), Wrong(), TorchLinear("right", torch.float32)])
    ours, wrong, right = found.results
    assert [row["verdict"] for row in found.results] == ["ok", "wrong", "ok"]
    assert set(ours["ratio_to"]) == {"right"}
    assert set(right["ratio_to"]) == {"ropewalk"}
    assert wrong["max_error"] == pytest.approx(1, abs=0.01)
    assert "WRONG" in report.rows_table(found.results, OURS).splitlines()[2]
    assert found.fault(OURS) is None  # it is not ours


def test_our_own_wrong_result_ends_in_exit_1(capsys, monkeypatch):
    monkeypatch.setattr(Ropewalk, "prepare", lambda self, weight, dtype: Wrong().prepare(weight, dtype))
    arguments = ["bench", "matmul", "--device", "cpu", "--shape", "128x64", "--m", 1, "--seconds", 0.002, "--peers"]
    status, text, err = run(capsys, *arguments, "--json")
    assert status == 1
    assert json.loads(text)["results"][0]["verdict"] == "wrong"  # what was measured is there all the same
    assert len(err.splitlines()) == 1
    assert re.search("expected right results, found [12] wrong ones, the first at 128x64, 4 bits", err)


@pytest.mark.parametrize("shape", [(3, 63), (3, 64)])
def test_a_result_of_another_shape_or_of_nan_is_wrong(shape):
    class Nothing(Wrong):
        def prepare(self, weight, dtype):
            return lambda x: torch.full(shape, float("nan"))

    (row,) = timed([Nothing()]).results
    assert row["verdict"] == "wrong"
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_peers_failure_is_one_line_and_not_the_end():
    found = timed([Failing(), FailingLater(), Ropewalk()])
    assert [row["kernel"] for row in found.results] == ["ropewalk"]
    assert [(note["kernel"], note["why"]) for note in found.skipped] == [
        ("failing", "ValueError: no such kernel"),
        ("failing later", "RuntimeError: too often"),
    ]
    assert found.fault(OURS) is None
    assert "too often" in str(found.fault("failing later"))


def test_every_copy_has_buffers_of_its_own_and_each_has_its_turn():
    prepared, used = [], []

    class Spy(TorchLinear):
        def prepare(self, weight, dtype):
            prepared.append(weight)  # keeps it alive, or its address could come again
            right = super().prepare(weight, dtype)

            def product(x):
                used.append(weight.qweight.data_ptr())
                return right(x)

            return product

    found = timed([Spy("spy", torch.float32)], rotate=10 * 128 * 64 * 4)
    addresses = [weight.qweight.data_ptr() for weight in prepared]
    assert len(set(addresses)) == len(addresses) == found.results[0]["copies"] == 10
    assert used[-10:] != used[-1:] * 10
    assert used[:20] == addresses * 2  # warming up
    measured = used[21:]  # after the check
    assert measured == [addresses[i % 10] for i in range(len(measured))]


def test_how_many_copies():
    assert timing.copies(8_912_896, CPU) == 18  # 4096x4096, 4 bits, groups of 128
    assert timing.copies(200_000_000, CPU) == 1
    assert timing.copies(100, CPU) == 192


def test_timings():
    assert timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Timing(3.0, 2.0, 4.0, 5)
    count = {"fast": 0, "slow": 0}

    def sampler(name, seconds):
        def sample():
            count[name] += 1
            return seconds

        return sample

    found, failed = timing.measure({"fast": sampler("fast", 1e-6), "slow": sampler("slow", 1.0)}, 0.01)
    assert not failed
    assert found["fast"].seconds == 1e-6
    assert found["slow"].samples >= 3
    assert count["fast"] > found["fast"].samples  # the first of each turn is not counted


def test_nothing_begins_after_the_deadline():
    found = timed([Ropewalk()], deadline=0.0)
    assert found.results == []
    assert [note["why"] for note in found.skipped] == ["out of time"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("sym", [True, False])
def test_random_weights_are_what_they_say(bits, group_size, sym):
    weight = random_weight(96, 64, bits=bits, group_size=group_size, desc_act=True, sym=sym)
    rows = weight.g_idx.long()
    expected = (weight.codes().float() - weight.zeros().float()[rows]) * weight.scales.float()[rows]
    assert torch.equal(weight.dense(), expected)
    assert 1 < float((torch.randn(256, 96) @ weight.dense()).std()) < 10
    x = torch.randn(3, 96)
    torch.testing.assert_close(Ropewalk().prepare(weight.clone(), torch.float32)(x), x @ expected)


@pytest.mark.parametrize("sym", [True, False])
def test_torchs_int4_computes_the_same_weight(sym):
    weight = random_weight(256, 128, group_size=32, sym=sym)
    x = torch.randn(4, 256).bfloat16()
    found = TorchInt4().prepare(weight.clone(), torch.bfloat16)(x)
    expected = x.float() @ weight.dense()
    assert float((found.float() - expected).abs().max()) < 0.01 * float(expected.abs().max())


@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_llama_cpps_blocks_hold_the_same_weight(group_size):
    weight = random_weight(128, 32, group_size=group_size)
    blocks = q4_0(weight)
    assert blocks.shape == (32, 4, 18)
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
    found = (torch.cat([low, high], -1).float() - 8) * scales
    assert torch.equal(found.reshape(32, 128).t(), weight.dense())


def test_positions_and_frequencies_of_the_rotary_benchmark():
    inputs = rope.make_inputs(rope.Heads(4, 2, 64), 5, torch.float32, CPU)
    assert inputs.position_ids.tolist() == [[16379, 16380, 16381, 16382, 16383]]
    assert not inputs.q.is_contiguous()  # as attention has them
    other = inputs.clone()
    assert other.q.stride() == inputs.q.stride()
    assert other.q.data_ptr() != inputs.q.data_ptr()
    for a, b in zip(RopewalkRotary().prepare(inputs)(), Transformers().prepare(inputs)(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_limits():
    found = limits.measure_limits(CPU, 0.004, nbytes=1 << 24)
    assert found.read_gb_per_s >= found.copy_gb_per_s > 0
    assert found.flops == max(found.flops_by_dtype.values())
    assert FAST.least_seconds(1e15, 1e15) == (1.0, "read")
    assert FAST.least_seconds(1e9, 1e18) == (1.0, "flops")


def test_peers():
    for peers in (matmul_peers(), rotary_peers()):
        names = [peer.name for peer in peers]
        assert names[0] == OURS
        assert len(set(names)) == len(names)
        chosen, _ = choose(peers, None, CPU)
        assert chosen[0].name == OURS
        assert [peer.name for peer in choose(peers, [], CPU)[0]] == [p.name for p in chosen if p.name.startswith(OURS)]
        _, missing = choose(peers, ["conch"], CPU)
        assert missing == {"conch": "runs on cuda only"}
        with pytest.raises(UsageError, match=r"--peers: expected some of .*, found 'nobody'"):
            choose(peers, ["nobody"], CPU)


@pytest.mark.parametrize(
    "arguments",
    [
        ["matmul", "--shape", "nothing"],
        ["matmul", "--shape", "64x0"],
        ["matmul", "--shape", "64x64x64"],
        ["matmul", "--shape", "100x64"],
        ["matmul", "--group-size", "0"],
        ["matmul", "--peers", "nobody"],
        ["matmul", "--device", "abacus"],
        ["matmul", "--device", "cuda:99"],
        ["matmul", "--seconds", "0"],
        ["matmul", "--out", "/nowhere/out.json"],
        ["rope", "--plot", "/nowhere/out.png"],
        ["matmul", "--bits", "5"],
        ["matmul", "--pack", "4b-g128-none"],
        ["rope", "--device", "cpu", "--mode", "exact"],
        ["matmul", "--m", "0"],
        ["rope", "--shapes", "mpt-30b"],
        ["matmul", "--shapes", "tiny"],
        ["moe", "--shapes", "llama-2-13b"],
        ["moe", "--shapes", "4x64x96:5"],
        ["moe", "--shapes", "4x64x96:two"],
        ["moe", "--shapes", "4x60x96"],
        ["moe", "--peers", "torch-int4"],
        ["moe", "--plot-share", "/nowhere/out.png"],
        ["load", "--plot-share", "out.png"],
        ["rope", "--shape", "4x3x32"],
        ["rope", "--peers", "torch-int4"],
        ["nothing"],
        [],
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys, arguments):
    try:
        status = main(["bench", *arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_the_script_for_a_gpu_rehearsed_on_the_cpu(tmp_path):
    script = ROOT / "bench" / "on_gpu.sh"
    command = [script, "--device", "cpu", "--dry-run", "--no-install", "--python", sys.executable, "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("rope", "moe", "matmul-quick", "matmul-128x64", "matmul-128x64-settings")
    for name in (*names, "decode-tiny-mixtral"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert {row["kernel"] for row in found["results"]} >= {OURS}
        assert (tmp_path / f"{name}.png").is_file()
    assert "0 failures" in (tmp_path / "tests.log").read_text()
    assert "skipped" in (tmp_path / "sanitizer.log").read_text()
    bad = subprocess.run([script, "--stages", "nothing"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
