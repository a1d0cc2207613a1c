"""The fresh process in which `ropewalk bench load` loads a model: a job as JSON on stdin, lines of JSON on stdout.

    python -m ropewalk.bench.load_worker < job.json

A job has "loader" (one of LOADERS), "folder", "files" (those with the tensors), "device", "dtype", "threads" (None for
torch's choice), "touch" (bytes of memory to touch first, see `touch_memory`), "prompt" (token ids) and "logits" (the
file to write them to). The lines are {"event": "imported"}, {"event": "loaded"} and {"event": "called"} with what was
measured up to there, or {"event": "failed", "why"}. Nothing but the standard library is imported before the job says
what to load.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Job = dict[str, Any]
PIECE = 4 << 20  # bytes that a thread reads at a time

# What loading and calling a model takes of transformers and accelerate, which import it late by themselves, besides the
# model's own modules.
LATE = (
    "accelerate.big_modeling",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.tokenization_llama",
)


def main() -> int:
    """Do the job; return the exit status."""
    job = json.load(sys.stdin)
    tell = keep_stdout()
    try:
        _work(job, tell)
    except Exception as error:
        tell("failed", why=reason(error))
    sys.stderr.flush()
    # Threads and exit handlers of what was imported are no part of loading.
    os._exit(0)


def keep_stdout() -> Callable[..., None]:
    """Keep stdout for lines of JSON, and return a function of an event and what was found that writes one.

    What others print there, from Python or beneath it, ends on stderr.
    """
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(event: str, **found: Any) -> None:
        print(json.dumps({"event": event, **found}), file=lines, flush=True)

    return tell


def reason(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _work(job: Job, tell: Callable[..., None]) -> None:
    load = LOADERS[job["loader"]](job)
    device = _Device(job["device"])
    gc.collect()
    touch_memory(job.get("touch", 0))
    disk = _from_disk()
    before = reset_peak()
    tell("imported", **before)
    begin = time.perf_counter()
    model = load()
    device.wait()
    seconds = time.perf_counter() - begin
    after = memory()
    tell(
        "loaded",
        seconds=seconds,
        peak_bytes=after["peak"] - before["peak"],
        kept_bytes=after["resident"] - before["resident"],
        disk_bytes=None if disk is None else (_from_disk() or 0) - disk,
        device_peak_bytes=device.peak(),
    )
    found: dict[str, Any] = {}
    if hasattr(model, "generate"):
        found["first_call_seconds"] = _first_call(model, job, device)
    tell("called", peak_bytes_called=memory()["peak"] - before["peak"], **found)


def _first_call(model: Any, job: Job, device: _Device) -> float:
    """Call a model for the first time, and once more for the logits to check, which it writes; return the seconds of
    the first.
    """
    import torch
    from safetensors.torch import save_file

    from ropewalk.bench.peers.ours import set_mode

    ids = torch.tensor([job["prompt"]], device=model.device)
    with torch.inference_mode():
        begin = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        device.wait()
        seconds = time.perf_counter() - begin
        set_mode(model, "exact")  # what int8 activations cost is no matter of loading
        logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu().contiguous()
    save_file({"logits": logits}, job["logits"])
    return seconds


class _Device:
    """A device that is there, its context made: that takes a while and memory, whatever is loaded."""

    def __init__(self, name: str):
        self._cuda: Any = None
        if name.startswith("cuda"):
            import torch

            torch.empty(1, device=name)
            self._cuda, self._name = torch.cuda, name
            self._cuda.reset_peak_memory_stats(name)

    def wait(self) -> None:
        """Wait for what was started there."""
        if self._cuda is not None:
            self._cuda.synchronize(self._name)

    def peak(self) -> int | None:
        """Return how many bytes were allocated there at most; None on a CPU."""
        return None if self._cuda is None else int(self._cuda.max_memory_allocated(self._name))


def _ropewalk(job: Job) -> Callable[[], Any]:
    """`ropewalk.load`, as a user calls it: with its bar where stderr is a terminal, and with the tokenizer."""
    _import("ropewalk.loader.quantizer", *_late(job))
    from ropewalk import cpu
    from ropewalk.loader.load import load

    _set_threads(job)
    if job["device"] == "cpu":
        cpu.load()
    return lambda: load(job["folder"], device_map=job["device"], dtype=job["dtype"])[0]


def _transformers(job: Job) -> Callable[[], Any]:
    """`from_pretrained` of model and tokenizer."""
    import torch

    _import(*_late(job))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _set_threads(job)

    def load() -> Any:
        AutoTokenizer.from_pretrained(job["folder"])
        dtype = getattr(torch, job["dtype"])
        return AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype, device_map=job["device"]).eval()

    return load


def _gptqmodel(job: Job) -> Callable[[], Any]:
    """`GPTQModel.load`, which loads the tokenizer too and chooses kernels by itself."""
    import torch

    _import(*_late(job))
    from gptqmodel import GPTQModel

    _set_threads(job)
    dtype = getattr(torch, job["dtype"])
    return lambda: GPTQModel.load(job["folder"], device=job["device"], dtype=dtype).model.eval()


def _safetensors(job: Job) -> Callable[[], Any]:
    """`safetensors.torch.load_file`; on a CPU it maps the file, so that reading begins where a page is touched."""
    import torch
    from safetensors.torch import load_file

    _set_threads(job)

    def load() -> Any:
        tensors = [load_file(file, device=job["device"]) for file in job["files"]]
        for tensor in (tensor for held in tensors for tensor in held.values()):
            tensor.reshape(-1).view(torch.uint8)[::4096].max()
        return tensors

    return load


def _read(job: Job) -> Callable[[], Any]:
    """Reading alone, into memory that is kept: a new buffer for each tensor, in ordinary pages, on all cores."""

    def read() -> Any:
        pieces, buffers = [], []
        for file in job["files"]:
            for path, offset, nbytes in tensor_spans(Path(file)):
                buffers.append(_buffer(nbytes))
                pieces += [(path, offset + at, buffers[-1][at : at + PIECE]) for at in range(0, nbytes, PIECE)]
        _read_pieces(pieces)
        return buffers

    return read


def _buffer(nbytes: int) -> memoryview:
    """Return memory that nothing has touched yet; large blocks of malloc are made in the same way."""
    if not nbytes or not hasattr(mmap, "MAP_ANONYMOUS"):
        return memoryview(bytearray(nbytes))
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _read_reused(job: Job) -> Callable[[], Any]:
    """Reading alone, through one buffer for each core that is used again: what no loader that keeps anything does."""

    def read() -> Any:
        pieces = []
        for file in job["files"]:
            for path, offset, nbytes in tensor_spans(Path(file)):
                pieces += [(path, offset + at, min(PIECE, nbytes - at)) for at in range(0, nbytes, PIECE)]
        _read_pieces(pieces)

    return read


# As "loader" has them; each imports what it needs, and returns a function that loads.
LOADERS: dict[str, Callable[[Job], Callable[[], Any]]] = {
    "ropewalk": _ropewalk,
    "transformers": _transformers,
    "gptqmodel": _gptqmodel,
    "safetensors": _safetensors,
    "read": _read,
    "read-reused": _read_reused,
}


def _late(job: Job) -> tuple[str, ...]:
    """Return what is to be imported before the time begins."""
    family = json.loads(Path(job["folder"], "config.json").read_text())["model_type"]
    return (*LATE, f"transformers.models.{family}.modeling_{family}")


def _import(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


def _set_threads(job: Job) -> None:
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])


def tensor_spans(file: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, offset, bytes) of each tensor of a safetensors file, as they lie there."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    yield from ((file, 8 + length + begin, end - begin) for begin, end in spans)


def _read_pieces(pieces: list[tuple[Path, int, Any]]) -> None:
    """Read (file, offset, memory or a number of bytes to read into the thread's own) by a thread for each core.

    Raises:
        EOFError: a file that is shorter than its header says.
    """
    from concurrent.futures import ThreadPoolExecutor
    from threading import local

    own = local()
    files = {path: os.open(path, os.O_RDONLY) for path, _, _ in pieces}

    def read(piece: tuple[Path, int, Any]) -> None:
        path, offset, memory = piece
        if isinstance(memory, int):
            if not hasattr(own, "memory"):
                own.memory = memoryview(bytearray(PIECE))
            memory = own.memory[:memory]
        while len(memory):
            count = os.preadv(files[path], [memory], offset)
            if count == 0:
                raise EOFError(f"{path} ends {len(memory)} bytes too early")
            memory, offset = memory[count:], offset + count

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(read, pieces))
    finally:
        for opened in files.values():
            os.close(opened)


def touch_memory(nbytes: int) -> None:
    """Take so much memory, write to every page of it, and give it back.

    A virtual machine gets memory from its host when a page is first touched, and may give it back when it is free:
    on the machine of our records that takes 3 seconds for each GB, whatever touches it. That is no matter of loading.
    """
    if not nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    import ctypes

    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, nbytes)
        del first


def reset_peak() -> dict[str, int]:
    """Begin to measure the peak of this process's resident memory anew; return `memory()` of now."""
    # Where that does not go the peak of the imports counts, and less is found than there is.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory()


def memory(process: int | str = "self") -> dict[str, int]:
    """Return bytes of a process's memory: "peak" and "resident", and of the latter "anonymous" and "file" (which
    has shared memory in it) where the system tells.

    Raises:
        OSError: the process is gone.
    """
    status = Path(f"/proc/{process}/status")
    if not status.is_file() and process == "self":
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak": most, "resident": most}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    kept = {key: 1024 * int(value.split()[0]) for key, value in lines.items() if key.startswith(("Vm", "Rss"))}
    if "VmHWM" not in kept:
        raise ProcessLookupError(f"process {process} has ended")
    file = kept["RssFile"] + kept["RssShmem"]
    return {"peak": kept["VmHWM"], "resident": kept["VmRSS"], "anonymous": kept["RssAnon"], "file": file}


def _from_disk() -> int | None:
    """Return how many bytes this process had fetched from a disk; None where that is not told."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(lines["read_bytes"])


if __name__ == "__main__":
    sys.exit(main())
