"""How a packed layer may lie on disk, and each turned into the checkpoint layout of `ropewalk.gptq.format`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ropewalk.gptq.format import check_shapes, check_values
from ropewalk.loader import gptq_for_llama, marlin
from ropewalk.loader.packed_layer import PARTS, PackedLayer
from ropewalk.loader.planar import decode_planar
from ropewalk.loader.quantize_config import QuantizeConfig
from ropewalk.loader.safetensors_file import TensorEntry

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Encoding:
    """A way to lie on disk.

    Attributes:
        name: as in `PackedLayer.encoding`.
        parts: what the tensors of a layer are called there; the first is the one by which a layer is known.
        small: those that are read when a checkpoint is opened, since only their values vouch for them.
        zeros: those that tell the zero points.
        check: from (part -> (shape, dtype), settings, prefix, file) to (in_features, out_features), or a FormatError.
        check_values: of the small parts, given (parts, settings, prefix, file): a FormatError if they cannot be.
        decode: from (layer, parts on disk) to "qweight", "qzeros", "scales" and, as the layer has them, "g_idx" and
            "bias", or to those of them that follow from the parts given; zero points in the version that
            layer.settings.checkpoint_format says.
    """

    name: str
    parts: tuple[str, ...]
    small: tuple[str, ...]
    zeros: tuple[str, ...]
    check: Callable[[Shapes, QuantizeConfig, str, str], tuple[int, int]]
    check_values: Callable[[Mapping[str, Tensor], QuantizeConfig, str, str], None]
    decode: Callable[[PackedLayer, dict[str, Tensor]], dict[str, Tensor]]


def _check_gptq(tensors: Shapes, settings: QuantizeConfig, prefix: str, file: str) -> tuple[int, int]:
    needs_g_idx = settings.desc_act and settings.group_size != -1 and not settings.static_groups
    return check_shapes(
        tensors,
        bits=settings.bits,
        group_size=settings.group_size,
        desc_act=needs_g_idx,
        prefix=prefix,
        file=file,
    )


def _check_values(parts: Mapping[str, Tensor], settings: QuantizeConfig, prefix: str, file: str) -> None:
    check_values(parts, prefix=prefix, file=file)


def _check_s(parts: Mapping[str, Tensor], settings: QuantizeConfig, prefix: str, file: str) -> None:
    check_values({"scales": parts["s"]}, prefix=prefix, file=file)


def _check_float_zeros(parts: Mapping[str, Tensor], settings: QuantizeConfig, prefix: str, file: str) -> None:
    check_values(parts, prefix=prefix, file=file)
    gptq_for_llama.whole_zeros(parts, settings.bits, prefix, file)


def _as_it_is(layer: PackedLayer, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return parts


_SMALL = ("scales", "g_idx")
ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Encoding("gptq", PARTS, _SMALL, ("qzeros",), _check_gptq, _check_values, _as_it_is),
        Encoding("gptq_p", PARTS, _SMALL, ("qzeros",), _check_gptq, _check_values, decode_planar),
        Encoding(
            "gptq-for-llama",
            gptq_for_llama.PARTS,
            ("scales", "zeros"),
            ("scales", "zeros"),
            gptq_for_llama.check_float_zeros,
            _check_float_zeros,
            gptq_for_llama.decode_float_zeros,
        ),
        Encoding("marlin", marlin.PARTS, ("s",), ("s",), marlin.check_marlin, _check_s, marlin.decode_marlin),
    )
}


def shapes_of(entries: Mapping[str, TensorEntry]) -> Shapes:
    """Return part -> (shape, dtype).

    Raises:
        TensorEntryError: a dtype that is not read here.
    """
    return {part: (entry.shape, entry.dtype) for part, entry in entries.items()}


def find_layers(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[str, dict[str, TensorEntry]]]:
    """Return name -> (encoding, part -> entry) of the packed layers, in the order of the files.

    "gptq_p" cannot be told from "gptq" by its tensors, and is never returned.
    """
    layers = {}
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if not layer:
            continue  # a layer has a name
        if part == "qweight":
            old = f"{layer}.zeros" in tensors and f"{layer}.qzeros" not in tensors
            encoding = ENCODINGS["gptq-for-llama" if old else "gptq"]
        elif part == "B" and f"{layer}.s" in tensors:
            encoding = ENCODINGS["marlin"]
        else:
            continue
        names = ((part, f"{layer}.{part}") for part in encoding.parts)
        entries = {part: tensors[full] for part, full in names if full in tensors}
        layers[layer] = (encoding.name, entries)
    return layers
