"""vLLM with our method in it, with its own, and without any: what `ropewalk bench decode --engine vllm` compares."""

from __future__ import annotations

from pathlib import Path

import torch

from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.decode.base import ModelProgram
from ropewalk.bench.peers.ours import OURS, modes
from ropewalk.bench.unpacked import float16_folder, no_disk_for_float16

BESIDES = 1_500_000_000  # bytes of what vLLM imports and compiles, about


class VllmPeer(ModelProgram):
    """vLLM that runs a packed model by a method of quantization; what it cannot hold it says itself when it starts.

    Args:
        quantization: vLLM's name of the method.
        mode: of our kernels for the CPU, None for their default.
    """

    package = "vllm"
    families = ("llama", "mixtral")  # MPT was dropped in 0.28
    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def __init__(self, name: str, quantization: str | None, mode: str | None = None):
        self.name, self.quantization, self.mode = name, quantization, mode

    def folder(self, model: PackedModel) -> Path:
        """Return the folder it is given."""
        return model.folder

    def memory(self, model: PackedModel, dtype: torch.dtype) -> float:
        """Return about how many bytes it needs, without the cache."""
        return 1.2 * model.shape.packed_bytes(model.packing) + BESIDES


class VllmUnpacked(VllmPeer):
    """vLLM that runs the same weights unpacked, from a folder in float16 that is made when it is first wanted."""

    def folder(self, model: PackedModel) -> Path:
        """Return that folder; make it where it is not there."""
        return float16_folder(model)

    def cannot_run(self, model: PackedModel) -> str | None:
        """Return that there is no room for the folder, or None."""
        return super().cannot_run(model) or no_disk_for_float16(model)

    def nbytes(self, model: PackedModel, dtype: torch.dtype, context: float, batch: int = 1) -> float:
        """Return the size of all weights in the dtype, and of keys and values."""
        return model.dense_step_bytes(context, batch, dtype.itemsize)

    def memory(self, model: PackedModel, dtype: torch.dtype) -> float:
        """Return about how many bytes it needs, without the cache."""
        return 1.1 * model.shape.parameters() * dtype.itemsize + BESIDES


def engine_peers(dtype: torch.dtype, device: torch.device, mode: str | None = None) -> list[VllmPeer]:
    """Return vLLM in each of its ways, with our method first: on a CPU in each of its modes.

    Args:
        dtype: of activations, which names the last of them.
        mode: of our kernels for the CPU, as `ours.modes` takes it.
    """
    named = modes(mode) if device.type == "cpu" else [(OURS, None)]
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    return [
        *(VllmPeer(name, "ropewalk", one) for name, one in named),
        VllmPeer("vllm", "gptq"),
        VllmUnpacked(f"vllm-{short}", None),
    ]
