"""Write tensors and JSON into a model's folder, so that what bears its final name is whole, whenever a process ends.

Everything is written in a hidden folder beside its place (`work_folder`), brought to the disk, and renamed (`publish`).
A process that is killed leaves such a folder; a later one that writes to the same place removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ropewalk.errors import CheckpointError
from ropewalk.loader.tensor_file import Spec, TensorFile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 5_000_000_000
MARK = ".ropewalk-"  # in the names of work folders
_LOCK = "lock"


@dataclass(frozen=True)
class Work:
    """A folder to work in.

    Attributes:
        folder: the folder, empty but for the file of its lock.
        lock: descriptor of the lock, to be passed on to processes that work here, too; None where there are no locks.
    """

    folder: Path
    lock: int | None


@contextlib.contextmanager
def work_folder(beside: Path) -> Iterator[Work]:
    """Yield a hidden folder beside a path, and remove it at the end; first, those that killed processes left there.

    Whoever works in one holds a lock (flock) on a file in it, which the kernel takes from a process that ends, however
    it ends. So whoever gets the lock of a folder that is not its own may remove it.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    for folder in beside.parent.glob(f".{escape(beside.name)}{MARK}*"):
        _remove_if_left(folder)
    work = _make(beside)
    try:
        yield work
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)
        if work.lock is not None:
            os.close(work.lock)


def _make(beside: Path) -> Work:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}{MARK}", dir=beside.parent))
        if fcntl is None:
            return Work(folder, None)
        # Until it is locked, another process may take the folder for one that was left, and remove it.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                os.write(lock, socket.gethostname().encode())
            except OSError:  # a file system without locks: nobody will remove it, either
                pass
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(folder / _LOCK), os.fstat(lock)):
                    return Work(folder, lock)
            os.close(lock)


def _remove_if_left(folder: Path) -> None:
    """Remove a work folder that nobody works in."""
    with contextlib.suppress(OSError):
        if fcntl is None or not ((folder / _LOCK).is_file() or not any(folder.iterdir())):
            return  # not one of ours
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # On a network file system the lock of another machine may not be seen here.
            if os.read(lock, 256) in (b"", socket.gethostname().encode()):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def publish(finished: Path, out: Path) -> None:
    """Give a file or folder its name, in one step, once the disk has all of it.

    Args:
        finished: in a work folder beside `out`.
        out: a file is replaced, an empty folder too.
    """
    if finished.is_dir():
        for path in finished.iterdir():
            _sync(path)
    _sync(finished)
    if os.name == "nt" and finished.is_dir() and out.exists():
        out.rmdir()
    os.replace(finished, out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":
        return  # folders cannot be opened, nor files that are open for reading only be flushed
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_out(out: str | Path) -> Path:
    """Return the absolute path of a folder that is to be written.

    Raises:
        CheckpointError: it has files in it, or cannot be replaced.
    """
    path = Path(out).expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(path, "a new or empty folder to write to", "files in it" if path.is_dir() else "a file")
    if os.path.ismount(path):
        raise CheckpointError(path, "a new or empty folder to write to", "where a disk is mounted; name a folder in it")
    return path


def write_streaming(
    specs: Iterable[Spec], tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write model.safetensors, or, above `shard_bytes`, several files and their index; return the files of tensors.

    Args:
        specs: of all tensors.
        tensors: name -> tensor, in the order of `specs`; one is in memory at a time.
    """
    shards: list[list[Spec]] = [[]]
    held = total = 0
    for spec in specs:
        if shards[-1] and held + spec.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held, total = held + spec.nbytes, total + spec.nbytes
    coming = iter(tensors)
    paths = [folder / name for name in _shard_names(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        with TensorFile(path, shard, {"format": "pt"}) as file:
            for _ in shard:
                file.write(*next(coming))
    write_index([(p, [s.name for s in shard]) for p, shard in zip(paths, shards, strict=True)], total)
    return paths


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Do what `write_streaming` does for tensors of which nothing is known before they come; a file is in memory at
    a time.
    """
    shards: list[tuple[Path, list[str]]] = []
    batch: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(batch, path, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; a model is as public as its folder.
        path.chmod(folder.stat().st_mode & 0o666)
        shards.append((path, list(batch)))
        batch.clear()

    for name, tensor in tensors:
        if batch and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        batch[name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    named = []
    for (path, names), name in zip(shards, _shard_names(len(shards)), strict=True):
        named.append((path.rename(folder / name), names))
    write_index(named, total)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_index(shards: list[tuple[Path, list[str]]], total: int) -> None:
    """Write the index of several files of tensors, beside them; one file needs none.

    Args:
        shards: files, and the names of the tensors in each.
        total: bytes of all tensors.
    """
    if len(shards) > 1:
        weight_map = {name: path.name for path, names in shards for name in names}
        path = shards[0][0].parent / "model.safetensors.index.json"
        write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as transformers does: indented, with a line's end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
