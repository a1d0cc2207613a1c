"""llama.cpp's own decoding on the CPU, through the low-level functions of llama-cpp-python (0.3)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.base import Packed, imported
from ropewalk.bench.peers.decode.base import DecodePeer, Decoder
from ropewalk.bench.peers.decode.with_transformers import CHUNK


class LlamaCpp(DecodePeer):
    """The same codes and scales as Q4_0, which llama.cpp repacks for the processor as it loads them.

    Args:
        head: type of the output embedding: "F16", as the folder has it, or "Q8_0".
    """

    package = "llama_cpp"
    devices = ("cpu",)
    asymmetric = False
    dtypes = (torch.float32,)
    most_sequences = 1  # more are its own server's matter
    families = ("llama",)
    fills_at_once = False

    def __init__(self, name: str = "llama.cpp", head: str = "F16"):
        self.name = name
        self.head = head

    def cannot_hold(self, packed: Packed) -> str | None:
        """Besides the usual, say which groups its blocks do not divide."""
        if packed.group_size > 0 and packed.group_size % 32:
            return "needs groups in steps of 32"
        return super().cannot_hold(packed)

    def nbytes(self, model: PackedModel, dtype: torch.dtype, context: float, batch: int = 1) -> float:
        """Return 18 bytes for 32 codes, and the rest as it keeps it: keys and values in 16 bits."""
        shape = model.shape
        head = 34 / 32 if self.head == "Q8_0" else 2
        linears = sum(k * n for _, k, n in shape.linears()) / 32 * 18
        rest = shape.vocab * shape.hidden * head + 4 * shape.hidden * len(shape.norms())
        return linears + rest + model.others_bytes(context)

    def load(self, model: PackedModel, dtype: torch.dtype, device: torch.device) -> Decoder:
        """Write the GGUF file, once, and load it."""
        from ropewalk.bench.gguf import write_gguf

        path = model.folder.with_name(f"{model.folder.name}-{self.head.lower()}.gguf")
        if not path.is_file():
            write_gguf(model, path, self.head)
        return _Decoder(imported("llama_cpp"), path, model.shape.vocab, f"output embedding {self.head}")


class _Decoder(Decoder):
    def __init__(self, lib: Any, path: Any, vocab: int, note: str):
        self.lib, self.vocab, self.note = lib, vocab, note
        # It tells all about a model as it loads it; what went wrong is in the exceptions below.
        self._log = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._log, ctypes.c_void_p())
        lib.llama_backend_init()
        self.context = None
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path.name}")

    def start(self, batch: int, capacity: int) -> None:
        self.stop()
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.no_perf = capacity, min(capacity, CHUNK), True
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = self.lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")

    def fill(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.prefill(torch.randint(0, self.vocab, (1, tokens), generator=generator))

    def rewind(self, tokens: int) -> None:
        if not self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, tokens, -1):
            raise RuntimeError("llama.cpp could not shorten its cache")

    def prefill(self, ids: Tensor) -> Tensor:
        for chunk in ids[0].split(CHUNK):
            logits = self._decode(chunk.tolist())
        return logits[None]

    def step(self, tokens: Tensor) -> Tensor:
        return self._decode(tokens.tolist())[None]

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

    def stop(self) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        self.context = None

    def close(self) -> None:
        self.stop()
        if self.model:
            self.lib.llama_model_free(self.model)
        self.model = None
