"""Every error that ropewalk raises on purpose.

This module stands below all floors of the house: it imports nothing, and every floor may import it.
A message names what was expected and what was found; the command line prints it as one line.
"""

from __future__ import annotations


class RopewalkError(Exception):
    """Base of all of them."""


class UsageError(RopewalkError):
    """The call itself is wrong: an unknown option value, arguments that contradict each other."""


class RopeError(RopewalkError, ValueError):
    """A rotary embedding that cannot be: an unknown type, a missing or impossible parameter."""


class FormatError(RopewalkError, ValueError):
    """Packed tensors of one layer that do not belong together, or that this format cannot hold.

    Attributes:
        tensor: name of the tensor at fault, as in the checkpoint.
        expected, found: the two sides of the disagreement, as text.
        file: the file it came from, or "" where the tensors did not come from a file.
    """

    def __init__(self, tensor: str, expected: object, found: object, file: str = ""):
        self.tensor, self.expected, self.found, self.file = tensor, str(expected), str(found), file
        place = f"{file}: {tensor}" if file else tensor
        super().__init__(f"{place}: expected {expected}, found {found}")


class CheckpointError(RopewalkError):
    """A file or folder that is not what it should be.

    Attributes:
        file: path of the file or folder.
        expected, found: the two sides of the disagreement, as text.
    """

    def __init__(self, file: object, expected: object, found: object):
        self.file, self.expected, self.found = str(file), str(expected), str(found)
        super().__init__(f"{file}: expected {expected}, found {found}")


class MissingFileError(CheckpointError):
    """A file or folder that is not there."""


class NotSafetensorsError(CheckpointError):
    """A file that is something else under a .safetensors name: too short, a Git-LFS pointer, a web page."""


class HeaderError(CheckpointError):
    """A safetensors header that cannot be read: its length, encoding, JSON or structure."""


class TensorEntryError(CheckpointError):
    """A header's entry for one tensor that cannot be: its dtype, shape or span."""


class OffsetsError(CheckpointError):
    """Tensors that overlap, leave gaps, or do not end where the file ends (a truncated download)."""


class QuantizeConfigError(CheckpointError):
    """A quantization config that is missing, not readable, or asks for what GPTQ cannot hold."""


class MissingTensorsError(CheckpointError):
    """Tensors that the model needs and the checkpoint lacks, or the reverse."""


class ContextLengthError(RopewalkError, ValueError):
    """A prompt that does not fit into the model's context."""


class MissingPackageError(RopewalkError, ImportError):
    """An optional package is needed for this; the message names the extra that brings it."""


class HubError(CheckpointError):
    """A model that the Hub does not give and its cache does not hold: no connection, no such name, no access.

    `file` is the name that was asked for.
    """


class AdapterError(CheckpointError):
    """An adapter that cannot be put on its base: of other sizes, for other layers, of a kind that packed layers
    do not take.
    """


class MergeError(UsageError, ValueError):
    """An adapter that was to be merged into packed weights; a ValueError, too, as PEFT raises for that."""


class NotEnoughMemoryError(RopewalkError, MemoryError):
    """A device has less memory free than the model takes there.

    Attributes:
        device: its name.
        needed, free: in bytes.
    """

    def __init__(self, device: str, needed: int, free: int):
        self.device, self.needed, self.free = device, needed, free
        super().__init__(f"memory of {device}: expected {needed / 1e9:.2f} GB free, found {free / 1e9:.2f} GB")


class PickleFileError(CheckpointError):
    """A .pt or .bin file that torch cannot read as tensors and nothing else."""


class UnsafePickleError(PickleFileError):
    """A .pt or .bin file that is not opened, because reading it could run code or take any amount of memory."""


class PatchError(RopewalkError):
    """A front end whose code is not as it is known here, so that nothing of it was replaced.

    Attributes:
        front_end: the package, with its version.
        expected, found: the two sides of the disagreement, as text.
    """

    def __init__(self, front_end: str, expected: object, found: object):
        self.front_end, self.expected, self.found = front_end, str(expected), str(found)
        super().__init__(f"{front_end}: expected {expected}, found {found}; nothing was replaced")
