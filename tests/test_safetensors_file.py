"""A malformed .safetensors file gets one typed error that says what was expected and what was found."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ropewalk.errors import HeaderError, MissingFileError, NotSafetensorsError, OffsetsError, TensorEntryError
from ropewalk.loader.safetensors_file import read_header


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def build(header, data=b"\0" * 8, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<q", len(raw) if length is None else length) + raw + data


def test_a_good_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(0, dtype=torch.int32)}, path, metadata={"format": "pt"})
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert {n: (e.shape, e.dtype, e.nbytes) for n, e in tensors.items()} == {
        "a": ((2, 3), torch.float32, 24),
        "b": ((0,), torch.int32, 0),
    }


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        *[(b"\0" * n, NotSafetensorsError, f"at least 8 bytes, found {n} bytes") for n in range(8)],
        (build({}, length=10_000), HeaderError, "fits into the file's 18 bytes, found a length of 10000"),
        (build({}, length=200_000_000), HeaderError, "at most 100000000 bytes, found a length of 200000000"),
        (build({}, length=-1), HeaderError, "found a length of -1"),
        (build(b"\xff\xfe{}"), HeaderError, "a header in UTF-8"),
        (build(b"{'a': 1}"), HeaderError, "a header in JSON"),
        (build(b"[" * 100_000), HeaderError, "a header in JSON"),
        (build(b"[1, 2]"), HeaderError, "a JSON object as header, found list"),
        (
            build(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": 1}'),
            HeaderError,
            "every name once in the header, found 'a' twice",
        ),
        (build({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), OffsetsError, "an overlap: it begins at 4"),
        (build({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), OffsetsError, "a gap: it begins at 12"),
        (build({"a": entry(offsets=(4, 12))}, b"\0" * 12), OffsetsError, "after the header, found a gap"),
        (build({"a": entry()}, b"\0" * 5), OffsetsError, "expected 8 bytes of tensors, found 5: the file is truncated"),
        (build({"a": entry()}, b"\0" * 9), OffsetsError, "found 1 bytes more at the end"),
        (build({"a": entry(shape=(3,))}), TensorEntryError, "a: expected 12 bytes for F32 [3], found a span of 8"),
        (build({"a": entry(shape=(2**62, 4))}), TensorEntryError, "found a span of 8"),
        (build({"a": entry(shape=(-2,))}), TensorEntryError, "whole numbers from 0 on, found [-2]"),
        (build({"a": entry(shape=(True, 2))}), TensorEntryError, "whole numbers from 0 on, found [True, 2]"),
        (build({"a": entry(shape=(2.0,))}), TensorEntryError, "whole numbers from 0 on, found [2.0]"),
        (build({"a": entry(offsets=(0,))}), TensorEntryError, "data_offsets [begin, end], found [0]"),
        (build({"a": entry(offsets=(0, -8))}), TensorEntryError, "data_offsets"),
        (build({"a": entry("X9", offsets=(8, 0))}), TensorEntryError, "begin <= end"),
        (build({"a": {"dtype": "F32"}}), TensorEntryError, "dtype, shape and data_offsets"),
        (build({"a": 7}), TensorEntryError, "dtype, shape and data_offsets, found 7"),
        (build({"a": entry(dtype=3)}), TensorEntryError, "a dtype's name, found 3"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            NotSafetensorsError,
            "found a Git-LFS pointer",
        ),
        (b"<!DOCTYPE html><html>not found</html>", NotSafetensorsError, "found a web page"),
        (b"\n <HTML><body>", NotSafetensorsError, "found a web page"),
    ],
)
def test_malformed(tmp_path, content, error, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing(tmp_path):
    with pytest.raises(MissingFileError):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(MissingFileError):
        read_header(tmp_path)


def test_an_unknown_dtype_is_an_error_only_where_the_tensor_is_needed(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"a": entry("F8_NEW"), "b": entry(offsets=(8, 16))}, b"\0" * 16))
    tensors, _ = read_header(path)
    assert tensors["b"].dtype == torch.float32
    with pytest.raises(TensorEntryError, match=r"x\.safetensors: a: expected a dtype of .*, found 'F8_NEW'"):
        _ = tensors["a"].dtype
