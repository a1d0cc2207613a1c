"""The header of a .safetensors file, checked before anything of the file is used.

The format: eight bytes, the length n of the header as a little-endian integer; n bytes of JSON, an
object from tensor names to {"dtype", "shape", "data_offsets": [begin, end]} (and "__metadata__"); then
the tensors' bytes, without gaps. https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ropewalk.errors import HeaderError, MissingFileError, NotSafetensorsError, OffsetsError, TensorEntryError

MAX_HEADER = 100_000_000  # as in the safetensors library
MAX_DIMS = 64  # as in torch
MAX_NAME = 1000  # characters; the longest seen has under 100
# Values and containers in a JSON file, of which Python makes some 60 bytes each; a million tensors have fewer.
_MAX_VALUES, _MAX_CONTAINERS = 10_000_000, 4_000_000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor.

    Attributes:
        name, dtype_name, shape: as the header has them.
        file: the file it is in.
        nbytes: its size.
        offset: where in the file it begins.
        tensor: the tensor itself, for files of other kinds that torch maps into memory.
    """

    name: str
    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0
    tensor: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype; asked for only where the tensor is needed.

        Raises:
            TensorEntryError: one that torch here does not have, or this loader does not expect.
        """
        if self.dtype_name not in DTYPES:
            raise _entry_error(self.file, self.name, f"a dtype of {', '.join(DTYPES)}", repr(self.dtype_name)[:80])
        return DTYPES[self.dtype_name]


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return (tensor name -> entry, metadata) of a .safetensors file.

    Raises:
        MissingFileError, NotSafetensorsError, HeaderError, TensorEntryError, OffsetsError: each with the
            file, what was expected and what was found.
    """
    if path.exists() and not path.is_file():
        raise MissingFileError(path, "a .safetensors file", "a folder" if path.is_dir() else "no ordinary file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little", signed=True)
            header = file.read(length) if 0 <= length <= min(MAX_HEADER, size - 8) else b""
            if not header:
                start += file.read(256)
    except FileNotFoundError:
        raise MissingFileError(path, "a .safetensors file", "none") from None
    except OSError as error:
        raise MissingFileError(path, "a .safetensors file that can be read", error.strerror) from None
    _check_is_safetensors(path, start, size)
    if length < 0 or length > MAX_HEADER:
        raise HeaderError(path, f"a header of at most {MAX_HEADER} bytes", f"a length of {length}")
    if length > size - 8:
        raise HeaderError(path, f"a header that fits into the file's {size} bytes", f"a length of {length}")
    entries = _parse(path, header)
    metadata = entries.pop("__metadata__", {})
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_spans(path, entries, size - 8 - length)
    return tensors, metadata if isinstance(metadata, dict) else {}


def is_moderate(text: bytes) -> bool:
    """Tell whether JSON can be parsed in moderate memory: Python would make 60 bytes of a "[]"."""
    return text.count(b",") <= _MAX_VALUES and text.count(b"[") + text.count(b"{") <= _MAX_CONTAINERS


def is_name(name: str) -> bool:
    """Tell whether text can be a tensor's name: what is longer or not printable only harms who reads a message."""
    return len(name) <= MAX_NAME and name.isprintable()


def what_it_is(start: bytes) -> str | None:
    """Tell from the first bytes of a file whether it is what often lies under the name of another; None if not."""
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer to one; `git lfs pull` or a download from the Hub brings it"
    if text.startswith((b"<!doctype", b"<html")):
        return "a web page: the download got an error page"
    return None


def _check_is_safetensors(path: Path, start: bytes, size: int) -> None:
    kind = what_it_is(start)
    if kind:
        raise NotSafetensorsError(path, "a .safetensors file", kind)
    if start.startswith(b"PK\x03\x04"):
        raise NotSafetensorsError(
            path, "a .safetensors file", "an archive that torch.save wrote (a .pt file, renamed?)"
        )
    if size < 8:
        raise NotSafetensorsError(path, "a .safetensors file, at least 8 bytes", f"{size} bytes")


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = set()
        for name, _ in pairs:
            if name in names:
                raise HeaderError(path, "every name once in the header", f"{name[:MAX_NAME]!r} twice")
            names.add(name)
        return dict(pairs)

    if not is_moderate(header):
        raise HeaderError(path, f"a header of at most {_MAX_VALUES} values", "one of more")
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise HeaderError(path, "a header in UTF-8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise HeaderError(path, "a header in JSON", str(error)) from None
    if not isinstance(entries, dict):
        raise HeaderError(path, "a JSON object as header", type(entries).__name__)
    for name in entries:
        if not is_name(name):
            raise HeaderError(path, f"names of at most {MAX_NAME} printable characters", repr(name)[:80])
    return entries


def _entry(path: Path, name: str, entry: Any, data: int) -> TensorEntry:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _entry_error(path, name, "dtype, shape and data_offsets", repr(entry)[:80])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _entry_error(path, name, "a dtype's name", repr(dtype)[:80])
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in shape):
        raise _entry_error(path, name, "a shape of whole numbers from 0 on", repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _entry_error(path, name, "data_offsets [begin, end]", repr(offsets)[:80])
    begin, end = offsets
    span = end - begin
    if dtype in DTYPES:
        expected = DTYPES[dtype].itemsize
        for n in shape:
            expected *= n  # Python's integers do not overflow
        if span != expected:
            raise _entry_error(path, name, f"{expected} bytes for {dtype} {shape}"[:200], f"a span of {span}")
    elif span < 0:
        raise _entry_error(path, name, "data_offsets [begin, end] with begin <= end", repr(offsets))
    return TensorEntry(name, path, dtype, tuple(shape), span, data + begin)


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63


def _check_spans(path: Path, entries: dict[str, Any], available: int) -> None:
    position, previous = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position:
            fault = "an overlap" if begin < position else "a gap"
            raise OffsetsError(
                path, f"{name} to begin at {position}, after {previous}", f"{fault}: it begins at {begin}"
            )
        position, previous = end, name
    if position > available:
        raise OffsetsError(
            path, f"{position} bytes of tensors", f"{available}: the file is truncated (an unfinished download?)"
        )
    if position < available:
        raise OffsetsError(path, f"{position} bytes of tensors", f"{available - position} bytes more at the end")


def _entry_error(path: Path, name: str, expected: str, found: str) -> TensorEntryError:
    return TensorEntryError(f"{path}: {name}", expected, found)
