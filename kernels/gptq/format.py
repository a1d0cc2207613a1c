"""The checkpoint layout: how GPTQ files hold a linear layer of K inputs and N outputs.

    qweight  int32 [K * bits / 32, N]   codes of a column, one after the other, low bits first
    qzeros   int32 [G, N * bits / 32]   a zero point for each group and column, packed along N
    scales   float16 [G, N]
    g_idx    int32 [K]                  the group of each row; absent or sequential without act-order
    bias     float16 [N]                optional

    W[k, n] = (code[k, n] - zero[g, n]) * scales[g, n]        with g = g_idx[k]

G = ceil(K / group_size), or 1 without groups (group_size -1). Codes of 2, 4 and 8 bits never cross a
word; 3-bit codes fill three words as one stream of 96 bits, in which codes 10 and 21 straddle. Format
v1 ("gptq") stores every zero point less one, v2 ("gptq_v2") as it is.

Everything here is bit-exact and runs on any device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ropewalk.errors import FormatError

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")  # v1 and v2

# The shortest run of codes that fills whole words: bits -> (codes, words).
_PERIOD = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}


def pack(codes: Tensor, bits: int, dim: int = 0) -> Tensor:
    """Pack integer codes in [0, 2 ** bits) into int32 words along `dim` of a matrix.

    Args:
        codes: any integer dtype, [K, N]; for dim 0, K must fill whole words (a multiple of 16, 32, 8 or
            4 for 2, 3, 4 or 8 bits), for dim 1, N must.

    Returns:
        int32 [K * bits / 32, N] for dim 0, [K, N * bits / 32] for dim 1.

    Raises:
        FormatError: bits not supported, a size that does not fill words, or a code out of range.
    """
    count, words = _period(bits)
    if dim == 1:
        return pack(codes.t(), bits).t().contiguous()
    length, columns = codes.shape
    if length % count:
        raise FormatError("codes", f"a multiple of {count} for {bits} bits", length)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise FormatError("codes", f"values from 0 to {(1 << bits) - 1}", f"{int(codes.min())} to {int(codes.max())}")
    runs = codes.reshape(-1, count, columns).to(torch.int64)
    packed = torch.zeros(runs.shape[0], words, columns, dtype=torch.int64, device=codes.device)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        packed[:, word] |= runs[:, i] << shift
        if shift + bits > 32:
            packed[:, word + 1] |= runs[:, i] >> (32 - shift)
    return packed.reshape(-1, columns).to(torch.int32)  # keeps the low 32 bits


def unpack(packed: Tensor, bits: int, dim: int = 0) -> Tensor:
    """Invert `pack`: return the codes as uint8.

    Raises:
        FormatError: bits not supported, words not int32, or 3-bit words that do not come in threes.
    """
    count, words = _period(bits)
    if packed.dtype != torch.int32:
        raise FormatError("packed words", "int32", packed.dtype)
    if dim == 1:
        return unpack(packed.t(), bits).t().contiguous()
    length, columns = packed.shape
    if length % words:
        raise FormatError("packed words", f"a multiple of {words} for {bits} bits", length)
    runs = packed.reshape(-1, words, columns)
    codes = torch.empty(runs.shape[0], count, columns, dtype=torch.uint8, device=packed.device)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        code = runs[:, word] >> shift  # arithmetic, so the sign fills up what the mask takes away
        low = 32 - shift
        if low < bits:
            code = (code & ((1 << low) - 1)) | (runs[:, word + 1] << low)
        codes[:, i] = code & ((1 << bits) - 1)
    return codes.reshape(-1, columns)


def zeros_v1_to_v2(qzeros: Tensor, bits: int) -> Tensor:
    """Return the packed zero points without v1's "less one"."""
    return _shift_zeros(qzeros, bits, 1)


def zeros_v2_to_v1(qzeros: Tensor, bits: int) -> Tensor:
    """Return the packed zero points as v1 stores them; the exact inverse of `zeros_v1_to_v2`."""
    return _shift_zeros(qzeros, bits, -1)


def _shift_zeros(qzeros: Tensor, bits: int, delta: int) -> Tensor:
    if bits == 3:
        return pack(unpack(qzeros, bits, dim=1).add(delta).bitwise_and(7), bits, dim=1)
    # GPTQModel, the one program that writes asymmetric v1 files with a zero point of 0, subtracts from whole
    # words and so borrows from the neighbouring code; adding to whole words gives that back. Where no code
    # overflows the two readings are the same.
    ones = sum(1 << i for i in range(0, 32, bits))
    return qzeros + delta * ones


def symmetric_zeros(groups: int, columns: int, bits: int, checkpoint_format: str = "gptq") -> Tensor:
    """Return the packed zero points of a symmetric layer: all of them 2 ** (bits - 1)."""
    zero = (1 << (bits - 1)) - _stored_less(checkpoint_format)
    return pack(torch.full((groups, columns), zero), bits, dim=1)


def is_symmetric(qzeros: Tensor, bits: int, checkpoint_format: str = "gptq") -> bool:
    """Tell whether every zero point is 2 ** (bits - 1), so that none of them need be read."""
    if qzeros.numel() == 0:
        return True
    period = _symmetric_period(bits, checkpoint_format).to(qzeros.device)
    if qzeros.shape[1] % len(period):
        return False
    return bool((qzeros.unflatten(1, (-1, len(period))) == period).all())


@functools.cache
def _symmetric_period(bits: int, checkpoint_format: str) -> Tensor:
    """Return the words that symmetric zero points repeat: one, or three for 3 bits."""
    return symmetric_zeros(1, _period(bits)[0], bits, checkpoint_format)[0]


def group_count(in_features: int, group_size: int) -> int:
    """Return G, the rows of scales and qzeros."""
    return 1 if group_size == -1 else math.ceil(in_features / group_size)


def sequential_g_idx(in_features: int, group_size: int) -> Tensor:
    """Return the g_idx of a layer without act-order: row k is in group k // group_size."""
    if group_size == -1:
        return torch.zeros(in_features, dtype=torch.int32)
    return torch.arange(in_features, dtype=torch.int32) // group_size


def is_sequential(g_idx: Tensor, group_size: int) -> bool:
    """Tell whether g_idx says no more than group_size does."""
    return torch.equal(g_idx.cpu(), sequential_g_idx(g_idx.shape[0], group_size))


def expected_tensors(
    in_features: int, out_features: int, bits: int, group_size: int, bias: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of the tensors that hold a layer.

    Raises:
        FormatError: bits or group_size not supported, or a size that does not fill whole words.
    """
    count, words = _period(bits)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise FormatError("group_size", "-1 or a positive number of rows", repr(group_size))
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % count or size < 1:
            raise FormatError(name, f"a multiple of {count} for {bits} bits", size)
    groups = group_count(in_features, group_size)
    tensors = {
        "qweight": ((in_features // count * words, out_features), torch.int32),
        "qzeros": ((groups, out_features // count * words), torch.int32),
        "scales": ((groups, out_features), torch.float16),
        "g_idx": ((in_features,), torch.int32),
    }
    if bias:
        tensors["bias"] = ((out_features,), torch.float16)
    return tensors


def infer_features(qweight_shape: tuple[int, ...], bits: int) -> tuple[int, int]:
    """Return (in_features, out_features) of a layer from the shape of its qweight."""
    count, words = _period(bits)
    if len(qweight_shape) != 2 or qweight_shape[0] % words:
        raise FormatError("qweight", f"[{words} * n, N] words for {bits} bits", list(qweight_shape))
    return qweight_shape[0] // words * count, qweight_shape[1]


def check_shapes(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    *,
    bits: int,
    group_size: int,
    desc_act: bool,
    prefix: str = "",
    file: str = "",
) -> tuple[int, int]:
    """Check what a file's header says of one layer, before anything of it is read.

    Args:
        tensors: "qweight", "qzeros", "scales" and, where there are, "g_idx" and "bias" -> (shape, dtype).
        prefix: the layer's name with a dot, for messages.

    Returns:
        (in_features, out_features).

    Raises:
        FormatError: a tensor that is missing, of another dtype, or of a shape that the others contradict.
    """

    def fail(name: str, expected: object, found: object) -> FormatError:
        return FormatError(prefix + name, expected, found, file)

    for name in ("qweight", "qzeros", "scales", *(("g_idx",) if desc_act else ())):
        if name not in tensors:
            raise fail(name, "a tensor of this name" + (" (desc_act is true)" if name == "g_idx" else ""), "none")
    try:
        features = infer_features(tensors["qweight"][0], bits)
        expected = expected_tensors(*features, bits, group_size, bias=True)
    except FormatError as error:
        raise fail(error.tensor, error.expected, error.found) from None
    for name, (shape, dtype) in tensors.items():
        wanted_shape, wanted_dtype = expected[name]
        if tuple(shape) != wanted_shape:
            raise fail(name, f"shape {list(wanted_shape)} (bits {bits}, group_size {group_size})", list(shape))
        if wanted_dtype.is_floating_point:
            if not dtype.is_floating_point:
                raise fail(name, "a floating-point dtype", dtype)
        elif dtype != wanted_dtype:
            raise fail(name, wanted_dtype, dtype)
    return features


def check_values(tensors: Mapping[str, Tensor], *, prefix: str = "", file: str = "") -> None:
    """Check the values that a header cannot vouch for: group numbers in range, scales finite in float16.

    Raises:
        FormatError: naming the first tensor at fault.
    """
    scales = tensors["scales"]
    if scales.numel() and not _fits_float16(scales):
        kind = "finite numbers" if scales.dtype == torch.float16 else "numbers that float16 can hold"
        raise FormatError(prefix + "scales", kind, "NaN or infinity", file)
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        return
    groups = scales.shape[0]
    low, high = (int(n) for n in g_idx.aminmax())
    if low < 0 or high >= groups:
        raise FormatError(prefix + "g_idx", f"group numbers from 0 to {groups - 1}", f"{low} to {high}", file)


def _fits_float16(values: Tensor) -> bool:
    """Tell whether all are finite, also once they are float16."""
    ends = torch.stack(values.aminmax())  # a NaN is both
    return bool(torch.isfinite(ends.to(torch.float16)).all())


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return the weight as float32 [K, N]; exact, since a product of an 8-bit and an 11-bit integer fits.

    Args:
        qweight: int32 [K * bits / 32, N].
        scales: [G, N], any floating dtype.
        qzeros: int32 [G, N * bits / 32] as v2 stores them, or None where they are all 2 ** (bits - 1).
        g_idx: int32 [K], or None where row k is in group k // group_size.
    """
    codes = unpack(qweight, bits)
    in_features = codes.shape[0]
    scales = scales.float()
    zeros = (1 << (bits - 1)) if qzeros is None else unpack(qzeros, bits, dim=1).float()
    if g_idx is None:
        if group_size == -1 or group_size >= in_features:
            return (codes.float() - zeros) * scales
        g_idx = sequential_g_idx(in_features, group_size).to(qweight.device)
    rows = g_idx.long()
    return (codes.float() - (zeros if isinstance(zeros, int) else zeros[rows])) * scales[rows]


def _period(bits: int) -> tuple[int, int]:
    if isinstance(bits, bool) or bits not in _PERIOD:
        raise FormatError("bits", " or ".join(map(str, BITS)), repr(bits))
    return _PERIOD[bits]


def _stored_less(checkpoint_format: str) -> int:
    if checkpoint_format not in FORMATS:
        raise FormatError("checkpoint_format", " or ".join(FORMATS), repr(checkpoint_format))
    return 1 if checkpoint_format == "gptq" else 0
