"""GPTQModel's planar checkpoints (`gptq_p`): 3-bit codes as two bit planes, so that none straddles a word.

Of every 32 codes, the low two bits fill two words, 16 codes each, and the high bits a third; the lowest bits of a
word are its first code. Zero points lie alike along N, and as they are (v2). The shapes are those of the ordinary
layout; at 2, 4 and 8 bits so are the words.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ropewalk.gptq.format import pack, unpack
from ropewalk.loader.packed_layer import PackedLayer


def decode_planar(layer: PackedLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layer's tensors in the checkpoint layout, those of them that are in `parts`."""
    decoded = dict(parts)
    if layer.settings.bits == 3:
        if "qweight" in parts:
            decoded["qweight"] = torch.cat([join_planes(part) for part in parts["qweight"].split(3 * 32)])
        if "qzeros" in parts:
            decoded["qzeros"] = join_planes(parts["qzeros"].t()).t().contiguous()
    return decoded


def join_planes(words: Tensor) -> Tensor:
    """Return int32 words [3 n, N] in which 3-bit codes follow each other, of [3 n, N] in which their planes do."""
    codes = split_codes(words)
    return pack(codes, 3)


def split_codes(words: Tensor) -> Tensor:
    """Return the codes, uint8 [32 n, N], of planar words, int32 [3 n, N]."""
    triples = words.reshape(-1, 3, words.shape[1])
    low = unpack(triples[:, :2].reshape(-1, words.shape[1]), 2)
    shifts = torch.arange(32, dtype=torch.int32, device=words.device).view(1, 32, 1)
    high = ((triples[:, 2:] >> shifts) & 1).to(torch.uint8).reshape(-1, words.shape[1])
    return low | high << 2
