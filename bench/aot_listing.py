"""What a compiler wrote, read back: machine code (SASS, AMD assembly) and LLVM IR as instructions, loops and loads.

In the IR every address still leads back to the argument that it came from, so there the loads of the packed
weight can be told from all others; the machine code says what became of them.

Terms: a *loop* is what lies between a label and the last branch back to it; the *inner loop* is the shortest
one that loads the weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

WIDEST = 16  # bytes that one thread can ask for at once on every device


class Load(NamedTuple):
    """A load from global memory: bytes for one thread, number of its instruction, whether it is of the weight."""

    nbytes: int
    place: int
    weight: bool


class Listing(NamedTuple):
    """Instructions in order, and the loops among them as ranges of their numbers."""

    instructions: list[str]
    loops: list[range]


class Loads(NamedTuple):
    """The loads from global memory in a kernel's IR, and its loops."""

    loads: list[Load]
    loops: list[range]

    def within(self, loop: range) -> list[Load]:
        """Return those in a loop."""
        return [load for load in self.loads if load.place in loop]


def sass(text: str) -> Listing:
    """Read what `nvdisasm -c` prints."""
    return _listing(
        text,
        label=re.compile(r"\s*(\.L_x_\d+):"),
        instruction=re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(.*?)\s*;"),
        branch=re.compile(r"\bBRA\b.*?(\.L_x_\d+)"),
        skip="NOP",
    )


def amdgcn(text: str) -> Listing:
    """Read AMD assembly as LLVM writes it."""
    return _listing(
        text,
        label=re.compile(r"(\.LBB\d+_\d+):"),
        instruction=re.compile(r"\t([a-z]\w+(?:\s.*?)?)\s*(?:;.*)?$"),
        branch=re.compile(r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"),
        skip="s_nop",
    )


def ir_loads(text: str, weights: Sequence[int]) -> Loads:
    """Find the loads from global memory in LLVM IR.

    Args:
        text: the IR of one kernel.
        weights: which of its parameters, counted from 0, point to the packed weight.
    """
    lines = _listing(
        text,
        label=re.compile(r'"?([\w.$-]+)"?:(?:\s|$)'),
        instruction=re.compile(r"  (\S.*)$"),
        branch=re.compile(r"\blabel %\"?([\w.$-]+)"),
    )
    parameters = re.findall(r"(%[\w.]+)(?=\s*[,)])", next(s for s in text.splitlines() if s.startswith("define")))
    addresses = _derived(lines.instructions, {parameters[i] for i in weights})
    loads = []
    for place, line in enumerate(lines.instructions):
        nbytes = _ir_load_bytes(line)
        if nbytes:
            loads.append(Load(nbytes, place, not addresses.isdisjoint(re.findall(r"%[\w.]+", line))))
    return Loads(loads, lines.loops)


def nvidia_resources(text: str, machine: Listing) -> dict[str, int]:
    """Return registers and spills from `cuobjdump -res-usage`."""
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    # A stack frame that nothing loads or stores is not a spill.
    used = any(re.match(r"(@!?U?P\w+\s+)?(LDL|STL)\b", line) for line in machine.instructions)
    return {"registers": found["REG"], "spills": max(found["STACK"], found["LOCAL"]) if used else 0}


def amd_resources(text: str) -> dict[str, int]:
    """Return registers and spills from the metadata of AMD assembly."""
    found = {key: int(value) for key, value in re.findall(r"\s\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return {"registers": found["vgpr_count"], "spills": found["private_segment_fixed_size"]}


# The first that is found; what each generation calls it in machine code.
_MMA = {
    "tcgen05": r"UTC\w*MMA",
    "HGMMA": r"HGMMA",
    "HMMA": r"HMMA",
    "MFMA": r"v_mfma",
    "WMMA": r"v_wmma",
}


def tensor_core_instruction(machine: Listing) -> str | None:
    """Return the name of the tensor-core instruction in a kernel, or None."""
    text = "\n".join(machine.instructions)
    return next((name for name, pattern in _MMA.items() if re.search(rf"\b{pattern}", text)), None)


def widest_load(machine: Listing, loads: Loads, of_weights: bool) -> int:
    """Return how many bytes the widest load gives to a thread: of the weight, or of anything."""
    # What the IR asks for the assembler may split, so both have to agree.
    widest = max((_load_bytes(line) for line in machine.instructions), default=0)
    asked = max((load.nbytes for load in loads.loads if load.weight or not of_weights), default=0)
    return min(widest, asked)


def inner_loop(machine: Listing, loads: Loads) -> tuple[int, int] | None:
    """Return how many instructions the inner loop has and how many of its passes they make, or None without one."""
    candidates = [loop for loop in loads.loops if any(load.weight for load in loads.within(loop))]
    if not candidates:
        return None
    asked = sum(load.nbytes for load in loads.within(min(candidates, key=len)))
    found = []
    for loop in machine.loops:
        # The assembler may have unrolled the loop; what it loads shows how often. A branch back from code that
        # was moved out of the way looks like a loop too, but does not load what the loop loads.
        passes = sum(_load_bytes(machine.instructions[i]) for i in loop) / asked
        if passes:
            found.append((abs(passes - max(1, round(passes))), len(loop), max(1, round(passes))))
    return min(found)[1:] if found else None


def _listing(
    text: str,
    label: re.Pattern[str],
    instruction: re.Pattern[str],
    branch: re.Pattern[str],
    skip: str | None = None,
) -> Listing:
    """Read instructions and labels line by line, and take every branch to an earlier label for a loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    for line in text.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif found := instruction.match(line):
            if skip is None or not found[1].startswith(skip):
                instructions.append(found[1])
            for target in branch.findall(found[1]):
                if target in labels:
                    loops[labels[target]] = len(instructions)
    return Listing(instructions, [range(begin, end) for begin, end in loops.items()])


def _load_bytes(instruction: str) -> int:
    """Return how many bytes a machine instruction loads from global memory for one thread; 0 if it does not."""
    text = re.sub(r"^@!?U?P\w+\s+", "", instruction)
    if found := re.match(r"(LDGSTS|LDG|UBLKCP|UTMALDG)\b([\w.]*)", text):
        if found[1].startswith("U"):
            return WIDEST  # a bulk copy by the memory engine
        bits = re.search(r"\.(256|128|64)\b", found[2])
        narrow = re.search(r"\.[US](8|16)\b", found[2])
        return int(bits[1]) // 8 if bits else int(narrow[1]) // 8 if narrow else 4
    if found := re.match(r"(?:global|buffer)_load_(?:lds_)?(\w+)", text):
        kind = found[1]
        if words := re.search(r"dwordx(\d)", kind):
            return 4 * int(words[1])
        if bits := re.search(r"[biu](8|16|32|64|96|128)$", kind):
            return int(bits[1]) // 8
        return 4 if "dword" in kind else 2 if "short" in kind else 1
    return 0


_IR_LOADS = (
    r"\bload (?:volatile )?(\w+|<[^>]+>), ptr addrspace\(1\)",
    r"\bcall (\w+|<[^>]+>) @llvm\.amdgcn\.raw\.ptr\.buffer\.load",
)
_IR_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


def _ir_load_bytes(line: str) -> int:
    """Return how many bytes a line of LLVM IR loads from global memory for one thread; 0 if it does not."""
    if found := re.search(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+|\d+)", line):
        return int(found[1], 0)
    if found := re.search(r"(?<![a-z])ld\.[\w.]*?global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)", line):
        return int(found[1] or 1) * int(found[2]) // 8
    if "cp.async.bulk" in line and "shared" in line and "global" in line:
        return WIDEST
    if found := re.search(r"buffer\.load\.(?:async\.)?lds\(.*?ptr addrspace\(3\) [^,]+, i32 (\d+)", line):
        return int(found[1])
    for pattern in _IR_LOADS:
        if found := re.search(pattern, line):
            count, kind = re.fullmatch(r"(?:<(\d+) x )?(\w+)>?", found[1]).groups()  # type: ignore[union-attr]
            return int(count or 1) * (_IR_BITS.get(kind) or int(kind[1:])) // 8  # i8, i16, ...
    return 0


# What makes an address from an address. A load is not among them: what it gives is no longer the weight's.
_DERIVES = re.compile(
    r"(%[\w.]+) = (?:tail )?(?:getelementptr|phi|select|bitcast|addrspacecast|freeze|ptrtoint|inttoptr|add"
    r"|call .*@llvm\.amdgcn\.make\.buffer)"
)


def _derived(lines: Sequence[str], roots: set[str]) -> set[str]:
    """Return the names of all values that are computed from addresses among `roots`, and these."""
    found, before = set(roots), 0
    steps = [(made[1], re.findall(r"%[\w.]+", line[made.end() :])) for line in lines if (made := _DERIVES.match(line))]
    while len(found) != before:  # loops carry addresses backwards
        before = len(found)
        found.update(name for name, sources in steps if not found.isdisjoint(sources))
    return found
