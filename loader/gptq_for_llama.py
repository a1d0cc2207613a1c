"""The files that GPTQ-for-LLaMa and IST-DASLab's gptq wrote up to March 2023: zero points in floating point.

    qweight  int32 [K * bits / 32, N]   as ever
    scales   float32 or float16 [N, 1]
    zeros    the same                   zero * scale
    bias     [N]                        always, zeros for layers without

    W[k, n] = scales[n] * code[k, n] - zeros[n]

There are no groups and no g_idx (act-order is nothing that is left to know without groups). The zero point, a whole
number from 0 to 2 ** bits - 1 at the time of writing, is zeros / scales rounded. From their later files, with qzeros
and groups, this differs in nothing else, and those are read as they are: they store zero points less one, like v1.

Source: `QuantLinear.pack` in the history of github.com/qwopqwop200/GPTQ-for-LLaMa, quant.py, commits 1eb985a to
e000bdb (float zeros), a270974 (qzeros), 5b30ab3 (g_idx).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ropewalk.errors import FormatError
from ropewalk.gptq.format import check_shapes, pack, zeros_v2_to_v1
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.quantize_config import QuantizeConfig

PARTS = ("qweight", "zeros", "scales", "bias")


def check_float_zeros(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], settings: QuantizeConfig, prefix: str, file: str
) -> tuple[int, int]:
    """Check what a header says of one layer; return (in_features, out_features).

    Raises:
        FormatError: a tensor that is missing, of another dtype, or of a shape that the others contradict.
    """
    if settings.group_size != -1:
        expected = "group_size -1: there are no groups where zero points are in floating point"
        raise FormatError(prefix + "zeros", expected, settings.group_size, file)
    columns = tensors["qweight"][0][-1] if tensors["qweight"][0] else 0
    for name in ("scales", "zeros"):
        if name not in tensors:
            raise FormatError(prefix + name, "a tensor of this name", "none", file)
        shape, dtype = tensors[name]
        if tuple(shape) != (columns, 1):
            raise FormatError(prefix + name, f"shape {[columns, 1]}", list(shape), file)
        if not dtype.is_floating_point:
            raise FormatError(prefix + name, "a floating-point dtype", dtype, file)
    # What is left is as in the checkpoint layout; the two that are not are put in as they will be.
    rest = {name: tensors[name] for name in ("qweight", "bias") if name in tensors}
    words = columns * settings.bits // 32
    rest |= {"scales": ((1, columns), torch.float16), "qzeros": ((1, words), torch.int32)}
    return check_shapes(rest, bits=settings.bits, group_size=-1, desc_act=False, prefix=prefix, file=file)


def whole_zeros(parts: Mapping[str, Tensor], bits: int, prefix: str, file: str) -> Tensor:
    """Return the zero points, int64 [1, N].

    Raises:
        FormatError: some that are not near a whole number from 0 to 2 ** bits - 1.
    """
    scales, zeros = parts["scales"].double(), parts["zeros"].double()
    # A column of scale 0 is all 0, whatever its zero point.
    exact = torch.where((scales == 0) & (zeros == 0), 1 << (bits - 1), zeros / scales)
    whole = exact.round()
    # Both numbers may have been rounded to 11 bits, after the division by one part in 1000.
    wrong = ~((exact - whole).abs() <= 0.01 + exact.abs() / 1000) | (whole < 0) | (whole >= 1 << bits)
    if bool(wrong.any()):
        expected = f"zero points times scales, for whole zero points from 0 to {(1 << bits) - 1}"
        raise FormatError(prefix + "zeros", expected, f"a zero point of {exact[wrong][0].item():.4g}", file)
    return whole.to(torch.int64).t()


def decode_float_zeros(layer: PackedLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layer's tensors in the checkpoint layout, those of them that follow from `parts`."""
    decoded = {name: parts[name] for name in ("qweight", "bias") if name in parts}
    if "scales" in parts:
        decoded["scales"] = parts["scales"].t().contiguous()
    if "zeros" in parts:
        bits = layer.settings.bits
        qzeros = pack(whole_zeros(parts, bits, f"{layer.name}.", str(layer.entries["zeros"].file)), bits, dim=1)
        v1 = layer.settings.checkpoint_format == "gptq"
        decoded["qzeros"] = zeros_v2_to_v1(qzeros, bits) if v1 else qzeros
    return decoded
