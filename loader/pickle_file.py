"""A .pt, .pth or .bin file: tensors that `torch.save` pickled, read without running anything that is in it.

A pickle is a program. torch's `weights_only` mode runs no more of it than rebuilding tensors takes; it held what
it promises from torch 2.10 on. Before that mode sees a file, its instructions are read through here: every function
that it names must be one of the few that tensors need, and no number in it may be larger than the file, so that no
instruction can ask for more memory than there are bytes. Nothing is ever read again with fewer restrictions.

Tensors of a file in torch's zip format (1.6 and later) are mapped, not read; older files are read as a whole.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ropewalk.errors import MissingFileError, PickleFileError, TensorEntryError, UnsafePickleError
from ropewalk.loader.safetensors_file import DTYPES, MAX_NAME, TensorEntry, is_name, what_it_is

SUFFIXES = (".pt", ".pth", ".bin")
SAFE_TORCH = (2, 10)  # the first whose weights_only mode has no known hole

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NESTED = ("state_dict", "model", "module", "model_state_dict")
_MAX_PICKLE = 256 << 20
_ADVICE = "take a .safetensors file, or have it converted to one on a machine where it can do no harm"
_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED = {(module, f"{kind}Storage") for module in ("torch", "torch.cuda") for kind in _KINDS} | {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in DTYPES.values()),
}
# Other ways to name or call something than torch.save's.
_FORBIDDEN = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of an older file is this number
_SMALL = 1 << 16  # numbers up to here are harmless in the smallest file


def torch_is_safe(version: str | None = None) -> bool:
    """Tell whether this torch (or a version) reads pickles by weights_only without a known hole."""
    major, minor = (version or torch.__version__).split(".")[:2]
    return (int(major), int(minor)) >= SAFE_TORCH


def read_pickle(path: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return (tensor name -> entry with its tensor, warnings) of a file that torch.save wrote.

    Raises:
        MissingFileError: no such file.
        UnsafePickleError: something in it that tensors do not need, or a torch that is not safe to read it with.
        PickleFileError: not such a file, or a broken one.
        TensorEntryError: a tensor that is larger than what the file holds of it.
    """
    if not path.is_file():
        raise MissingFileError(path, "a file of tensors", "none")
    if not torch_is_safe():
        version = ".".join(map(str, SAFE_TORCH))
        expected = f"torch {version} or later to read a pickle safely (there, `ropewalk convert` makes a .safetensors)"
        raise UnsafePickleError(path, expected, f"torch {torch.__version__}")
    with path.open("rb") as file:
        start = file.read(264)
    kind = what_it_is(start)
    if kind:
        raise PickleFileError(path, f"a {path.suffix} file that torch.save wrote", kind)
    zipped = start.startswith(b"PK\x03\x04")
    check_instructions(path, zipped)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        raise UnsafePickleError(path, f"tensors and nothing else ({_ADVICE})", _first_line(error)) from None
    except Exception as error:  # a broken file makes torch raise almost anything
        raise PickleFileError(path, "tensors that torch can read", _first_line(error)) from None
    return _entries(path, content)


def check_instructions(path: Path, zipped: bool) -> None:
    """Read through the instructions of a pickle without following any.

    Raises:
        UnsafePickleError: a function that tensors do not need, or a number larger than the file.
        PickleFileError: not a pickle, or a broken one.
    """
    size = path.stat().st_size
    try:
        for text in _pickles(path, zipped):
            _check_pickle(path, text, size)
    except (
        ValueError,
        IndexError,
        KeyError,
        EOFError,
        OverflowError,
        OSError,  # places outside the file
        zipfile.BadZipFile,
        NotImplementedError,
    ) as error:
        raise PickleFileError(path, "a file that torch.save wrote", f"{_first_line(error)} (cut off?)") from None


def _pickles(path: Path, zipped: bool) -> Iterator[Any]:
    """Yield the pickles of a file: the one of a zip archive, or the five that an older file begins with."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            found = [item for item in archive.infolist() if item.filename.split("/")[-1] == "data.pkl"]
            if len(found) != 1 or found[0].file_size > _MAX_PICKLE or found[0].compress_type != zipfile.ZIP_STORED:
                raise PickleFileError(path, "one data.pkl, as torch.save writes it", [i.filename for i in found])
            yield archive.read(found[0])
        return
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            raise PickleFileError(path, "a file that torch.save wrote", "neither a zip archive nor a pickle")
        file.seek(0)
        bounded = _Bounded(file, path.stat().st_size)
        for _ in range(5):  # magic number, version, the machine's sizes, the tensors, the names of their storages
            yield bounded


class _Bounded:
    """A file that is never asked for more than it has: Python would make room for it first."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size))

    def tell(self) -> int:
        return self.file.tell()


def _check_pickle(path: Path, text: Any, size: int) -> None:
    largest = max(size, _SMALL)
    for opcode, value, _ in pickletools.genops(text):
        name = opcode.name
        if name == "GLOBAL":
            module, _, attribute = str(value).partition(" ")
            if (module, attribute) not in _ALLOWED:
                found = f"{module}.{attribute}, which is none"
                raise UnsafePickleError(path, f"tensors and nothing else ({_ADVICE})", found)
        elif name in _FORBIDDEN:
            raise UnsafePickleError(path, f"tensors as torch.save writes them ({_ADVICE})", f"the instruction {name}")
        elif name == "PROTO" and int(value or 0) > pickle.HIGHEST_PROTOCOL:
            raise ValueError(f"pickle protocol {value}")
        elif isinstance(value, int) and abs(value) > largest and name != "FRAME" and value != _MAGIC:
            raise UnsafePickleError(path, f"no tensor larger than the file's {size} bytes", f"a size of {value}")


def _entries(path: Path, content: Any) -> tuple[dict[str, TensorEntry], list[str]]:
    warnings = []
    if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        for name in _NESTED:
            if isinstance(content.get(name), Mapping):
                content = content[name]
                break
    if not isinstance(content, Mapping):
        raise PickleFileError(path, "a dict from names to tensors", type(content).__name__)
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    names = [name for name in content if name not in others and isinstance(name, str)]
    for name in names:
        if not is_name(name):
            raise PickleFileError(path, f"names of at most {MAX_NAME} printable characters", repr(name)[:80])
    if not names:
        raise PickleFileError(path, "a dict from names to tensors", f"one without tensors ({_some(others)})")
    if others:
        warnings.append(f"{path.name}: left out what is no tensor: {_some(others)}")
    return {name: _entry(path, name, content[name].detach()) for name in names}, warnings


def _entry(path: Path, name: str, tensor: Tensor) -> TensorEntry:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return TensorEntry(name, path, f"{tensor.layout} on {tensor.device.type}", tuple(tensor.shape), 0)
    nbytes = tensor.numel() * tensor.itemsize
    held = tensor.untyped_storage().nbytes()
    if nbytes > held:
        raise TensorEntryError(f"{path}: {name}", f"at most the {held} bytes that the file has of it", f"{nbytes}")
    dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
    return TensorEntry(name, path, dtype, tuple(tensor.shape), nbytes, tensor=tensor)


def _some(names: list[Any]) -> str:
    return ", ".join(str(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
