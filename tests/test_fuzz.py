"""Two thousand checkpoints with faults (`make fuzz`: 50,000): each is loaded, or refused by an error of ropewalk's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzz_checkpoints.py")


def fuzz(*arguments):
    return subprocess.run([sys.executable, FUZZER, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="watches its workers through /proc")
def test_2000_inputs(tmp_path):
    """In processes of its own, as it forks; the same inputs every time."""
    workers = min(len(os.sched_getaffinity(0)), 2)
    done = fuzz("--seed", 1_000_000, "--count", 2000, "--workers", workers)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    counts = {name: int(count) for count, name in (line.split() for line in done.stdout.splitlines()[1:-2])}
    assert sum(counts.values()) == 2000
    # Most faults are found out, every kind of them, and not every input is refused.
    assert counts["loaded"] > 100
    assert len(counts) >= 10


@pytest.mark.skipif(sys.platform != "linux", reason="watches its workers through /proc")
def test_an_input_can_be_had_again(tmp_path):
    done = fuzz("--seed", 1_000_003, "--count", 1, "--keep", tmp_path / "case")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f", in {tmp_path / 'case'}" in done.stdout
    assert list((tmp_path / "case").iterdir())
