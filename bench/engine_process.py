"""The side of `bench.engine` that starts processes with an engine in them and gives them orders."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ropewalk.bench.load_process import PATIENCE, how_it_ended, keep_words, put_events
from ropewalk.bench.report import Row
from ropewalk.errors import RopewalkError


class EngineError(RopewalkError):
    """An engine that did not start, or failed at what it was to do."""


class EngineProcess:
    """A process of `engine_worker`.

    Args:
        threads: that it computes with, on a CPU.
        mode: of our kernels for the CPU; None for their default.
        command: of the process; by default `engine_worker`, in this Python.
    """

    def __init__(self, threads: int, mode: str | None = None, command: Sequence[str] | None = None):
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "ropewalk.bench.engine_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(threads, mode),
        )
        assert self._process.stdin is not None and self._process.stdout is not None and self._process.stderr is not None
        self._orders = self._process.stdin
        self._answers: queue.Queue[tuple[float, Row] | None] = queue.Queue()
        self._words = bytearray()
        read = partial(self._process.stderr.buffer.read1, 1 << 16)  # type: ignore[attr-defined]
        self._readers = [
            threading.Thread(target=put_events, args=(self._process.stdout, self._answers), daemon=True),
            keep_words(read, self._words),
        ]
        for reader in self._readers:
            reader.start()

    def order(self, **order: Any) -> Row:
        """Give an order, and return what answers it.

        Raises:
            EngineError: it was not done.
        """
        with contextlib.suppress(BrokenPipeError):  # how it ended says more
            print(json.dumps(order), file=self._orders, flush=True)
        try:
            answer = self._answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise EngineError(f"not done after {PATIENCE} s") from None
        if answer is None:
            self._answers.put(None)  # for the next order, too
            code = self._process.wait()
            self._readers[1].join(timeout=5)
            raise EngineError(how_it_ended(code, self._words))
        _, found = answer
        if found.pop("event") == "failed":
            raise EngineError(found["why"])
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(BrokenPipeError):  # an order that nobody read
                stream.close()  # type: ignore[union-attr]


def _environment(threads: int, mode: str | None) -> Mapping[str, str]:
    own = {
        # The engine's core in the process itself, where it sleeps when nothing is asked of it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if mode is not None:
        own["ROPEWALK_CPU_MODE"] = mode
    kept = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}  # it has precedence
    return {**kept, **own}
