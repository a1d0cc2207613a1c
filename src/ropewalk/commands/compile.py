"""`ropewalk compile`: every kernel ahead of time for named architectures, without a GPU."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from ropewalk.commands.options import positive
from ropewalk.errors import RopewalkError, UsageError
from ropewalk.terminal import Output, table

if TYPE_CHECKING:
    from ropewalk.bench.aot import Variant

HEADER = ("kernel", "arch", "registers", "shared", "spills", "tensor cores", "widest load", "instr/byte")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--arch", nargs="+", metavar="NAME", help="for which architectures (default: all we support)")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels with this in their name")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every combination of width, group size, zero points, dtype and act-order, not only every pair",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail on spills, a matmul without tensor cores, a decode kernel that loads weights by less than 16 bytes",
    )
    parser.add_argument("--gemlite", action="store_true", help="add the rows of GemLite's kernel")
    parser.add_argument("--jobs", type=positive, metavar="N", help="processes (default: one for each core)")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print what each kernel became."""
    from ropewalk.bench.aot import ARCHITECTURES, check, triton_version

    names = args.arch or list(ARCHITECTURES)
    for name in names:
        if name not in ARCHITECTURES:
            raise UsageError(f"--arch: expected one of {', '.join(ARCHITECTURES)}, found {name!r}")
    version = triton_version()
    chosen = [
        (i, arch)
        for i, variant in enumerate(_variants(args.all, args.gemlite))
        for arch in dict.fromkeys(names)
        if args.kernel in variant.name and arch in variant.architectures
    ]
    if not chosen:
        raise UsageError(f"--kernel: expected part of a kernel's name on {', '.join(names)}, found {args.kernel!r}")
    rows = []
    with out.bar(len(chosen), "compile", unit="kernel") as bar:
        for row in _compile(chosen, args):
            rows.append(row)
            bar.update(1)
    wrong = check(rows) if args.check else []
    out.say(f"triton {version}")
    out.say(table([HEADER, *map(_cells, rows)]))
    out.result({"triton": version, "kernels": rows, "violations": wrong})
    for line in wrong:
        out.note(line)
    if wrong:
        raise RopewalkError(f"--check: expected no violations, found {len(wrong)} in {len(rows)} kernels")


def _compile(chosen: Sequence[tuple[int, str]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each (number of a variant, architecture), in order."""
    jobs = min(args.jobs or os.cpu_count() or 1, len(chosen))
    works = [(i, arch, args.all, args.gemlite) for i, arch in chosen]
    if jobs == 1:
        yield from map(_row, works)
        return
    # Not forked: torch and LLVM have threads. A kernel does not travel between processes, its number does.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_row, works)


def _variants(every: bool, gemlite: bool) -> list[Variant]:
    from ropewalk.bench.aot_variants import variants

    if not gemlite:
        return variants(every)
    from ropewalk.bench.aot_gemlite import gemlite_variants

    return variants(every) + gemlite_variants()


def _row(work: tuple[int, str, bool, bool]) -> dict[str, Any]:
    from ropewalk.bench.aot import compile_variant

    i, arch, every, gemlite = work
    return compile_variant(_variants(every, gemlite)[i], arch)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["error"]:
        return (row["kernel"], row["arch"], "does not compile", *[""] * (len(HEADER) - 3))
    keys = ("registers", "shared_bytes", "spills", "mma", "widest_load_bytes", "instructions_per_byte")
    return (row["kernel"], row["arch"], *("-" if row[key] is None else str(row[key]) for key in keys))
