"""`ropewalk bench rope|matmul|decode|load`: ours against what else is installed here, in one run.

`ropewalk bench modes`: what our modes on a CPU cost in quality; `ropewalk bench packing`: what packing does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ropewalk.commands.options import add_threads, choose_device, load, positive, read_text, rope_of
from ropewalk.terminal import Output

if TYPE_CHECKING:
    import torch

    from ropewalk.bench.matmul import Setting
    from ropewalk.bench.model import Packing
    from ropewalk.bench.report import Report, Row

DTYPES = ("float32", "float16", "bfloat16")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "what",
        choices=("rope", "matmul", "decode", "load", "modes", "packing"),
        help="which kernels, or whole models: their speed, how long they load and in how much memory, or what exact "
        "and int8 on a CPU, or 2 to 8 bits, group sizes and act-order, cost in quality",
    )
    parser.add_argument(
        "float_model",
        nargs="?",
        metavar="FLOAT16-MODEL",
        help="packing: a folder with a model in float16 (default: bench/models/strand-4m-needle-1k in a checkout)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help="matmul: KxN (default: 4096x4096), cpu for four usual ones; rope: heads x heads of k x channels, as "
        "40x40x128; either: a model, llama-2-13b, codellama-34b, mpt-30b, mixtral; decode: llama-1b (the default), "
        "llama-2-7b, llama-2-13b, tiny or LAYERSxHIDDENxFFNxHEADSxKV; load: the same (default: 20x4096x11008x32x32)",
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
    parser.add_argument("--dtype", choices=DTYPES, help="of activations (default: float32 on a CPU, else float16)")
    parser.add_argument(
        "--mode",
        choices=("exact", "int8"),
        help="of our kernels for the CPU in the row `ropewalk`; the other one has a row of its own",
    )
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these besides ours (default: all found)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each kernel in each case (default: 0.3)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no further case after so long")
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help="load: of each loader (default: 5)")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N", help="decode: (default: 128)")
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="decode: after it (default: 64); modes, packing: of the text (default: all)",
    )
    parser.add_argument(
        "--models", metavar="DIR", help="decode, load, packing: where to keep models (default: the user's cache)"
    )
    parser.add_argument("--model", default="demo", metavar="MODEL", help="modes: (default: demo, the one that ships)")
    parser.add_argument(
        "--context",
        type=positive,
        nargs="+",
        default=[256, 1024],
        metavar="N",
        help="modes: (default: 256 1024); packing: the longest of them (default: 1024)",
    )
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
    parser.add_argument("--plot", metavar="FILE", help="draw to a PNG: time over M, tokens a second, time and memory")
    parser.add_argument("--out", metavar="FILE", help="write the JSON object to a file too")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print a table for each case."""
    import torch

    from ropewalk.bench.limits import measure_limits
    from ropewalk.bench.peers import OURS, choose
    from ropewalk.bench.report import Report, machine, machine_line
    from ropewalk.commands.bench_packing import bench_packing_command
    from ropewalk.errors import RopewalkError, UsageError

    begin = time.monotonic()
    if args.seconds <= 0:
        raise UsageError(f"--seconds: expected a positive number, found {args.seconds}")
    for option, file in (("--out", args.out), ("--plot", args.plot)):
        # Before the work, not after it.
        if file and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"{option}: expected a folder to write to, found none for {file}")
    device = choose_device(args.device)
    if args.mode and (args.what in ("rope", "modes", "load") or device.type != "cpu"):
        raise UsageError(f"--mode: expected it for matmul and decode on a CPU, found {args.what} on {device.type}")
    if args.float_model is not None and args.what != "packing":
        raise UsageError(f"FLOAT16-MODEL: expected it for packing, found {args.float_model} for {args.what}")
    if args.what == "packing":
        bench_packing_command(args, out)
        return
    if args.what == "modes":
        _modes(args, out)
        return
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))
    work = _work(args, device, dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peers, missing = choose(work.peers, args.peers, device)
    limits = measure_limits(device, min(args.seconds, 0.3))
    report = Report(device, limits, machine(device))
    out.say(machine_line(report.machine, limits))
    for name, why in missing.items():
        report.skip(name, why)
    if missing:
        out.say("not here: " + ", ".join(f"{name} ({why})" for name, why in missing.items()))
    try:
        work.run(
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


class _Work(NamedTuple):
    """A benchmark: who may take part, and how it is run, given a report and the options that all have."""

    peers: Sequence[Any]
    run: Callable[..., None]


def _work(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> _Work:
    """Check what --shape and the options of packing say, and return the benchmark.

    Raises:
        UsageError: they do not fit.
    """
    from ropewalk.bench import decode, matmul, model, rope
    from ropewalk.bench.peers import matmul_peers, rotary_peers
    from ropewalk.bench.peers.decode import decode_peers

    if args.what == "rope":
        heads = [rope.Heads(*shape) for shape in _shapes("rope", args.shape)]
        return _Work(rotary_peers(), lambda report, **options: rope.bench_rope(report, heads, args.m, **options))
    if args.what == "load":
        return _load_work(args)
    packings = _packings(args)
    if args.what == "matmul":
        settings = _settings(packings, _shapes("matmul", args.shape))
        peers = matmul_peers(device, args.mode)
        return _Work(peers, lambda report, **options: matmul.bench_matmul(report, settings, args.m, **options))
    names = list(dict.fromkeys(args.shape or ["llama-1b"]))
    for name, packing in itertools.product(names, packings):
        model.parse_shape(name, packing)
    lengths = decode.Lengths(args.prompt_tokens, args.tokens or 64)
    root = Path(args.models) if args.models else model.model_cache()

    def run(report: Report, **options: Any) -> None:
        decode.bench_decode(report, names, packings, lengths, root=root, **options)

    return _Work(decode_peers(dtype, device, args.mode), run)


def _load_work(args: argparse.Namespace) -> _Work:
    """Check what --shape and --pack say for `load`.

    Raises:
        UsageError: they do not fit, or the packing is given otherwise.
    """
    from ropewalk.bench import load, model
    from ropewalk.errors import UsageError

    if (args.bits, args.group_size, args.desc_act, args.sym) != ([4], [128], None, None):
        raise UsageError("--pack: expected it for load, found --bits, --group-size or the like")
    packings = [model.parse_packing(name) for name in dict.fromkeys(args.pack or [load.PACKING])]
    names = list(dict.fromkeys(args.shape or [load.SHAPE]))
    for name, packing in itertools.product(names, packings):
        model.parse_shape(name, packing)
    root = Path(args.models) if args.models else model.model_cache()

    def run(report: Report, **options: Any) -> None:
        load.bench_load(report, names, packings, root=root, runs=args.runs, threads=args.threads, **options)

    return _Work(load.load_peers(), run)


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


def _packings(args: argparse.Namespace) -> list[Packing]:
    """Return those of --pack, or every combination of the options.

    Raises:
        UsageError: a name in --pack that says nothing.
    """
    from ropewalk.bench.model import Packing, parse_packing

    if args.pack:
        return list(dict.fromkeys(map(parse_packing, args.pack)))
    orders, kinds = args.desc_act or [False], args.sym or [True]
    found = [
        Packing(bits, group_size, desc_act, sym)
        for bits, group_size, desc_act, sym in itertools.product(args.bits, args.group_size, orders, kinds)
        # One group has no order to it.
        if not (desc_act and len(orders) > 1 and group_size == -1)
    ]
    return list(dict.fromkeys(found))


def _settings(packings: Sequence[Packing], shapes: Sequence[tuple[int, ...]]) -> list[Setting]:
    """Return each shape in each packing; shapes innermost, so that what there is time for has all of them.

    Raises:
        UsageError: one that the format cannot hold.
    """
    from ropewalk.bench.matmul import Setting
    from ropewalk.errors import FormatError, UsageError
    from ropewalk.gptq.format import expected_tensors

    for packing, (k, n) in itertools.product(packings, shapes):
        try:
            expected_tensors(k, n, packing.bits, packing.group_size)
        except FormatError as error:
            option = f"--bits {packing.bits}, --group-size {packing.group_size}"
            raise UsageError(f"--shape {k}x{n}, {option}: {error}") from None
    return [Setting(k, n, *packing) for packing in packings for k, n in shapes]


def _modes(args: argparse.Namespace, out: Output) -> None:
    """Print what each mode of packed layers on the CPU costs.

    Raises:
        UsageError: options of the other benchmarks that would seem to be heeded.
        ContextLengthError: a text shorter than a context.
    """
    import torch

    from ropewalk.bench.modes import WINDOW, bench_modes, modes_table
    from ropewalk.bench.perplexity import windows
    from ropewalk.bench.report import machine
    from ropewalk.errors import ContextLengthError, UsageError
    from ropewalk.generation import context_length
    from ropewalk.shipped import held_out_text

    for option, found, expected in (("--device", args.device, "cpu"), ("--dtype", args.dtype, "float32")):
        if found not in (None, expected):
            raise UsageError(f"{option}: expected {expected} for modes, found {found}")
    if args.plot:
        raise UsageError("--plot: expected it for rope, matmul, decode and load, found modes")
    args.rope, args.device, args.dtype = "auto", "cpu", "float32"
    args.bits = args.group_size = None  # those of the model
    text = held_out_text() if args.text is None else read_text(args.text, "--text")
    contexts = sorted(set(args.context))
    model, tokenizer = load(args, out)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: args.tokens]
    if contexts[-1] > context_length(model):
        out.note(f"note: {contexts[-1]} tokens are more than the {context_length(model)} that the config names")
    if len(ids) < contexts[-1]:
        raise ContextLengthError(f"--text: expected at least {contexts[-1]} tokens, found {len(ids)}")
    # Every length reads the same tokens: as many as fill the longest windows.
    ids = ids[: len(ids) // contexts[-1] * contexts[-1]]
    with out.bar(3 * sum(len(windows(len(ids), n)) * n for n in contexts), "perplexity") as bar:
        rows = bench_modes(model, ids, contexts, bar.update)
    out.say(f"{len(ids):,} tokens in disjoint windows, logits of the first {min(WINDOW, len(ids))}")
    out.say(modes_table(rows))
    result = {"machine": machine(model.device), "model": args.model, "rope": rope_of(model), "tokens": len(ids)}
    result["results"] = rows
    out.result(result)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
        out.note(f"results: {args.out}")


def _say(what: str, out: Output, rows: Sequence[Row], skipped: Sequence[Row], ours: str) -> None:
    """Print one case."""
    from ropewalk.bench.load import load_lines, load_table
    from ropewalk.bench.report import case_name, decode_lines, decode_table, rows_table

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
        out.say(f"not timed: {note['kernel']}: {note['why']}")


def _write(args: argparse.Namespace, out: Output, report: Report) -> None:
    """Write and print what there is."""
    from ropewalk.bench.load import reading_limit
    from ropewalk.bench.peers import OURS
    from ropewalk.bench.plots import plot_decode, plot_load, plot_rows

    found = report.as_json()
    if args.what == "load":
        found["limit"] |= reading_limit(report.results)
    out.result(found)
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
        out.note(f"results: {args.out}")
    if args.plot and report.results:
        name = (
            report.machine.get("gpu", {}).get("name") or f"{report.machine['cpu']}, {report.machine['threads']} threads"
        )
        plot = {"decode": plot_decode, "load": plot_load}.get(args.what, plot_rows)
        plot(report.results, args.plot, title=f"{args.what}, {name}", ours=OURS)
        out.note(f"plot: {args.plot}")
