"""Reading the tensors of a checkpoint, one layer at a time, into memory that is used again.

Mapping a file would read as fast, but its pages count as this process's memory until they are given back, and
a file that shrinks meanwhile would end the process. Reading copies at the speed of memory; a short file is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from ropewalk.errors import OffsetsError
from ropewalk.loader.arena import LARGE_PAGE, large_pages
from ropewalk.loader.encodings import ENCODINGS
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.safetensors_file import TensorEntry

if TYPE_CHECKING:
    from ropewalk.loader.checkpoint import Checkpoint

_LINE = 64  # tensors in the shared memory begin at multiples of it
_PIECE = 2 << 20  # what a thread reads at a time


class Reader:
    """Reads tensors of a checkpoint; a context manager that closes the files. Not for two threads at once."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._files: dict[Path, BinaryIO] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and let go of the shared memory."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own, in the dtype of the file.

        Raises:
            TensorEntryError: a dtype that is not read here.
            OffsetsError: a file that is shorter than it was when its header was read.
        """
        entry = self._checkpoint.tensors[name]
        memory = (
            large_pages(entry.nbytes)
            if entry.nbytes >= 2 * LARGE_PAGE
            else torch.empty(entry.nbytes, dtype=torch.uint8)
        )
        return self._read_into(entry, memory[: entry.nbytes])

    def read_layer(self, layer: PackedLayer) -> dict[str, Tensor]:
        """Return the parts of a layer ("qweight", "qzeros", "scales", "g_idx", "bias") in the checkpoint layout of
        `ropewalk.gptq.format`, whatever the encoding on disk. They are valid until the next call.

        Raises:
            as `read`; FormatError for values that the encoding cannot mean.
        """
        return ENCODINGS[layer.encoding].decode(layer, self.read_together(layer.entries.items()))

    def read_zeros(self, layer: PackedLayer) -> Tensor:
        """Return the qzeros of a layer as `read_layer` does, and read no more than that takes.

        Raises:
            as `read_layer`.
        """
        encoding = ENCODINGS[layer.encoding]
        parts = self.read_together((part, layer.entries[part]) for part in encoding.zeros)
        return encoding.decode(layer, parts)["qzeros"]

    def read_together(self, entries: Iterable[tuple[str, TensorEntry]]) -> dict[str, Tensor]:
        """Return key -> tensor for key -> entry, in shared memory, valid until the next call."""
        places = []
        size = 0
        for key, entry in entries:
            places.append((key, entry, size))
            size += -(-entry.nbytes // _LINE) * _LINE
        if size > self._scratch.numel():
            self._scratch = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            self._scratch = large_pages(size)
        return {key: self._read_into(entry, self._scratch[at : at + entry.nbytes]) for key, entry, at in places}

    def _read_into(self, entry: TensorEntry, memory: Tensor) -> Tensor:
        dtype = entry.dtype
        if entry.tensor is not None:
            memory.copy_(entry.tensor.reshape(-1).view(torch.uint8))
        elif entry.nbytes:
            file = self._files.get(entry.file)
            if file is None:
                file = self._files[entry.file] = entry.file.open("rb", buffering=0)
            self._read_all(file, entry, memoryview(memory.numpy()))  # type: ignore[arg-type]
        return memory.view(dtype).view(entry.shape)

    def _read_all(self, file: BinaryIO, entry: TensorEntry, memory: memoryview) -> None:
        """Read a tensor, a large one by several threads: one alone copies at half the speed of memory."""
        if len(memory) < 2 * _PIECE or not hasattr(os, "preadv"):
            _read_piece(file, entry, memory, 0)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="ropewalk-read")
        starts = range(0, len(memory), _PIECE)
        for _ in self._pool.map(lambda at: _read_piece(file, entry, memory[at : at + _PIECE], at), starts):
            pass


def _read_piece(file: BinaryIO, entry: TensorEntry, memory: memoryview, start: int) -> None:
    done = 0
    while done < len(memory):
        at = entry.offset + start + done
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [memory[done:]], at)
        else:
            file.seek(at)
            count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if count == 0:
            found = f"{start + done}: the file has shrunk"
            raise OffsetsError(entry.file, f"{entry.nbytes} bytes of {entry.name}", found)
        done += count
