"""Marlin checkpoints: 4-bit symmetric layers in the order in which Marlin's GPU kernel loads them.

    B     int32 [K / 16, 2 N]   codes
    s     float16 [G, N]        scales, columns permuted
    bias  float16 [N]           optional

There are no zero points (each is 8) and no g_idx. The order is that of a warp of 32 lanes that multiplies 16 × 64
codes at a time by tensor cores (`mma.m16n8k16`): a word holds 8 codes that one lane needs together. Within a block
of 16 rows and 64 columns, with k = k3 k2 k1 k0 and n = n5 … n0 in bits, a code is found at

    lane  = n2 n1 n0 k2 k1        four lanes share a column, each with two neighbouring rows and those 8 below
    word  = n5 n4                 of the lane's four
    slot  = k0 n3 k3              of the word's eight, the lowest first

so the whole is a transposition of bits. Scales lie in the order in which a lane needs them: with groups, columns
of 64 as an 8 × 8 matrix, transposed; without, columns of 32 as 4 × 4 pairs, transposed.

Source: E. Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models",
and the reference packer at github.com/IST-DASLab/marlin; compared in tests with AutoGPTQ's output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ropewalk.errors import FormatError
from ropewalk.gptq.format import group_count, pack, symmetric_zeros, unpack
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.quantize_config import QuantizeConfig

PARTS = ("B", "s", "bias")
ROWS, COLUMNS = 16, 64  # of a block


def check_marlin(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], settings: QuantizeConfig, prefix: str, file: str
) -> tuple[int, int]:
    """Check what a header says of one layer; return (in_features, out_features).

    Raises:
        FormatError: a tensor that is missing, of another dtype, or of a shape that the others contradict.
    """

    def fail(name: str, expected: object, found: object) -> FormatError:
        return FormatError(prefix + name, expected, found, file)

    if settings.bits != 4:
        raise fail("B", "bits 4 in a Marlin layer", settings.bits)
    if settings.desc_act and settings.group_size != -1 and not settings.static_groups:
        raise fail("g_idx", "a tensor of this name (desc_act is true)", "none: Marlin has no act-order")
    for name in ("B", "s"):
        if name not in tensors:
            raise fail(name, "a tensor of this name", "none")
    shape, dtype = tensors["B"]
    if dtype != torch.int32:
        raise fail("B", torch.int32, dtype)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 * COLUMNS or shape[1] % (2 * COLUMNS):
        raise fail("B", f"shape [K / 16, 2 N] with N a multiple of {COLUMNS}", list(shape))
    in_features, out_features = shape[0] * ROWS, shape[1] // 2
    expected = {"s": (group_count(in_features, settings.group_size), out_features), "bias": (out_features,)}
    for name in ("s", "bias"):
        if name in tensors:
            shape, dtype = tensors[name]
            if tuple(shape) != expected[name]:
                raise fail(name, f"shape {list(expected[name])} (group_size {settings.group_size})", list(shape))
            if not dtype.is_floating_point:
                raise fail(name, "a floating-point dtype", dtype)
    return in_features, out_features


def decode_marlin(layer: PackedLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layer's tensors in the checkpoint layout, those of them that follow from `parts`."""
    decoded = {name: parts[name] for name in ("bias",) if name in parts}
    if "B" in parts:
        decoded["qweight"] = unpack_codes(parts["B"])
    if "s" in parts:
        groups = parts["s"].shape[0]
        decoded["scales"] = order_scales(parts["s"], groups > 1)
        decoded["qzeros"] = symmetric_zeros(groups, layer.out_features, 4, layer.settings.checkpoint_format)
    return decoded


def unpack_codes(words: Tensor) -> Tensor:
    """Return qweight, int32 [K / 8, N], of B, int32 [K / 16, 2 N]."""
    packed = []
    for part in words.split(64):  # 1024 rows of the weight at a time: packing takes 8 bytes for each code
        rows, blocks = part.shape[0], part.shape[1] // (2 * COLUMNS)
        codes = unpack(part.reshape(1, -1), 4, dim=1)
        #                       n2…0 k2k1 n5n4 k0 n3 k3
        codes = codes.view(rows, blocks, 8, 4, 4, 2, 2, 2)
        #                    k3 k2k1 k0    n5n4 n3 n2…0
        codes = codes.permute(0, 7, 3, 5, 1, 4, 6, 2)
        packed.append(pack(codes.reshape(rows * ROWS, blocks * COLUMNS), 4))
    return torch.cat(packed)


def order_scales(scales: Tensor, grouped: bool) -> Tensor:
    """Return scales with their columns in order; this is its own inverse."""
    groups, columns = scales.shape
    if grouped:
        turned = scales.view(groups, columns // 64, 8, 8).transpose(2, 3)
    else:
        turned = scales.view(groups, columns // 32, 4, 4, 2).transpose(2, 3)
    return turned.reshape(groups, columns)
