"""Triton kernels compiled ahead of time for architectures that need not be here, and what became of them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ropewalk.bench.aot_listing import (
    WIDEST,
    amd_resources,
    amdgcn,
    inner_loop,
    ir_loads,
    nvidia_resources,
    sass,
    tensor_core_instruction,
    widest_load,
)
from ropewalk.errors import MissingPackageError, RopewalkError


class Architecture(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        backend, name, lanes: as triton's GPUTarget takes them; lanes are the threads of a warp.
        shared: bytes of shared memory that one program may have.
    """

    backend: str
    name: int | str
    lanes: int
    shared: int


# Shared memory: the table of technical specifications in the CUDA programming guide, per block with opt-in; 64 kB of
# LDS on every AMD device here.
ARCHITECTURES = {
    "sm_75": Architecture("cuda", 75, 32, 65536),
    "sm_80": Architecture("cuda", 80, 32, 166912),
    "sm_86": Architecture("cuda", 86, 32, 101376),
    "sm_89": Architecture("cuda", 89, 32, 101376),
    "sm_90": Architecture("cuda", 90, 32, 232448),
    "sm_100": Architecture("cuda", 100, 32, 232448),
    "sm_120": Architecture("cuda", 120, 32, 101376),
    "gfx942": Architecture("hip", "gfx942", 64, 65536),
    "gfx1100": Architecture("hip", "gfx1100", 32, 65536),
}

# Of the tensor memory of sm_100. Triton compiles a kernel that needs more into one that stops at once.
TENSOR_MEMORY_COLUMNS = 512

# What a row holds of a compiled kernel, besides its name.
MEASURED = (
    "registers",
    "shared_bytes",
    "tensor_memory_columns",
    "spills",
    "mma",
    "widest_load_bytes",
    "instructions",
    "instructions_per_byte",
)


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one use.

    Attributes:
        name: what rows call it.
        kernel: the function that triton.jit returned.
        signature: type of each argument that is not constant, as triton.tools.compile writes it: "*fp16:16" is
            a pointer divisible by 16, "i32" a number, "i32:1" one that is 1; a tuple of them for a tuple.
        constexprs: the constants, None where an optional argument is left out.
        role: what it is for, which decides what `check` asks of it: "decode", "matmul" (with tensor cores both),
            "decode-fma" (without), "dequantize", "reduce", "rope", "norm", or "peer", of which nothing is asked.
        weights: arguments that point to the packed weight.
        packed_bytes: how many bytes of it one program reads in one pass of its inner loop; 0 without such a loop.
        num_warps, num_stages, maxnreg: as in a launch; maxnreg is for NVIDIA alone.
        architectures: those it is made for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    role: str
    weights: tuple[str, ...] = ()
    packed_bytes: int = 0
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)


def compile_variant(variant: Variant, arch: str) -> dict[str, Any]:
    """Compile a variant for one of ARCHITECTURES and describe the result.

    Returns:
        kernel, role, arch: what was compiled.
        registers: of a thread.
        shared_bytes, tensor_memory_columns: of a program.
        spills: bytes of local memory of a thread.
        mma: the tensor-core instruction ("HMMA", "HGMMA", "tcgen05", "MFMA", "WMMA"), or None.
        widest_load_bytes: by one thread at once, of the weight, or of anything where the variant names no weight.
        instructions: of the whole kernel.
        instructions_per_byte: in the inner loop, of all threads for a byte of packed weight, or None without one.
        error: None, or why it did not compile; all that was measured is None then.

    Raises:
        MissingPackageError: triton is not installed.
        RopewalkError: the process interprets Triton (TRITON_INTERPRET) and cannot compile it.
    """
    compiler = _compiler()
    target = ARCHITECTURES[arch]
    # For AMD one stage less: what is loaded ahead lies in registers there.
    stages = variant.num_stages if target.backend == "cuda" else min(variant.num_stages, 2)
    options: dict[str, int | None] = {"num_warps": variant.num_warps, "num_stages": stages}
    if target.backend == "cuda":
        options |= {"maxnreg": variant.maxnreg}
    row: dict[str, Any] = {"kernel": variant.name, "role": variant.role, "arch": arch, **dict.fromkeys(MEASURED)}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Triton prints the whole kernel if ptxas refuses it
            compiled = compiler.compile(
                _source(compiler, variant),
                target=compiler.GPUTarget(target.backend, target.name, target.lanes),
                options=options,
            )
    except (compiler.TritonError, RuntimeError) as error:
        return row | {"error": _reason(error)}
    return row | _measure(compiled, variant, target) | {"error": None}


def _reason(error: Exception) -> str:
    """Return the line that says why: what ptxas calls an error, or else the last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if " error " in line), lines[-1]).strip()


def _measure(compiled: Any, variant: Variant, target: Architecture) -> dict[str, Any]:
    """Return the values of MEASURED."""
    if target.backend == "cuda":
        code, resources = disassemble(compiled.asm["cubin"])
        machine = sass(code)
        used = nvidia_resources(resources, machine)
    else:
        machine = amdgcn(compiled.asm["amdgcn"])
        used = amd_resources(compiled.asm["amdgcn"])
    loads = ir_loads(compiled.asm["llir"], _places(variant))
    loop = inner_loop(machine, loads) if variant.packed_bytes else None
    threads = variant.num_warps * target.lanes
    values = (
        used["registers"],
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        used["spills"],
        tensor_core_instruction(machine),
        widest_load(machine, loads, bool(variant.weights)),
        len(machine.instructions),
        loop and round(loop[0] * threads / (loop[1] * variant.packed_bytes), 2),
    )
    return dict(zip(MEASURED, values, strict=True))


def check(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with compiled kernels, one line for each violated rule.

    The rules: it compiles; no spills; no more shared or tensor memory than the device has; the tensor cores are used
    by the kernels meant for them; whatever serves decoding reads its weight 16 bytes at a time.
    """
    wrong = []
    for row in rows:
        who = f"{row['kernel']} on {row['arch']}"
        if row["role"] == "peer":
            continue
        if row["error"]:
            wrong.append(f"{who}: expected it to compile, found: {row['error']}")
            continue
        limit = ARCHITECTURES[row["arch"]].shared
        if row["spills"]:
            wrong.append(f"{who}: expected no spills, found {row['spills']} bytes of local memory")
        if row["shared_bytes"] > limit:
            wrong.append(f"{who}: expected at most {limit} bytes of shared memory, found {row['shared_bytes']}")
        if row["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS:
            columns = f"{TENSOR_MEMORY_COLUMNS} columns of tensor memory, found {row['tensor_memory_columns']}"
            wrong.append(f"{who}: expected at most {columns}")
        if row["role"] in ("decode", "matmul") and row["mma"] is None:
            wrong.append(f"{who}: expected a tensor-core instruction, found none")
        if row["role"] in ("decode", "decode-fma") and row["widest_load_bytes"] < WIDEST:
            wrong.append(f"{who}: expected weight loads of {WIDEST} bytes, found {row['widest_load_bytes']}")
    return wrong


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return what triton's own nvdisasm and cuobjdump say of a cubin: the code, and the use of resources."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def tool(name: str, *arguments: str) -> str:
        return subprocess.run([tools / name, *arguments], capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return tool("nvdisasm", "-c", str(path)), tool("cuobjdump", "-res-usage", str(path))


def triton_version() -> str:
    """Return triton's version, where it can compile; raises as `compile_variant` does."""
    return _compiler().version


class _Compiler(NamedTuple):
    compile: Any
    ASTSource: Any
    GPUTarget: Any
    TritonError: type[Exception]
    version: str


def _compiler() -> _Compiler:
    """Import what is needed of triton: nobody pays for it by importing this module."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.errors import TritonError
    except ImportError as error:
        raise MissingPackageError(f"triton: expected it installed, to compile kernels, found: {error}") from None
    if triton.knobs.runtime.interpret:
        raise RopewalkError("TRITON_INTERPRET: expected it unset, so that kernels can be compiled, found it set")
    return _Compiler(triton.compile, ASTSource, GPUTarget, TritonError, str(triton.__version__))


def _source(compiler: _Compiler, variant: Variant) -> Any:
    """Return the variant as triton.compile takes it."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def resolve(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(resolve(one, (*path, i)) for i, one in enumerate(kind))
        name, _, hint = kind.partition(":")
        if hint == "1":
            constants[path] = 1
            return "constexpr"
        if hint:
            attributes[path] = [["tt.divisibility", int(hint)]]
        return name

    signature = {}
    for i, name in enumerate(variant.kernel.arg_names):
        if name in variant.constexprs:
            constants[i,] = variant.constexprs[name]
            signature[name] = "constexpr"
        else:
            signature[name] = resolve(variant.signature[name], (i,))
    return compiler.ASTSource(variant.kernel, signature, constants, attributes)


def _places(variant: Variant) -> list[int]:
    """Return which parameters of the compiled kernel, counted from 0, point to the variant's weight."""

    def leaves(kind: Any) -> Iterator[str]:
        if isinstance(kind, tuple):
            for one in kind:
                yield from leaves(one)
        elif not kind.endswith(":1"):
            yield kind

    names = [name for name in variant.kernel.arg_names if name not in variant.constexprs]
    parameters = [name for name in names for _ in leaves(variant.signature[name])]
    return [parameters.index(name) for name in variant.weights]
