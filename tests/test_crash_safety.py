"""Killed at any moment, what writes leaves nothing that is taken for a checkpoint or a cache, but is none.

A process of its own imports everything, with one thread, and forks a child for each attempt. The child kills itself
(SIGKILL) at the n-th call that changes the disk, in half of a write, or is killed after a time.
"""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import ropewalk
from ropewalk import cpu
from ropewalk.errors import CheckpointError
from ropewalk.loader import write
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.write import MARK, publish, work_folder

KILLS, TIMED = 14, 6  # for each job

DRIVER = """
import json, logging, os, random, shutil, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)  # a child has no threads but its own
import safetensors.torch, transformers  # noqa
import ropewalk
from ropewalk import cpu
from ropewalk.loader import load as _load, quantize as _quantize, convert as _convert, export as _export  # noqa
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.packed_cache import _KEY  # noqa
from ropewalk.loader.write import MARK

job, kills, timed, root = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
logging.getLogger("ropewalk").setLevel(logging.ERROR)
cpu.load()
model = root / "model"
EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "open", "fcntl.flock")


def quantize(out):
    ropewalk.quantize(root / "plain", out, method="rtn", bits=4, group_size=32)


def convert(out):
    ropewalk.convert(model, out, shard_size="60kB", format="gptq_v2")


def export(out):
    ropewalk.export(model, out)


def cache(out):
    ropewalk.load(model, cache_packed=True)


def run(job, out, at=None, delay=None):
    '''Return how the child ended: 0 if it finished, else the signal; and how many events it had.'''
    read, written = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def die():
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)

        def event():
            nonlocal count
            count += 1
            if count == at:
                die()

        def hook(name, arguments):
            if name in EVENTS and not (name == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
                event()

        def counted(function):
            def call(*arguments, **options):
                event()  # before it
                result = function(*arguments, **options)
                event()  # and after
                return result

            return call

        def in_halves(file, data, place):
            done = real(file, data[: len(data) // 2 + 1], place)
            event()
            return done

        real = os.pwrite
        os.pwrite, os.fsync, os.replace = in_halves, counted(os.fsync), counted(os.replace)
        sys.addaudithook(hook)
        try:
            job(out)
            os.write(written, str(count).encode())
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    os.close(written)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    count = os.read(read, 100)
    os.close(read)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), int(count or 0)


def content(out):
    '''All bytes of a file, or of the files in a folder; None where there is none.'''
    if out.is_dir():
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())} or None
    return out.read_bytes() if out.exists() else None


def leftovers(out):
    return [path for path in out.parent.glob(".*") if MARK in path.name]


job = {"quantize": quantize, "convert": convert, "export": export, "cache": cache}[job]
out = root / "out"
if job is cache:
    out = model / ".ropewalk" / "model.safetensors"
    ropewalk.load(model)  # what is imported late is imported once
else:
    job(root / "first")
    shutil.rmtree(root / "first")
began = time.monotonic()
status, events = run(job, out)
took = time.monotonic() - began
assert status == 0 and events > 10, (status, events)
right = content(out)
(out.unlink if out.is_file() else lambda: shutil.rmtree(out))()
_, events = run(job, out)  # as the attempts find it, with all that the first one made around it
assert content(out) == right, "two runs differ"
generator = random.Random(0)
moments = sorted({1 + i * (events - 1) // (kills - 1) for i in range(kills)})
attempts = [("at", n) for n in (events, *moments)]
attempts += [("delay", generator.random() * took * 1.1) for _ in range(timed)]
found = {"killed": 0, "finished": 0, "absent": 0, "whole": 0, "left": 0, "events": events}
before = None  # what is there when an attempt begins
for i, (kind, value) in enumerate(attempts):
    if out.is_dir():
        shutil.rmtree(out)
    elif out.exists():
        out.unlink()
    before = None
    if i % 2 and out.name == "out":
        out.mkdir()  # an empty folder is there already
    if i % 2 and out.name != "out":
        out.parent.mkdir(exist_ok=True)
        before = b"an old cache, of something else"
        out.write_bytes(before)
    status, _ = run(job, out, **{kind: value})
    found["killed" if status else "finished"] += 1
    now = content(out)
    assert now in (before, right), (kind, value, "half of it is there")
    found["whole" if now == right else "absent"] += 1
    left = leftovers(out)
    found["left"] += len(left)
    assert len(left) <= 1, left  # what was left before was removed
    for folder in left:
        try:
            open_checkpoint(folder)
            raise AssertionError("a leftover is taken for a checkpoint")
        except ropewalk.errors.CheckpointError:
            pass
if out.is_dir():
    shutil.rmtree(out)
elif out.exists():
    out.unlink()
assert run(job, out)[0] == 0
assert content(out) == right and not leftovers(out)
found["took"] = took
print(json.dumps(found))
"""


def drive(root, job, kills=KILLS, timed=TIMED):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), job, str(kills), str(timed), str(root)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] >= kills
    assert found["absent"] > 0 and found["left"] > 0
    return found


def test_quantize(tmp_path, make_plain):
    (tmp_path / "plain").mkdir()
    make_plain(tmp_path / "plain")
    drive(tmp_path, "quantize")


def test_convert(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", sym=False)
    assert drive(tmp_path, "convert")["whole"] > 0  # killed after it had its name


def test_export(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "packed", sym=False)
    ropewalk.convert(tmp_path / "packed", tmp_path / "model", shard_size="60kB")  # files that are copied
    assert drive(tmp_path, "export", kills=9, timed=2)["whole"] > 0


@pytest.mark.skipif(not cpu.load(), reason="there are no kernels for the CPU, and so no layout to keep")
def test_cache_packed(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", sym=False)
    assert drive(tmp_path, "cache")["whole"] > 0


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with work_folder(out) as first:
        (first.folder / "half").write_text("x")
        with work_folder(out) as second:
            assert first.folder != second.folder
            assert (first.folder / "half").exists()
        assert (first.folder / "half").exists() and not second.folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_child_still_uses(tmp_path):
    """As GPTQModel's process does when ours is killed."""
    out = tmp_path / "out"
    code = f"""
import os, subprocess, sys
from pathlib import Path
from ropewalk.loader.write import work_folder
with work_folder(Path({str(out)!r})) as work:
    child = subprocess.Popen(["sleep", "60"], pass_fds=(work.lock,))
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".out{MARK}")
    with work_folder(out):
        assert left.exists()
    os.kill(child, 9)
    deadline = time.monotonic() + 10
    while left.exists() and time.monotonic() < deadline:
        with work_folder(out):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_only_looks_like_a_leftover(tmp_path):
    mine = tmp_path / f".out{MARK}notes"
    mine.mkdir()
    (mine / "diary").write_text("x")
    elsewhere = tmp_path / f".out{MARK}elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("another-machine")
    other = tmp_path / f".other{MARK}abc"
    other.mkdir()
    dead = tmp_path / f".out{MARK}dead"
    dead.mkdir()
    with work_folder(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere, other])


def test_many_that_begin_at_once(tmp_path):
    """None finds its folder removed by another that took it for left."""
    wrong = []

    def work():
        for _ in range(40):
            with work_folder(tmp_path / "out") as held:
                try:
                    (held.folder / "x").write_text("x")
                    time.sleep(0.0005)
                    assert (held.folder / "x").read_text() == "x"
                except BaseException as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), work_folder(tmp_path / "out") as held:  # noqa: PT012
        (held.folder / "finished").mkdir()
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


def test_without_locks(tmp_path, monkeypatch):
    """On a file system that has none, nothing is ever taken for left."""

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(write.fcntl, "flock", none)
    with work_folder(tmp_path / "out") as first, work_folder(tmp_path / "out") as second:
        assert first.folder.exists() and second.folder.exists()
    monkeypatch.setattr(write, "fcntl", None)
    with work_folder(tmp_path / "out") as first, work_folder(tmp_path / "out") as second:
        assert first.folder.exists() and second.folder.exists() and first.lock is None
    assert list(tmp_path.iterdir()) == []


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name),
                                                 real_fsync(fd)))  # fmt: skip
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), real_replace(a, b)))
    with work_folder(tmp_path / "out") as work:
        finished = work.folder / "finished"
        finished.mkdir()
        for name in ("a", "b"):
            (finished / name).write_text("x")
        publish(finished, tmp_path / "out")
    assert sorted(order[:2]) == ["a", "b"] and order[2:] == ["finished", "replace", tmp_path.name]
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out")
