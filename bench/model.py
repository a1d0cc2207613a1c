"""A model of random weights packed by our own tools, kept on disk: what `ropewalk bench decode` and `load` run on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ropewalk.bench.peers.weight import Weight
from ropewalk.bench.random_model import write_random
from ropewalk.bench.shapes import Packing, Shape, parse_shape
from ropewalk.errors import RopewalkError
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.terminal import size

RECIPE = 2  # to count up when what is written changes, so that no old folder is taken for a new one


class NoRoomError(RopewalkError):
    """A model for which the disk has no room."""


@dataclass(frozen=True)
class PackedModel:
    """A packed model on disk.

    Attributes:
        name: of its shape, as --shapes has it.
    """

    name: str
    shape: Shape
    packing: Packing
    folder: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        return open_checkpoint(self.folder)

    def weight(self, layer: str) -> Weight:
        """Read a packed layer."""
        parts = (self.checkpoint.read(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
        return Weight(*self.packing, *parts)

    def step_bytes(self, context: float, batch: int = 1, itemsize: int = 2) -> float:
        """Return the fewest bytes that a step of `batch` sequences needs read.

        They are the packed layers, of experts as many as are hit on average, the output embedding, norms and routers as
        the folder holds them, and for each sequence what `others_bytes` says.
        """
        shape = self.shape
        parts = ["qweight", "scales"]
        parts += [] if self.packing.sym else ["qzeros"]
        parts += ["g_idx"] if self.packing.act_order else []
        size = self.checkpoint.tensors
        layers = sum(
            size[f"{layer}.{part}"].nbytes * shape.share_read(layer, batch)
            for layer, _, _ in shape.linears()
            for part in parts
        )
        rest = sum(size[name].nbytes for name in (*shape.norms(), *shape.routers(), shape.head))
        return layers + rest + batch * self.others_bytes(context, itemsize)

    def dense_step_bytes(self, context: float, batch: int, itemsize: int) -> float:
        """Return the fewest bytes that a step needs read where all weights are unpacked to `itemsize` bytes."""
        return self.shape.dense_count(batch) * itemsize + batch * self.others_bytes(context, itemsize)

    def others_bytes(self, context: float, itemsize: int = 2) -> float:
        """Return the bytes of a row of the embedding in 16 bits and of the keys and values of `context` tokens."""
        return 2 * self.shape.hidden + self.shape.kv_bytes(context, itemsize)


def model_cache() -> Path:
    """Return where models are kept: bench in $ROPEWALK_CACHE, or ropewalk/bench in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("ROPEWALK_CACHE")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ropewalk"), "bench").expanduser()


def packed_model(name: str, packing: Packing, root: Path, device: torch.device, *, rounded: bool = True) -> PackedModel:
    """Return a model from the cache, or make it: round normal random weights to nearest, and write the folder.

    The model with 1.1e9 parameters takes about 100 s on two cores, and 800 MB.

    Args:
        root: the cache.
        device: where to round.
        rounded: False for codes that are random themselves, which takes a hundredth of the time.

    Raises:
        UsageError: as `parse_shape`.
        NoRoomError: the disk has no room for it.
    """
    shape = parse_shape(name, packing)
    folder = root / f"{name.replace(':', '-')}-{packing.name}-{'' if rounded else 'random-'}{RECIPE}"
    if not (folder / "config.json").is_file():
        needed, free = shape.packed_bytes(packing), _disk_free(root)
        if 1.05 * needed > free:
            raise NoRoomError(f"{name} needs {size(needed)} on the disk with {root}; {size(free)} are left")
    make_once(folder, lambda work: write_random(shape, packing, work, device, rounded))
    return PackedModel(name, shape, packing, folder)


def _disk_free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def make_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a model's folder, unless it is there, by a function that writes into an empty one; a folder of that name
    is always whole.
    """
    if (folder / "config.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (work / "finished").mkdir()
        write(work / "finished")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "finished").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
