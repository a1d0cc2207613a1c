"""Write a .safetensors file tensor by tensor: the header first, then each where the header says it will be.

The safetensors library wants all tensors of a file in memory; this wants their names, dtypes and shapes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from ropewalk.errors import TensorEntryError
from ropewalk.loader.safetensors_file import DTYPES

PADDING = "__padding__."  # names of tensors that only fill the space between others

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


class TensorFile:
    """A .safetensors file that is being written; a context manager that closes it.

    Args:
        path: a new file.
        specs: of the tensors in it.
        metadata: for the header.
        alignment: bytes, a multiple of 8; every tensor begins at a multiple of it, with padding tensors between them.
            With 1, each begins at a multiple of its own item size, which is what readers want at least.

    Raises:
        FileExistsError: it is there already.
    """

    def __init__(self, path: Path, specs: Sequence[Spec], metadata: Mapping[str, str], alignment: int = 1):
        self._path = path
        places, self._size = _place(specs, alignment)
        self._specs = {spec.name: spec for spec in specs}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for spec, at in places:
            offsets = [at, at + spec.nbytes]
            header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(len(text) + 8) % max(alignment, 8))
        self._places = {spec.name: 8 + len(text) + at for spec, at in places}
        self._missing = set(self._specs)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        self._put(memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(self._file, 8 + len(text) + self._size)  # padding, and what is empty, is written by this

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors.

        Raises:
            TensorEntryError: not of its spec, or written already.
        """
        spec = self._specs[name]
        if name not in self._missing:
            raise TensorEntryError(f"{self._path}: {name}", "a tensor once", "it a second time")
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise TensorEntryError(f"{self._path}: {name}", f"{spec.dtype} {list(spec.shape)}", found)
        self._missing.discard(name)
        if tensor.numel():
            flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            self._put(memoryview(flat.numpy()), self._places[name])  # type: ignore[arg-type]

    def _put(self, data: memoryview, at: int) -> None:
        while data:
            count = os.pwrite(self._file, data, at)
            data, at = data[count:], at + count

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        if error is None and self._missing:
            raise TensorEntryError(f"{self._path}: {min(self._missing)}", "it to be written", "nothing")


def _place(specs: Sequence[Spec], alignment: int) -> tuple[list[tuple[Spec, int]], int]:
    """Return (each tensor, padding among them, with where it begins; the size of all)."""
    if alignment == 1 and not _aligned(specs):
        specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    places: list[tuple[Spec, int]] = []
    at = 0
    for spec in specs:
        if gap := -at % alignment:
            places.append((Spec(f"{PADDING}{len(places)}", torch.uint8, (gap,)), at))
            at += gap
        places.append((spec, at))
        at += spec.nbytes
    return places, at


def _aligned(specs: Sequence[Spec]) -> bool:
    at = 0
    for spec in specs:
        if at % spec.dtype.itemsize:
            return False
        at += spec.nbytes
    return True
