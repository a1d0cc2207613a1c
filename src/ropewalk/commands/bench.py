"""`ropewalk bench rope|matmul|moe|decode|load`: ours against what else is installed here, in one run.

`ropewalk bench modes`: what our modes on a CPU cost in quality; `ropewalk bench packing`: what packing does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.commands.options import add_threads, choose_device, positive
from ropewalk.terminal import Output

if TYPE_CHECKING:
    from ropewalk.bench.report import Report, Row

KERNELS = ("rope", "matmul", "moe")
DTYPES = ("float32", "float16", "bfloat16")
ENGINES = ("vllm",)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "what",
        choices=("rope", "matmul", "moe", "decode", "load", "modes", "packing"),
        help="which kernels (moe: the experts of a mixture), or whole models: their speed, how long they load and in "
        "how much memory, or what exact and int8 on a CPU, or 2 to 8 bits, group sizes and act-order, cost in quality",
    )
    parser.add_argument(
        "float_model",
        nargs="?",
        metavar="FLOAT16-MODEL",
        help="packing: a folder with a model in float16 (default: bench/models/strand-4m-needle-1k in a checkout)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    parser.add_argument(
        "--shapes",
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help="a model: llama-2-13b, codellama-34b, mpt-30b (not for rope), mixtral-8x7b (moe has only this one); or "
        "sizes: KxN for matmul (default: 4096x4096; cpu is four usual ones), heads x heads of k x channels for rope, "
        "as 40x40x128, experts x hidden x ffn:top for moe, as 8x4096x14336:2, and for decode and load "
        "LAYERSxHIDDENxFFNxHEADSxKV, codellama:the same, mpt:LAYERSxHIDDENxHEADS or "
        "mixtral:LAYERSxHIDDENxFFNxHEADSxKVxEXPERTS, besides llama-1b (decode's default), llama-2-7b, tiny, tiny-mpt, "
        "tiny-mixtral, … (load's default: 20x4096x11008x32x32)",
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
    parser.add_argument(
        "--pack",
        nargs="+",
        metavar="PACK",
        help="exactly these instead of every combination of the four above: 4b-g128, 3b-g32-act, 8b-none-asym, …; load "
        "takes only this (default: 4b-g32-act), and packing (default: 2, 3, 4 and 8 bits in groups of 32, of 128 and "
        "one, with act-order and without, and asymmetric ones)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="decode: inside vLLM, by our method, its own and with unpacked weights, each in a process of its own",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of activations (default: float32 on a CPU, with --engine bfloat16, else float16)",
    )
    parser.add_argument(
        "--mode",
        choices=("exact", "int8"),
        help="of our kernels for the CPU in the row `ropewalk`; the other one has a row of its own",
    )
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these besides ours (default: all found)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each kernel in each case (default: 0.3)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no further case after so long")
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help="load: of each loader (default: 5)")
    parser.add_argument(
        "--context",
        type=positive,
        nargs="+",
        metavar="N",
        help="decode: tokens in the cache before (default: 128): a prompt of up to 128, and before it random keys and "
        "values; with --engine a prompt of all of them; modes: (default: 256 1024); packing: the longest of them "
        "(default: 1024)",
    )
    parser.add_argument(
        "--batch", type=positive, nargs="+", metavar="N", help="decode: sequences (default: 1; with --engine 1 8)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="decode: of each (default: 64; with --engine 32); modes, packing: of the text (default: all)",
    )
    parser.add_argument(
        "--models", metavar="DIR", help="decode, load, packing: where to keep models (default: the user's cache)"
    )
    parser.add_argument("--model", default="demo", metavar="MODEL", help="modes: (default: demo, the one that ships)")
    parser.add_argument(
        "--text", metavar="FILE", help="modes, packing: what to read; - is stdin (default: demo's held-out text)"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="packing: calibrate GPTQ with it (default: a quarter of the text, by pieces)",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=("gptq", "rtn"), help="packing: GPTQ, or rounding to nearest (default: both)"
    )
    add_threads(parser)
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw to a PNG: time over M; decode: tokens a second and memory, over context or sequences where there "
        "are several; load: time and memory",
    )
    parser.add_argument("--plot-share", metavar="FILE", help="rope, matmul, moe: draw the share of the limit to a PNG")
    parser.add_argument("--out", metavar="FILE", help="write the JSON object to a file too")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print a table for each case."""
    import torch

    from ropewalk.bench.limits import measure_limits
    from ropewalk.bench.peers import OURS, choose
    from ropewalk.bench.report import Report, machine, machine_line
    from ropewalk.commands.bench_modes import bench_modes_command
    from ropewalk.commands.bench_packing import bench_packing_command
    from ropewalk.commands.bench_work import work
    from ropewalk.errors import RopewalkError, UsageError

    begin = time.monotonic()
    if args.seconds <= 0:
        raise UsageError(f"--seconds: expected a positive number, found {args.seconds}")
    for option, file in (("--out", args.out), ("--plot", args.plot), ("--plot-share", args.plot_share)):
        # Before the work, not after it.
        if file and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"{option}: expected a folder to write to, found none for {file}")
    if args.plot_share and args.what not in KERNELS:
        raise UsageError(f"--plot-share: expected it for {', '.join(KERNELS)}, found {args.what}")
    device = choose_device(args.device)
    if args.mode and (args.what in ("rope", "modes", "load") or device.type != "cpu"):
        raise UsageError(f"--mode: expected it for matmul, moe and decode on a CPU, found {args.what} on {device.type}")
    if args.engine and args.what != "decode":
        raise UsageError(f"--engine: expected it for decode, found {args.what}")
    if args.float_model is not None and args.what != "packing":
        raise UsageError(f"FLOAT16-MODEL: expected it for packing, found {args.float_model} for {args.what}")
    if args.what == "packing":
        bench_packing_command(args, out)
        return
    if args.what == "modes":
        bench_modes_command(args, out)
        return
    on_cpu = "bfloat16" if args.engine else "float32"  # vLLM's own method has no float32
    dtype = getattr(torch, args.dtype or (on_cpu if device.type == "cpu" else "float16"))
    benchmark = work(args, device, dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peers, missing = choose(benchmark.peers, args.peers, device)
    limits = measure_limits(device, min(args.seconds, 0.3))
    report = Report(device, limits, machine(device))
    out.say(machine_line(report.machine, limits))
    for name, why in missing.items():
        report.skip(name, why)
    if missing:
        out.say("not here: " + ", ".join(f"{name} ({why})" for name, why in missing.items()))
    try:
        benchmark.run(
            report,
            peers=peers,
            dtype=dtype,
            seconds=args.seconds,
            deadline=begin + args.stop_after if args.stop_after else None,
            on_case=lambda rows, skipped: _say(args.what, out, rows, skipped, OURS),
        )
    finally:
        # What was measured before an error or Ctrl-C is worth keeping.
        _write(args, out, report)
    fault = report.fault(OURS)
    if fault is not None:
        raise RopewalkError(fault)


def _say(what: str, out: Output, rows: Sequence[Row], skipped: Sequence[Row], ours: str) -> None:
    """Print one case."""
    from ropewalk.bench.decode_rows import decode_lines, decode_table
    from ropewalk.bench.load_rows import load_lines, load_table
    from ropewalk.bench.report import case_name, rows_table

    show = {"decode": (decode_table, decode_lines), "load": (load_table, load_lines)}
    as_table, as_lines = show.get(what, (rows_table, lambda rows, ours: []))
    if rows:
        out.say(f"\n{case_name(rows[0])}")
        out.say(as_table(rows, ours))
        for line in as_lines(rows, ours):
            out.say(line)
    for row in rows:
        if row["note"]:
            out.say(f"{row['kernel']}: {row['note']}")
    for note in skipped:
        # Where there is a table its title says of which model.
        model = f"{note['model']}, " if "model" in note and not rows else ""
        out.say(f"not timed: {model}{note['kernel']}: {note['why']}")


def _write(args: argparse.Namespace, out: Output, report: Report) -> None:
    """Write and print what there is."""
    from ropewalk.bench.load import reading_limit
    from ropewalk.bench.peers import OURS
    from ropewalk.bench.plots import plot_rows, plot_shares
    from ropewalk.bench.plots_models import plot_decode, plot_load
    from ropewalk.bench.report import machine_name

    found = report.as_json()
    if args.what == "load":
        found["limit"] |= reading_limit(report.results)
    out.result(found)
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
        out.note(f"results: {args.out}")
    plot = {"decode": plot_decode, "load": plot_load}.get(args.what, plot_rows)
    right = any(row["verdict"] != "wrong" for row in report.results)  # only these are drawn
    for draw, file in ((plot, args.plot), (plot_shares, args.plot_share)):
        if file and right:
            draw(report.results, file, title=f"{args.what}, {machine_name(report.machine)}", ours=OURS)
            out.note(f"plot: {file}")
