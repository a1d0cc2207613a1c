"""The side of `bench.load` that starts a fresh process, draws its terminal, and looks at its memory while it loads."""

from __future__ import annotations

import json
import os
import queue
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ropewalk.bench.load_worker import memory
from ropewalk.bench.report import Row
from ropewalk.errors import RopewalkError

SAMPLE = 0.02  # seconds between two looks at the memory of a process that loads
PATIENCE = 1800  # seconds that a process may take


class LoadError(RopewalkError):
    """A loader that failed in its process."""


def run_worker(job: Mapping[str, Any], command: Sequence[str] | None = None) -> Row:
    """Do a job of `load_worker` in a fresh process, whose stderr is a terminal where the system has such.

    Args:
        command: of the process; by default `load_worker`, in this Python.

    Returns:
        what its events tell, and "total_seconds" from the start of the process to the model, "peak_anonymous_bytes"
        and "peak_file_bytes": the most that was seen of each, above what the imports took.

    Raises:
        LoadError: it failed, or ended without a word.
    """
    command = command or [sys.executable, "-m", "ropewalk.bench.load_worker"]
    shown, terminal = _terminal()
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if terminal is None else terminal,
        text=True,
        env=_environment(),
    )
    words = bytearray()
    events: queue.Queue[tuple[float, Row] | None] = queue.Queue()
    readers = [threading.Thread(target=put_events, args=(process.stdout, events), daemon=True)]
    if terminal is not None:
        os.close(terminal)
        readers.append(keep_words(partial(os.read, shown, 1 << 16), words))
    elif process.stderr is not None:
        read = partial(process.stderr.buffer.read1, 1 << 16)  # type: ignore[attr-defined]
        readers.append(keep_words(read, words))
    for reader in readers:
        reader.start()
    try:
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        except BrokenPipeError:
            pass  # how it ended says more
        return _follow(process, events, begin, words)
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join(timeout=5)
        if terminal is not None:
            os.close(shown)


def _terminal() -> tuple[int, int | None]:
    """Return both ends of a new terminal of 80 columns; (-1, None) where there are none."""
    if not hasattr(os, "openpty"):
        return -1, None
    import fcntl
    import termios

    shown, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    return shown, terminal


def _environment() -> dict[str, str]:
    """Return the environment without what the command sets to keep libraries quiet: a user's process draws bars."""
    quiet = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
    kept = {name: value for name, value in os.environ.items() if name not in quiet}
    return {"TERM": "xterm", **kept, "HF_HUB_OFFLINE": "1"}


def keep_words(read: Callable[[], bytes], words: bytearray) -> threading.Thread:
    """Return a thread that keeps the end of what a process prints, as `read` gives it."""
    return threading.Thread(target=_keep_words, args=(read, words), daemon=True)


def put_events(lines: Any, events: queue.Queue[tuple[float, Row] | None]) -> None:
    """Put (when, event) of each line of JSON of a process into a queue, and None at the end."""
    for line in lines:
        try:
            events.put((time.perf_counter(), json.loads(line)))
        except ValueError:
            continue  # not ours
    events.put(None)


def _keep_words(read: Callable[[], bytes], words: bytearray) -> None:
    """Keep the end of what a process prints; a terminal must be read, or what draws on it waits."""
    try:
        while piece := read():
            words += piece
            del words[:-4096]
    except OSError:
        pass  # how the end of a terminal looks


def _follow(
    process: subprocess.Popen[str], events: queue.Queue[tuple[float, Row] | None], begin: float, words: bytearray
) -> Row:
    """Gather what a process tells, and look at its memory while it loads."""
    found: Row = {}
    before: dict[str, int] | None = None
    loading = False
    while True:
        try:
            item = events.get(timeout=SAMPLE)
        except queue.Empty:
            if loading and before is not None:
                _look(process.pid, before, found)
            if time.perf_counter() - begin > PATIENCE:
                raise LoadError(f"not done after {PATIENCE} s") from None
            continue
        if item is None:
            break
        at, event = item
        kind = event.pop("event", None)
        if kind == "failed":
            raise LoadError(event["why"])
        if kind == "imported":
            before, loading = event, True
            continue
        found |= event
        if kind == "loaded":
            found["total_seconds"], loading = at - begin, False
        if kind == "called":
            return found
    raise LoadError(how_it_ended(process.wait(), words))


def how_it_ended(code: int, words: bytearray) -> str:
    """Return in one line how a process ended: its status, and the last line of what it printed."""
    last = words.decode(errors="replace").replace("\r", "\n").strip().rpartition("\n")[2].strip()
    how = f"by signal {-code}{' (out of memory?)' if code == -9 else ''}" if code < 0 else f"with {code}"
    return f"the process ended {how}{f': {last}' if last else ''}"


def _look(process: int, before: Mapping[str, int], found: Row) -> None:
    """Note how much memory a process holds, by kind, if that is more than ever."""
    try:
        now = memory(process)
    except (OSError, KeyError):
        return
    for kind in ("anonymous", "file"):
        if kind in before and kind in now:
            key = f"peak_{kind}_bytes"
            found[key] = max(found.get(key, 0), now[kind] - before[kind])
