"""llama.cpp's own decoding on the CPU, through the low-level functions of llama-cpp-python (0.3)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.base import Packed, imported
from ropewalk.bench.peers.decode.base import DecodePeer, Decoder


class LlamaCpp(DecodePeer):
    """The same codes and scales as Q4_0, which llama.cpp repacks for the processor as it loads them.

    Args:
        head: type of the output embedding: "F16", as the folder has it, or "Q8_0".
    """

    package = "llama_cpp"
    devices = ("cpu",)
    asymmetric = False
    dtypes = (torch.float32,)

    def __init__(self, name: str = "llama.cpp", head: str = "F16"):
        self.name = name
        self.head = head

    def cannot_hold(self, packed: Packed) -> str | None:
        """Besides the usual, say which groups its blocks do not divide."""
        if packed.group_size > 0 and packed.group_size % 32:
            return "needs groups in steps of 32"
        return super().cannot_hold(packed)

    def nbytes(self, model: PackedModel, dtype: torch.dtype, context: float) -> float:
        """Return 18 bytes for 32 codes, and the rest as it keeps it."""
        shape = model.shape
        head = 34 / 32 if self.head == "Q8_0" else 2
        linears = sum(k * n for _, k, n in shape.linears()) / 32 * 18
        rest = shape.vocab * shape.hidden * head + 4 * shape.hidden * len(shape.norms())
        return linears + rest + model.others_bytes(context)

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device, capacity: int) -> Decoder:
        """Write the GGUF file, once, and load it."""
        from ropewalk.bench.gguf import write_gguf

        path = model.folder.with_name(f"{model.folder.name}-{self.head.lower()}.gguf")
        if not path.is_file():
            write_gguf(model, path, self.head)
        return _Decoder(imported("llama_cpp"), path, model.shape.vocab, capacity, f"output embedding {self.head}")


class _Decoder(Decoder):
    def __init__(self, lib: Any, path: Any, vocab: int, capacity: int, note: str):
        self.lib, self.vocab, self.note = lib, vocab, note
        # It tells all about a model as it loads it; what went wrong is in the exceptions below.
        self._log = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._log, ctypes.c_void_p())
        lib.llama_backend_init()
        self.context = None
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path.name}")
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.no_perf = capacity, capacity, True
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            self.close()
            raise RuntimeError("llama.cpp could not make a context")

    def prefill(self, ids: Tensor) -> Tensor:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._decode(ids.tolist())

    def step(self, token: int) -> Tensor:
        return self._decode([token])

    def _decode(self, tokens: list[int]) -> Tensor:
        given = (ctypes.c_int32 * len(tokens))(*tokens)  # of which the batch keeps no more than the address
        batch = self.lib.llama_batch_get_one(given, len(tokens))
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        address = ctypes.cast(logits, ctypes.c_void_p).value
        assert address is not None
        return torch.frombuffer((ctypes.c_float * self.vocab).from_address(address), dtype=torch.float32)

    def close(self) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        if self.model:
            self.lib.llama_model_free(self.model)
        self.context = self.model = None
