"""Plans: which file counts, what is refused in one, and the tuner, rehearsed through the interpreter."""

import json
import os
import subprocess
import sys

import pytest

from ropewalk.errors import FormatError
from ropewalk.gptq.plans import Plan, device_slug, parse_plans, read_plans, user_folder

GOOD = {
    "measured": "somewhere",
    "programs_per_multiprocessor": 3,
    "plans": [{"max_m": 8, "kernel": "matmul", "block_m": 8, "bits": [3]}, {"max_m": None, "kernel": "dense"}],
}


def test_the_users_plans_come_first(tmp_path, monkeypatch):
    shipped = read_plans("default")
    monkeypatch.setenv("ROPEWALK_TUNED", str(tmp_path))
    assert user_folder() == tmp_path
    assert read_plans("default") == shipped
    (tmp_path / "default.json").write_text(json.dumps(GOOD))
    plans = read_plans("default")
    assert (plans.measured, plans.programs_per_multiprocessor) == ("somewhere", 3)
    assert plans.choose(8, 3) == Plan(8, "matmul", 8, bits=(3,))
    assert plans.choose(8, 4) == Plan(None, "dense")
    monkeypatch.delenv("ROPEWALK_TUNED")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "ropewalk" / "tuned"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "the form of gptq/tuned/default.json"),
        ("[]", "the form of gptq/tuned/default.json"),
        ({"plans": [{"max_m": None, "kernel": "dense", "colour": 1}]}, "colour"),
        ({"programs_per_multiprocessor": None}, "the form of"),
        ({"plans": [{"max_m": None, "kernel": "fast"}]}, "found 'fast'"),
        ({"plans": [{"max_m": None, "kernel": "matmul", "block_n": 96}]}, "found block_n 96"),
        ({"plans": [{"max_m": 8, "kernel": "dense"}]}, "one for any number of tokens"),
    ],
)
def test_other_files_are_refused_by_name(change, message):
    text = change if isinstance(change, str) else json.dumps({**GOOD, **change})
    with pytest.raises(FormatError, match=message) as caught:
        parse_plans(text, "my.json")
    assert str(caught.value).startswith("my.json: plans: expected")


def test_device_slug():
    assert device_slug("NVIDIA H200") == "nvidia-h200"
    assert device_slug("NVIDIA GeForce RTX 4090 ") == "nvidia-geforce-rtx-4090"


def ropewalk(*arguments, **environment):
    command = [sys.executable, "-m", "ropewalk", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_tuner_writes_plans_that_are_read_back(tmp_path):
    done = ropewalk(
        *("tune", "--device", "cpu", "--shape", "128x64", "--bits", "4", "--m", "1", "--seconds", "0.001", "--json"),
        TRITON_INTERPRET="1",
        ROPEWALK_TUNED=str(tmp_path / "plans"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    file = tmp_path / "plans" / "cpu.json"
    assert result["file"] == str(file)
    plans = parse_plans(file.read_text(), str(file))
    assert plans.measured.startswith("cpu, torch ")
    assert plans.choose(1, 4).kernel == "matmul"
    assert plans.choose(1000, 4).kernel == "dense"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu"), "expected a GPU, found cpu"),
        (("--device", "cuda:77"), "found 'cuda:77'"),
        (("--device", "cpu", "--shape", "12"), "expected"),
        (("--seconds", "0"), "expected a positive number"),
    ],
)
def test_bad_usage_is_one_line(arguments, message):
    done = ropewalk("tune", *arguments, TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
