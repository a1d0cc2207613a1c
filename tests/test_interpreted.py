"""Every test of a Triton kernel (test_*_triton*.py), in a process in which Triton interprets on the CPU.

On a machine with a GPU the same files run in the main process too, on the GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.glob("test_*_triton*.py"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this very process")
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_interpreted(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    print(done.stdout[-200:])
