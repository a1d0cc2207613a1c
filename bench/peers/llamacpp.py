"""llama.cpp's matmul on the CPU, through the ggml libraries that llama-cpp-python (0.3) brings."""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ropewalk.bench.peers.base import Peer
from ropewalk.bench.peers.weight import Weight

_F32, _Q4_0 = 0, 2  # ggml_type
_BLOCK = 32  # codes of a block of Q4_0, which has a scale of its own
_METADATA = 1 << 20  # bytes for the descriptions of a few tensors and a graph

_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _InitParams(ctypes.Structure):
    _fields_: ClassVar = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class LlamaCpp(Peer):
    """`ggml_mul_mat` of a Q4_0 weight, repacked as llama.cpp repacks it; activations become int8 in blocks of 32.

    Q4_0 is W = (code - 8) * scale, so it holds a symmetric weight exactly, at half a bit more for each code.
    """

    name = "llama.cpp"
    package = "llama_cpp"
    devices = ("cpu",)
    asymmetric = False
    dtypes = (torch.float32,)

    def refuses(self, weight: Weight) -> str | None:
        """Besides the usual, say which groups its blocks do not divide."""
        if weight.rows_per_group % _BLOCK or weight.in_features % _BLOCK:
            return f"needs groups and K in steps of {_BLOCK}"
        return super().refuses(weight)

    def nbytes(self, weight: Weight, dtype: torch.dtype) -> int:
        """Return the size of the blocks: 18 bytes for 32 codes."""
        return weight.in_features * weight.out_features // _BLOCK * 18

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Write the blocks and hand them over; a graph is built at the first call with a number of rows."""
        ggml = _ggml()
        k, n = weight.in_features, weight.out_features
        owned: list[tuple[Any, Any]] = []
        context = ggml.context(owned)
        matrix = ggml.base.ggml_new_tensor_2d(context, _Q4_0, k, n)
        ggml.own(owned, ggml.base.ggml_backend_alloc_ctx_tensors_from_buft(context, ggml.repacking))
        given = ggml.base.ggml_new_tensor_2d(context, _F32, k, 1)
        if not ggml.base.ggml_backend_dev_supports_op(ggml.device, ggml.base.ggml_mul_mat(context, matrix, given)):
            # Asked before the weight is written: without a kernel to repack for, writing it ends the process.
            raise RuntimeError("ggml has no repacked Q4_0 kernel for this processor and shape")
        blocks = q4_0(weight)
        ggml.base.ggml_backend_tensor_set(matrix, blocks.data_ptr(), 0, blocks.nbytes)
        graphs: dict[int, tuple[Any, Any, Any]] = {}

        def run(x: Tensor) -> Tensor:
            m = x.shape[0]
            if m not in graphs:
                graphs[m] = ggml.product(matrix, k, m, owned)
            graph, given, result = graphs[m]
            out = torch.empty(m, n)
            ggml.base.ggml_backend_tensor_set(given, x.data_ptr(), 0, x.nbytes)
            if ggml.base.ggml_backend_graph_compute(ggml.backend, graph):
                raise RuntimeError("ggml could not compute")
            ggml.base.ggml_backend_tensor_get(result, out.data_ptr(), 0, out.nbytes)
            return out

        weakref.finalize(run, _free, owned)
        return run


def _free(owned: list[tuple[Any, Any]]) -> None:
    for free, pointer in reversed(owned):
        free(pointer)


def q4_0(weight: Weight) -> Tensor:
    """Return a symmetric 4-bit weight as ggml's blocks, uint8 [N, K / 32, 18]: a float16 scale, then 16 bytes, of
    which byte j holds code j in its low half and code j + 16 in its high one.
    """
    codes = weight.codes().t().reshape(weight.out_features, -1, _BLOCK)
    groups = weight.g_idx[::_BLOCK].long()
    scales = weight.scales.t()[:, groups].contiguous().view(torch.uint8).reshape(*codes.shape[:2], 2)
    return torch.cat([scales, codes[..., :16] | codes[..., 16:] << 4], -1).contiguous()


class _Ggml:
    """The libraries, a CPU backend, and the memory that repacks."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("llama_cpp")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for library, name, result, *arguments in (
            (self.base, "ggml_init", pointer, _InitParams),
            (self.base, "ggml_free", None, pointer),
            (self.base, "ggml_backend_buffer_free", None, pointer),
            (self.base, "ggml_log_set", None, _Log, pointer),
            (self.base, "ggml_new_tensor_2d", pointer, pointer, integer, ctypes.c_int64, ctypes.c_int64),
            (self.base, "ggml_mul_mat", pointer, pointer, pointer, pointer),
            (self.base, "ggml_new_graph", pointer, pointer),
            (self.base, "ggml_build_forward_expand", None, pointer, pointer),
            (self.base, "ggml_backend_alloc_ctx_tensors", pointer, pointer, pointer),
            (self.base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer),
            (self.base, "ggml_backend_tensor_set", None, pointer, pointer, size, size),
            (self.base, "ggml_backend_tensor_get", None, pointer, pointer, size, size),
            (self.base, "ggml_backend_graph_compute", integer, pointer, pointer),
            (self.base, "ggml_backend_reg_dev_get", pointer, pointer, size),
            (self.base, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p),
            (self.base, "ggml_backend_buft_name", ctypes.c_char_p, pointer),
            (self.base, "ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer),
            (self.cpu, "ggml_backend_cpu_init", pointer),
            (self.cpu, "ggml_backend_cpu_reg", pointer),
            (self.cpu, "ggml_backend_cpu_set_n_threads", None, pointer, integer),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._log = _Log(lambda level, text, data: None)  # it has a line for every weight it repacks
        self.base.ggml_log_set(self._log, None)
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.device = self.base.ggml_backend_reg_dev_get(self.cpu.ggml_backend_cpu_reg(), 0)
        self.repacking = self._repacking()

    def _repacking(self) -> Any:
        """Return the kind of memory in which a weight is laid out for the processor."""
        registry = self.cpu.ggml_backend_cpu_reg()
        address = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(self.device)
            i = 0
            while kinds and kinds[i]:
                if self.base.ggml_backend_buft_name(kinds[i]) == b"CPU_REPACK":
                    return kinds[i]
                i += 1
        raise RuntimeError("this build of ggml does not repack weights")

    def context(self, owned: list[tuple[Any, Any]]) -> Any:
        """Return a new context, which only describes tensors; `owned` gets what frees it."""
        context = self.base.ggml_init(_InitParams(_METADATA, None, True))
        owned.append((self.base.ggml_free, context))
        return context

    def own(self, owned: list[tuple[Any, Any]], buffer: Any) -> None:
        """See that a buffer is there and is freed with `owned`."""
        if not buffer:
            raise MemoryError("ggml could not allocate a tensor")
        owned.append((self.base.ggml_backend_buffer_free, buffer))

    def product(self, matrix: Any, k: int, m: int, owned: list[tuple[Any, Any]]) -> tuple[Any, Any, Any]:
        """Return (graph, input, output) of a matmul with m rows."""
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        context = self.context(owned)
        given = self.base.ggml_new_tensor_2d(context, _F32, k, m)
        result = self.base.ggml_mul_mat(context, matrix, given)
        graph = self.base.ggml_new_graph(context)
        self.base.ggml_build_forward_expand(graph, result)
        self.own(owned, self.base.ggml_backend_alloc_ctx_tensors(context, self.backend))
        return graph, given, result


@cache
def _ggml() -> _Ggml:
    return _Ggml()
