"""Decoders that are models of transformers: ours, the same weights unpacked, and GPTQModel's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import ropewalk.loader.load as loading
from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.base import imported
from ropewalk.bench.peers.decode.base import DecodePeer, Decoder, TransformersDecoder
from ropewalk.bench.peers.ours import OURS, set_mode
from ropewalk.bench.peers.weight import Weight


class Ropewalk(DecodePeer):
    """`ropewalk.load`, as a user calls it.

    Args:
        mode: of our kernels for the CPU, None for their default.
        own: the dtype it computes in, whatever is asked for.
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
    ):
        self.name = name
        self.mode = mode
        self.devices = devices
        if own is not None:
            self.dtypes = (own,)

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device, capacity: int) -> Decoder:
        """Load the folder."""
        loaded, _ = loading.load(model.folder, dtype=dtype, device_map=device)
        set_mode(loaded, self.mode)
        return TransformersDecoder(loaded, capacity)


class Dense(DecodePeer):
    """transformers' Llama with the weights unpacked to a dtype."""

    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True

    def __init__(self, name: str, dtype: torch.dtype, by_default: tuple[str, ...] = ("cpu", "cuda")):
        self.name = name
        self.dtypes = (dtype,)
        self.by_default = by_default

    def dtype(self, asked: torch.dtype) -> torch.dtype:
        """Return its own: each dtype is a peer of its own."""
        return self.dtypes[0]

    def nbytes(self, model: PackedModel, dtype: torch.dtype, context: float) -> float:
        """Return the size of all weights in the dtype, and of keys and values."""
        return model.dense_count() * dtype.itemsize + model.others_bytes(context)

    def memory(self, model: PackedModel, dtype: torch.dtype) -> float:
        """Return the size of all weights."""
        return 1.1 * self.nbytes(model, dtype, 0) + model.shape.vocab * model.shape.hidden * dtype.itemsize

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device, capacity: int) -> Decoder:
        """Unpack layer by layer."""
        return TransformersDecoder(plain_model(model, dtype, device), capacity)


class GPTQModel(DecodePeer):
    """`GPTQModel.load` of the same folder (7.6), with the kernel that it selects."""

    name = "gptqmodel"
    package = "gptqmodel"
    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True
    dtypes = (torch.bfloat16, torch.float16)  # its kernels for the CPU want bfloat16

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device, capacity: int) -> Decoder:
        """Load the folder; it compiles kernels at its first calls."""
        gptqmodel = imported("gptqmodel")
        loaded = gptqmodel.GPTQModel.load(str(model.folder), device=str(device), dtype=dtype).model.eval()
        kinds = {type(module).__name__ for module in loaded.modules() if hasattr(module, "qweight")}
        return TransformersDecoder(loaded, capacity, ", ".join(sorted(kinds)))


class Unpacking(nn.Module):
    """A linear layer that unpacks its weight at every call, in float32: slow, small and plain."""

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Return x W."""
        return linear(x, self.weight.dense().t())


def plain_model(model: PackedModel, dtype: torch.dtype, device: torch.device, *, unpack: bool = True) -> nn.Module:
    """Return transformers' own Llama with a packed model's weights; our loader has no part in it.

    Args:
        unpack: whether to unpack the weights now, or at every call.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = {key: value for key, value in model.checkpoint.config.items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig.from_dict(raw))
    # Its frequencies are computed and not loaded, so it must not be one of nowhere.
    plain.model.rotary_emb = type(plain.model.rotary_emb)(plain.config).to(device)
    tensors = {}
    for layer, _, _ in model.shape.linears():
        weight = model.weight(layer)
        if unpack:
            tensors[f"{layer}.weight"] = weight.dense().t().to(device, dtype).contiguous()
        else:
            parent, _, name = layer.rpartition(".")
            setattr(plain.get_submodule(parent), name, Unpacking(weight.to(device)))
    for name in (*model.shape.norms(), "model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = model.checkpoint.read(name).to(device, dtype)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()
