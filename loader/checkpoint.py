"""A checkpoint on disk: which files belong to it, what their headers say, and whether it all fits together.

Nothing here reads a weight but the small tensors that only their values can vouch for; a faulty
checkpoint is refused before a model is built or a device touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ropewalk.errors import CheckpointError, MissingFileError, QuantizeConfigError, UsageError
from ropewalk.gptq.format import BITS
from ropewalk.loader.check_layers import check_format, check_layers
from ropewalk.loader.encodings import find_layers
from ropewalk.loader.packed_layer import PackedLayer
from ropewalk.loader.quantize_config import QuantizeConfig, read_json, read_quantize_configs
from ropewalk.loader.reader import Reader
from ropewalk.loader.safetensors_file import TensorEntry
from ropewalk.loader.settle import infer, settle
from ropewalk.loader.weight_files import find_weights, listing, read_tensors


@dataclass
class Checkpoint:
    """A folder with a model in it.

    Attributes:
        folder: where it is.
        config: config.json as read.
        files: the files that hold the weights.
        tensors: name -> entry, over all files.
        quantize_config: how the layers are packed; None for a checkpoint that is not quantized.
        layers: name -> packed layer, in the order of the files.
        warnings: what was odd but could be dealt with, a sentence each.
    """

    folder: Path
    config: dict[str, Any]
    files: list[Path]
    tensors: dict[str, TensorEntry]
    quantize_config: QuantizeConfig | None = None
    layers: dict[str, PackedLayer] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def reader(self) -> Reader:
        """Return a reader of the tensors, to be closed."""
        return Reader(self)

    def read(self, name: str) -> Tensor:
        """Read one tensor; for many, `reader` keeps the files open."""
        with self.reader() as reader:
            return reader.read(name)

    def plain_tensors(self) -> list[str]:
        """Return the names of the tensors that belong to no packed layer, in the order of the files."""
        packed = {entry.name for layer in self.layers.values() for entry in layer.entries.values()}
        return [name for name in self.tensors if name not in packed]

    def nbytes(self) -> int:
        """Return how many bytes the tensors take on disk."""
        return sum(entry.nbytes for entry in self.tensors.values())


def open_checkpoint(
    folder: str | Path, *, file: str | Path | None = None, bits: int | None = None, group_size: int | None = None
) -> Checkpoint:
    """Find and check the checkpoint in a folder.

    Args:
        folder: has config.json.
        file: the file with the weights, in that folder or beside it; by default what the folder makes plain.
        bits, group_size: how it is packed, for files that do not tell; they count more than what a config says, and
            less than what the tensors prove.

    Raises:
        MissingFileError: no folder, no config.json, or no weights in a format that is read here.
        UsageError: bits or a group size that cannot be.
        CheckpointError: one of its kinds, for a file at fault; FormatError for packed tensors at fault.
    """
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise UsageError(f"bits: expected {', '.join(map(str, BITS))}, found {bits!r}")
    if group_size is not None and (type(group_size) is not int or (group_size < 1 and group_size != -1)):
        raise UsageError(f"group_size: expected -1 or a positive number, found {group_size!r}")
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    sources, unreadable = read_quantize_configs(folder, config)
    base_names = (source.raw.get("model_file_base_name") for source in sources)
    weights = find_weights(folder, [name for name in base_names if isinstance(name, str) and name], file)
    tensors, warnings = read_tensors(weights)
    warnings[:0] = unreadable
    checkpoint = Checkpoint(folder, config, weights.files, tensors, warnings=warnings)
    layers = find_layers(tensors)
    if not layers:
        if sources:
            raise QuantizeConfigError(sources[0].source, "packed layers (.qweight) in the weights", "none")
        if bits is not None or group_size is not None:
            warnings.append("bits and group_size mean nothing here: no layer is packed")
        return checkpoint
    with checkpoint.reader() as reader:
        if sources:
            settings, odd = settle(sources, layers, bits, group_size)
        else:
            settings, odd = infer(layers, config, reader.read, bits, group_size)
        warnings += odd
        settings, odd = check_format(settings, layers, reader)
        warnings += odd
        checkpoint.layers, odd = check_layers(settings, layers, tensors, reader)
        warnings += odd
    checkpoint.quantize_config = settings
    return checkpoint


def _read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json."""
    expected = "a folder with a model (config.json and its weights)"
    if not folder.exists():
        raise MissingFileError(folder, expected, "nothing of this name")
    if not folder.is_dir():
        raise MissingFileError(folder, expected, "a file")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise MissingFileError(folder, "a model's config.json", listing(folder))
    config = read_json(config_file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(config_file, "a JSON object with a model_type", repr(config)[:80])
    return config
