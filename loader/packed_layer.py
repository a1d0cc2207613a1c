"""One packed layer of a checkpoint: how it is packed, and which tensors of which files hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ropewalk.loader.quantize_config import QuantizeConfig
from ropewalk.loader.safetensors_file import TensorEntry

# The tensors of a layer in the layout of `ropewalk.gptq.format`, which is the one that all others are read into.
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


@dataclass(frozen=True)
class PackedLayer:
    """What is known of a packed layer before anything but headers is read.

    Attributes:
        name: of the layer, as in the checkpoint.
        settings: how it is packed: the checkpoint's, with what `dynamic` says of this layer.
        in_features, out_features: K and N.
        has_bias, has_g_idx: whether there are these tensors when the layer has been read.
        entries: part -> entry, the parts as the encoding has them on disk ("qweight", "B", …).
        encoding: how they are laid out there, a key of `ropewalk.loader.encodings.ENCODINGS`.
    """

    name: str
    settings: QuantizeConfig
    in_features: int
    out_features: int
    has_bias: bool
    has_g_idx: bool
    entries: Mapping[str, TensorEntry] = field(default_factory=dict)
    encoding: str = "gptq"

    def nbytes(self) -> int:
        """Return how many bytes the tensors take on disk."""
        return sum(entry.nbytes for entry in self.entries.values())
