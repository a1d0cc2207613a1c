"""`ropewalk bench rope|matmul`: our kernels against those of others that are installed here, in one run."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.commands.options import add_threads, choose_device, positive
from ropewalk.terminal import Output

if TYPE_CHECKING:
    from ropewalk.bench.report import Report, Row

DTYPES = ("float32", "float16", "bfloat16")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("what", choices=("rope", "matmul"), help="which kernels")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help="matmul: KxN (default: 4096x4096); rope: heads x heads of k x channels, as 40x40x128; "
        "or a model: llama-2-13b, codellama-34b, mpt-30b, mixtral",
    )
    parser.add_argument("--m", type=positive, nargs="+", default=[1, 4, 32, 512], metavar="M", help="rows, or tokens")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), nargs="+", default=[4], help="(default: 4)")
    parser.add_argument("--group-size", type=int, nargs="+", default=[128], metavar="G", help="(default: 128)")
    # Both of a pair may be given, for both kinds in one run.
    for dest, yes, no, what in (
        ("desc_act", "--desc-act", "--no-desc-act", "act-order"),
        ("sym", "--sym", "--asym", "symmetric"),
    ):
        parser.add_argument(yes, dest=dest, action="append_const", const=True, help=f"{what}, or with {no} both kinds")
        parser.add_argument(no, dest=dest, action="append_const", const=False, help=f"not {what}")
    parser.add_argument("--dtype", choices=DTYPES, help="of activations (default: float32 on a CPU, else float16)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these besides ours (default: all found)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each kernel in each case (default: 0.3)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no further case after so long")
    add_threads(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw time over M to a PNG")
    parser.add_argument("--out", metavar="FILE", help="write the JSON object to a file too")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print a table for each case."""
    import torch

    from ropewalk.bench.limits import measure_limits
    from ropewalk.bench.peers import OURS, choose, matmul_peers, rotary_peers
    from ropewalk.bench.report import Report, machine, machine_line
    from ropewalk.errors import RopewalkError, UsageError

    begin = time.monotonic()
    if args.seconds <= 0:
        raise UsageError(f"--seconds: expected a positive number, found {args.seconds}")
    for option, file in (("--out", args.out), ("--plot", args.plot)):
        # Before the work, not after it.
        if file and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"{option}: expected a folder to write to, found none for {file}")
    device = choose_device(args.device)
    shapes = _shapes(args.what, args.shape)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "dtype": dtype,
        "seconds": args.seconds,
        "deadline": begin + args.stop_after if args.stop_after else None,
    }
    rotary, missing = choose(rotary_peers(), args.peers if args.what == "rope" else [], device)
    multiplying, absent = choose(matmul_peers(), args.peers if args.what == "matmul" else [], device)
    settings = _settings(args, shapes) if args.what == "matmul" else []
    limits = measure_limits(device, min(args.seconds, 0.3))
    report = Report(device, limits, machine(device))
    out.say(machine_line(report.machine, limits))
    missing = missing if args.what == "rope" else absent
    for name, why in missing.items():
        report.skip(name, why)
    if missing:
        out.say("not here: " + ", ".join(f"{name} ({why})" for name, why in missing.items()))

    def on_case(rows: Sequence[Row], skipped: Sequence[Row]) -> None:
        _say(out, rows, skipped, OURS)

    try:
        if args.what == "matmul":
            from ropewalk.bench.matmul import bench_matmul

            bench_matmul(report, settings, args.m, peers=multiplying, on_case=on_case, **options)
        else:
            from ropewalk.bench.rope import Heads, bench_rope

            bench_rope(report, [Heads(*shape) for shape in shapes], args.m, peers=rotary, on_case=on_case, **options)
    finally:
        # What was measured before an error or Ctrl-C is worth keeping.
        _write(args, out, report)
    fault = report.fault(OURS)
    if fault is not None:
        raise RopewalkError(fault)


def _shapes(what: str, names: Sequence[str] | None) -> list[tuple[int, ...]]:
    """Return the sizes that --shape names, models replaced by their layers.

    Raises:
        UsageError: neither sizes nor a model that has any.
    """
    from ropewalk.bench import matmul, rope
    from ropewalk.errors import UsageError

    presets, default, form = (
        (matmul.PRESETS, "4096x4096", "KxN") if what == "matmul" else (rope.PRESETS, "llama-2-13b", "40x40x128")
    )
    found = []
    for name in names or [default]:
        for text in presets.get(name, [name]):
            parts = text.split("x")
            if len(parts) != len(form.split("x")) or not all(part.isdecimal() and int(part) for part in parts):
                raise UsageError(f"--shape: expected {form} or one of {', '.join(presets)}, found {name!r}")
            shape = tuple(map(int, parts))
            if what == "rope" and (shape[2] % 2 or shape[0] % shape[1]):
                raise UsageError(f"--shape: expected heads of an even size, and heads of k that divide, found {name!r}")
            found.append(shape)
    return list(dict.fromkeys(found))


def _settings(args: argparse.Namespace, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Return every combination of the options.

    Raises:
        UsageError: one that the format cannot hold.
    """
    from ropewalk.bench.matmul import Setting
    from ropewalk.errors import FormatError, UsageError
    from ropewalk.gptq.format import expected_tensors

    orders, kinds = args.desc_act or [False], args.sym or [True]
    found = []
    for bits, group_size, (k, n) in itertools.product(args.bits, args.group_size, shapes):
        try:
            expected_tensors(k, n, bits, group_size)
        except FormatError as error:
            raise UsageError(f"--shape {k}x{n}, --bits {bits}, --group-size {group_size}: {error}") from None
    # Shapes innermost, so that what there is time for has all of them.
    for bits, group_size, desc_act, sym in itertools.product(args.bits, args.group_size, orders, kinds):
        # One group has no order to it.
        if not (desc_act and len(orders) > 1 and group_size == -1):
            found += [Setting(k, n, bits, group_size, desc_act, sym) for k, n in shapes]
    return list(dict.fromkeys(found))


def _say(out: Output, rows: Sequence[Row], skipped: Sequence[Row], ours: str) -> None:
    """Print one case."""
    from ropewalk.bench.report import case_name, rows_table

    if rows:
        out.say(f"\n{case_name(rows[0])}, M={rows[0]['M']}")
        out.say(rows_table(rows, ours))
    for row in rows:
        if row["note"]:
            out.say(f"{row['kernel']}: {row['note']}")
    for note in skipped:
        out.say(f"not timed: {note['kernel']}: {note['why']}")


def _write(args: argparse.Namespace, out: Output, report: Report) -> None:
    """Write and print what there is."""
    from ropewalk.bench.peers import OURS
    from ropewalk.bench.report import plot_rows

    found = report.as_json()
    out.result(found)
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
        out.note(f"results: {args.out}")
    if args.plot and report.results:
        name = report.machine.get("gpu", {}).get("name") or report.machine["cpu"]
        plot_rows(report.results, args.plot, title=f"{args.what}, {name}", ours=OURS)
        out.note(f"plot: {args.plot}")
