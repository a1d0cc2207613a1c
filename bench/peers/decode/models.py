"""Decoders that are models of transformers: ours, the same weights unpacked, and GPTQModel's."""

from __future__ import annotations

from typing import Any

import torch

import ropewalk.loader.load as loading
from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.base import imported
from ropewalk.bench.peers.decode.base import DecodePeer
from ropewalk.bench.peers.decode.plain import plain_model
from ropewalk.bench.peers.decode.with_transformers import TransformersDecoder
from ropewalk.bench.peers.ours import OURS, set_mode


class Ropewalk(DecodePeer):
    """`ropewalk.load`, as a user calls it.

    Args:
        mode: of our kernels for the CPU, None for their default.
        own: the dtype it computes in, whatever is asked for.
        devices, by_default: where it runs, and where it does so without being named.
        compiled: whether to compile its step, as `generate` does.
        options: what `ropewalk.load` is given besides.
    """

    bits = (2, 3, 4, 8)
    act_order = True
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)

    def __init__(
        self,
        name: str = OURS,
        mode: str | None = None,
        own: torch.dtype | None = None,
        devices: tuple[str, ...] = ("cpu", "cuda"),
        *,
        by_default: tuple[str, ...] = ("cpu", "cuda"),
        compiled: bool = False,
        **options: Any,
    ):
        self.name = name
        self.mode = mode
        self.devices = devices
        self.by_default = by_default
        self.compiled = compiled
        self.options = options
        if own is not None:
            self.dtypes = (own,)

    def memory(self, model: PackedModel, dtype: torch.dtype) -> float:
        """Return the size of the folder and of a layer; `bench load` measures that."""
        return 1.1 * model.shape.packed_bytes(model.packing) + 2e8

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device) -> TransformersDecoder:
        """Load the folder."""
        loaded, _ = loading.load(model.folder, dtype=dtype, device_map=device, **self.options)
        set_mode(loaded, self.mode)
        return TransformersDecoder(loaded, compiled=self.compiled)


class Dense(DecodePeer):
    """transformers' model with the weights unpacked to a dtype."""

    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        by_default: tuple[str, ...] = ("cpu", "cuda"),
        *,
        compiled: bool = False,
    ):
        self.name = name
        self.dtypes = (dtype,)
        self.by_default = by_default
        self.compiled = compiled

    def dtype(self, asked: torch.dtype) -> torch.dtype:
        """Return its own: each dtype is a peer of its own."""
        return self.dtypes[0]

    def nbytes(self, model: PackedModel, dtype: torch.dtype, context: float, batch: int = 1) -> float:
        """Return the size of all weights in the dtype, and of keys and values."""
        return model.dense_step_bytes(context, batch, dtype.itemsize)

    def memory(self, model: PackedModel, dtype: torch.dtype) -> float:
        """Return the size of all weights."""
        return 1.1 * model.shape.parameters() * dtype.itemsize

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device) -> TransformersDecoder:
        """Unpack layer by layer."""
        return TransformersDecoder(plain_model(model, dtype, device), compiled=self.compiled)


class GPTQModel(DecodePeer):
    """`GPTQModel.load` of the same folder (7.6), with the kernel that it selects."""

    name = "gptqmodel"
    package = "gptqmodel"
    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True
    dtypes = (torch.bfloat16, torch.float16)  # its kernels for the CPU want bfloat16

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device) -> TransformersDecoder:
        """Load the folder; it compiles kernels at its first calls."""
        gptqmodel = imported("gptqmodel")
        loaded = gptqmodel.GPTQModel.load(str(model.folder), device=str(device), dtype=dtype).model.eval()
        kinds = {type(module).__name__ for module in loaded.modules() if hasattr(module, "qweight")}
        return TransformersDecoder(loaded, ", ".join(sorted(kinds)))
