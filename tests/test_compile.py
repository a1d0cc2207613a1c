"""Kernels compiled ahead of time: reading what the compilers wrote, and the rules of `ropewalk compile --check`."""

import json
import os
import subprocess
import sys
from itertools import combinations, product

import pytest

from ropewalk.bench.aot import ARCHITECTURES, check
from ropewalk.bench.aot_listing import (
    Listing,
    amd_resources,
    amdgcn,
    inner_loop,
    ir_loads,
    nvidia_resources,
    sass,
    tensor_core_instruction,
    widest_load,
)
from ropewalk.bench.aot_variants import _choices, plan_files

# Lines that nvdisasm 13 prints for sm_90 (a loop that the assembler wrote out twice, and a branch back to the
# prologue from code that was moved behind the loop).
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R35], desc[UR18][R4.64], P2 ;
        /*0040*/                   LDGSTS.E.64 [R34+0x3200], desc[UR18][R8.64], P2 ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   HGMMA.64x16x16.F32 R24, R16, gdesc[UR8], R24 ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R35+0x800], desc[UR18][R2.64], P2 ;
        /*0080*/              @!P1 LDG.E.64 R6, desc[UR4][R6.64] ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_0) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;
"""
SPILLED = """
        /*0000*/                   STL.64 [R1+0x8], R4 ;
        /*0010*/              @!P0 LDL R3, [R1+0x10] ;
"""
USAGE = " Function k:\n  REG:72 STACK:40 SHARED:0 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0\n"

# What LLVM wrote for the loop above: %1 is the weight, the rest is something else.
IR = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) readonly captures(none) %1, i32 %2) #0 !dbg !4 {
  %4 = getelementptr i8, ptr addrspace(1) %1, i64 16
  %5 = tail call i16 asm sideeffect "mov.u16 $0, 0x0;\\0A\\09@$2 ld.global.b16 { $0 }, [ $1 + 0 ];", "=c,l,b"(ptr addrspace(1) %0, i1 true) #5
  br label %6
6:                                                ; preds = %6, %3
  %7 = phi ptr addrspace(1) [ %4, %3 ], [ %10, %6 ]
  tail call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, $2;", "r,l,r"(ptr addrspace(3) @s, ptr addrspace(1) %7, i32 16)
  %8 = tail call { i32, i32 } asm sideeffect "mov.u32 $0, 0x0;\\0A\\09ld.global.v2.b32 { $0, $1 }, [ $2 + 0 ];", "=r,=r,l"(ptr addrspace(1) %0) #5
  %9 = load float, ptr addrspace(3) @s, align 16
  %10 = getelementptr i8, ptr addrspace(1) %7, i64 64
  br i1 %11, label %12, label %6, !dbg !5
12:                                               ; preds = %6
  ret void
}
"""  # noqa: E501
AMD_IR = """
define amdgpu_kernel void @k(ptr addrspace(1) inreg %0, ptr addrspace(1) %1, i32 %2) {
  br label %.loop
.loop:
  %3 = phi ptr addrspace(1) [ %1, %2 ], [ %6, %.loop ]
  %4 = load <4 x i32>, ptr addrspace(1) %3, align 16, !dbg !33
  %5 = load <2 x half>, ptr addrspace(1) %0, align 4, !dbg !18
  %6 = getelementptr i8, ptr addrspace(1) %3, i64 64
  br i1 %7, label %.loop, label %.end
.end:
  ret void
}
"""
AMD = """k:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; %.loop
\tglobal_load_dwordx4 v[2:5], v[2:3], off
\tglobal_load_dword v6, v[8:9], off offset:64 ; 4-byte Folded
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_16x16x16_f16 v[8:11], v[2:3], v[4:5], v[8:11]
\ts_nop 1
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
    .private_segment_fixed_size: 12
    .vgpr_count:     59
    .vgpr_spill_count: 3
"""


def test_instructions_and_loops():
    machine = sass(SASS)
    assert len(machine.instructions) == 14  # NOP is none
    assert machine.instructions[4] == "LDGSTS.E.64 [R34+0x3200], desc[UR18][R8.64], P2"
    assert [list(loop) for loop in machine.loops] == [list(range(3, 10)), list(range(1, 13)), [13]]


def test_loads_are_told_apart_by_where_their_address_comes_from():
    loads = ir_loads(IR, [1])
    assert [(load.nbytes, load.weight) for load in loads.loads] == [(2, False), (16, True), (8, False)]
    assert len(loads.loops) == 1
    assert [load.nbytes for load in loads.within(loads.loops[0])] == [16, 8]
    assert [load.weight for load in ir_loads(IR, [0]).loads] == [True, False, True]


def test_the_inner_loop_counts_what_the_assembler_unrolled():
    loads = ir_loads(IR, [1])
    # 24 bytes in the IR; 48 in seven instructions of machine code, which are two passes, therefore.
    once = "\n".join(line for line in SASS.splitlines() if "0x800" not in line and "/*0080*/" not in line)
    assert inner_loop(sass(SASS), loads) == (7, 2)
    assert inner_loop(sass(once), loads) == (5, 1)
    assert inner_loop(sass("\n".join(SASS.splitlines()[:5])), loads) is None
    assert inner_loop(sass(SASS), ir_loads(IR, [])) is None


def test_widest_load_is_that_of_the_weight():
    machine = sass(SASS)
    assert widest_load(machine, ir_loads(IR, [1]), of_weights=True) == 16
    assert widest_load(machine, ir_loads(IR, [0]), of_weights=True) == 8
    assert widest_load(machine, ir_loads(IR, [0]), of_weights=False) == 16
    assert widest_load(Listing([], []), ir_loads(IR, [1]), of_weights=True) == 0  # split by the assembler


@pytest.mark.parametrize(
    ("line", "nbytes"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", 16),
        ("@!P1 LDG.E.64 R6, [R6.64]", 8),
        ("@UP0 LDG.E R6, [R6.64]", 4),
        ("LDG.E.S8 R6, [R6.64]", 1),
        ("LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", 32),
        ("UTMALDG.2D [UR8], [UR4]", 16),
        ("LDGDEPBAR", 0),
        ("LDS.128 R4, [R2]", 0),
        ("STG.E.128 [R2.64], R8", 0),
        ("global_load_b128 v[2:5], v[2:3], off", 16),
        ("buffer_load_dwordx2 v[2:3], v1, s[0:3], 0 offen", 8),
        ("global_load_lds_dwordx4 v[2:3], off", 16),
        ("global_load_ushort v2, v[2:3], off", 2),
        ("global_load_d16_hi_b16 v2, v[2:3], off", 2),
        ("global_load_ubyte v2, v[2:3], off", 1),
        ("ds_load_b128 v[2:5], v2", 0),
    ],
)
def test_bytes_of_a_machine_instruction(line, nbytes):
    everything = ir_loads(IR.replace("0x10", "0x100"), [1])  # asks for more than any instruction gives
    assert widest_load(Listing([line], []), everything, of_weights=True) == nbytes


def test_resources():
    assert nvidia_resources(USAGE, sass(SPILLED)) == {"registers": 72, "spills": 40}
    assert nvidia_resources(USAGE, sass(SASS)) == {"registers": 72, "spills": 0}  # a frame that nothing touches
    assert amd_resources(AMD) == {"registers": 59, "spills": 12}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("HMMA.16816.F32 R28, R28, R14, RZ", "HMMA"),
        ("@P0 HGMMA.64x16x16.F32 R24, R16, gdesc[UR8], R24", "HGMMA"),
        ("UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR6], UP0", "tcgen05"),
        ("v_mfma_f32_16x16x16_f16 v[8:11], v[2:3], v[4:5], v[8:11]", "MFMA"),
        ("v_wmma_f32_16x16x16_f16 v[8:15], v[0:7], v[0:7], v[8:15]", "WMMA"),
        ("HFMA2 R14, R13, 16384, 16384, -R4.H0_H0", None),
        ("FFMA R1, R2, R3, R4", None),
    ],
)
def test_tensor_core_instructions(line, name):
    assert tensor_core_instruction(Listing(["MOV R1, R2", line], [])) == name


def test_amd():
    machine, loads = amdgcn(AMD), ir_loads(AMD_IR, [1])
    assert tensor_core_instruction(machine) == "MFMA"
    assert [(load.nbytes, load.weight) for load in loads.loads] == [(16, True), (4, False)]
    assert inner_loop(machine, loads) == (5, 1)
    assert widest_load(machine, loads, of_weights=True) == 16


def row(**changes):
    plain = {"kernel": "k", "arch": "sm_80", "role": "decode", "spills": 0, "shared_bytes": 0, "mma": "HMMA"}
    return {**plain, "tensor_memory_columns": 0, "widest_load_bytes": 16, "error": None, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": "ptxas died"}, "expected it to compile, found: ptxas died"),
        ({"spills": 8}, "expected no spills, found 8 bytes of local memory"),
        ({"shared_bytes": 166913}, "expected at most 166912 bytes of shared memory, found 166913"),
        ({"tensor_memory_columns": 544}, "expected at most 512 columns of tensor memory, found 544"),
        ({"mma": None}, "expected a tensor-core instruction, found none"),
        ({"widest_load_bytes": 4}, "expected weight loads of 16 bytes, found 4"),
        ({"role": "decode-fma", "widest_load_bytes": 8}, "expected weight loads of 16 bytes, found 8"),
    ],
)
def test_each_rule_names_the_kernel_and_what_was_found(changes, message):
    assert check([row(), row(**changes)]) == [f"k on sm_80: {message}"]


def test_what_the_rules_let_pass():
    fine = [
        row(role="decode-fma", mma=None),
        row(role="matmul", widest_load_bytes=8),
        row(role="rope", mma=None, widest_load_bytes=4),
        row(role="peer", spills=8),
    ]
    assert check(fine) == []


def test_every_pair_of_choices_occurs():
    full, some = _choices(every=True), _choices(every=False)
    assert len(full) == len(set(full)) == 96
    assert len(some) == 12
    for i, j in combinations(range(5), 2):
        assert {(c[i], c[j]) for c in some} == {(c[i], c[j]) for c in full}


def test_every_architecture_has_plans():
    served = plan_files()
    assert set(ARCHITECTURES) == {arch for architectures in served.values() for arch in architectures}
    assert all(served.values()), "a file of plans for a device of no known architecture"
    assert "sm_75" not in served["default"]


# Compiled in a process of its own, for this one may interpret Triton.
KERNELS = """
import json
import triton
import triton.language as tl
from ropewalk.bench.aot import Variant, check, compile_variant

@triton.jit
def multiply(x, w, scales, out, N, K, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(0, K // 8, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        if WIDE:
            words = tl.load(w + rows[:, None] * N + n[None, :])
        else:  # the words of a column lie together, so those of a thread do not
            words = tl.load(w + rows[:, None] + n[None, :] * (K // 8 + 1))
        for i in tl.static_range(8):
            a = tl.load(x + rows * 8 + i).to(tl.float32)
            total += tl.sum(a[:, None] * ((words >> (4 * i)) & 15).to(tl.float32), 0)
    tl.store(out + n, total * tl.load(scales + n))

@triton.jit
def hold(x, out, steps, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    b = tl.load(x + N + at)
    for i in range(steps):
        a, b = b * a + i, a
    tl.store(out + at, a + b)

@triton.jit
def dot(x, w, out, strides, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        words = tl.load(w + (k // 8 + i // 8)[:, None] * strides[0] + i[None, :] * strides[1])
        b = ((words >> (i % 8 * 4)[:, None]) & 15).to(tl.float16)
        total = tl.dot(tl.load(x + i[:, None] * K + k + i[None, :]), b, total)
    tl.store(out + i[:, None] * BLOCK + i[None, :], total)

@triton.jit
def invent(x, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    a = tl.inline_asm_elementwise("invent.b32 $0, $1;", "=r,r", [a], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x + at, a)

def multiplied(name, role, wide):
    types = {"x": "*fp16:16", "w": "*i32:16", "scales": "*fp16:16", "out": "*fp32:16", "N": "i32:16", "K": "i32:16"}
    constants = {"WIDE": wide, "BLOCK_N": 64, "BLOCK_K": 16}
    return Variant(name, multiply, types, constants, role, weights=("w",), packed_bytes=64 * 16 * 4)

held = Variant("held", hold, {"x": "*fp32:16", "out": "*fp32:16", "steps": "i32"}, {"N": 8192}, "rope", num_warps=1)
dots = {"x": "*fp16:16", "w": "*i32:16", "out": "*fp32:16", "strides": ("i32:16", "i32:1"), "K": "i32:16"}
dotted = Variant("dotted", dot, dots, {"BLOCK": 32}, "matmul", weights=("w",), packed_bytes=32 * 32 // 2)
broken = Variant("broken", dot, dots | {"x": "*i32:16"}, {"BLOCK": 32}, "matmul")
variants = [
    multiplied("wide", "decode-fma", True),
    multiplied("narrow", "decode-fma", False),
    multiplied("without-dot", "matmul", True),
    held,
    dotted,
    broken,
    Variant("refused", invent, {"x": "*i32:16"}, {"N": 128}, "rope"),  # by ptxas
]
rows = [compile_variant(variant, "sm_80") for variant in variants]
rows += [compile_variant(dotted, arch) for arch in ("sm_90", "sm_100", "gfx942", "gfx1100")]
print(json.dumps({"rows": rows, "wrong": check(rows)}))
"""


def environment():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_check_catches_kernels_that_are_wrong_on_purpose(tmp_path):
    script = tmp_path / "kernels.py"
    script.write_text(KERNELS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(r["kernel"], r["arch"]): r for r in found["rows"]}
    narrow, without, spilling, failing, refused = found["wrong"]
    assert narrow == "narrow on sm_80: expected weight loads of 16 bytes, found 4"
    assert without == "without-dot on sm_80: expected a tensor-core instruction, found none"
    assert spilling.startswith("held on sm_80: expected no spills, found ")
    assert failing.startswith("broken on sm_80: expected it to compile, found: ")
    assert refused.startswith("refused on sm_80: expected it to compile, found: ")
    assert "Not a name of any known instruction: 'invent'" in refused
    assert rows["broken", "sm_80"]["registers"] is None
    wide = rows["wide", "sm_80"]
    assert wide["widest_load_bytes"] == 16
    assert wide["spills"] == 0
    assert 0 < wide["registers"] < 256
    # A byte holds two codes: at least two multiplications, and no more than a hundred instructions.
    assert 2 < wide["instructions_per_byte"] < 100
    mma = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "MFMA", "gfx1100": "WMMA"}
    for arch, name in mma.items():
        assert rows["dotted", arch]["mma"] == name
        assert rows["dotted", arch]["shared_bytes"] > 0


def ropewalk(*arguments, **changed):
    command = [sys.executable, "-m", "ropewalk", "compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**environment(), **changed})


def test_our_kernels_follow_the_rules():
    done = ropewalk("--check", "--arch", "sm_80", "sm_90", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    keys = {"kernel", "arch", "registers", "shared_bytes", "spills", "mma", "widest_load_bytes"}
    assert found["triton"]
    assert found["violations"] == []
    assert {r["arch"] for r in found["kernels"]} == {"sm_80", "sm_90"}
    for one in found["kernels"]:
        assert keys | {"instructions_per_byte"} <= set(one)
        assert one["instructions_per_byte"] is not None or one["role"] not in ("decode", "decode-fma", "matmul")
    kinds = {(r["role"], r["arch"]) for r in found["kernels"]}
    assert kinds >= set(product(("decode", "matmul", "dequantize", "reduce", "rope", "norm"), ("sm_80", "sm_90")))


def test_the_table():
    done = ropewalk("--arch", "sm_90", "--kernel", "reduce", "--jobs", "1")
    assert (done.returncode, done.stderr) == (0, "")
    version, header, *lines = done.stdout.splitlines()
    assert version.startswith("triton 3.")
    assert header.split()[:3] == ["kernel", "arch", "registers"]
    assert all(line.split()[1] == "sm_90" and line.split()[4] == "0" for line in lines)


@pytest.mark.parametrize(
    ("arguments", "changed", "status", "message"),
    [
        (
            ["--arch", "sm_91"],
            {},
            2,
            "--arch: expected one of sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942",
        ),
        (
            ["--arch", "sm_80", "--kernel", "x-y"],
            {},
            2,
            "--kernel: expected part of a kernel's name on sm_80, found 'x-y'",
        ),
        (["--kernel", "reduce"], {"TRITON_INTERPRET": "1"}, 1, "TRITON_INTERPRET: expected it unset"),
    ],
)
def test_failures_are_one_line(arguments, changed, status, message):
    done = ropewalk(*arguments, **changed)
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"ropewalk compile: {message}")


@pytest.mark.parametrize(("package", "arguments"), [("triton", []), ("gemlite", ["--gemlite", "--arch", "sm_80"])])
def test_what_is_not_installed_is_one_line(package, arguments):
    code = f"import sys; sys.modules[{package!r}] = None; from ropewalk.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "compile", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"ropewalk compile: {package}: expected it installed")
