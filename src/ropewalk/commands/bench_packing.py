"""`ropewalk bench packing [FLOAT16-MODEL]`: what packing costs in quality."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.commands.options import read_text
from ropewalk.terminal import Output

if TYPE_CHECKING:
    from ropewalk.bench.packing import Row, Texts

DEFAULT_MODEL = Path("bench/models/strand-4m-needle-1k")


def bench_packing_command(args: argparse.Namespace, out: Output) -> None:
    """Print a line for each packing.

    Raises:
        UsageError: options of the other benchmarks that would seem to be heeded; what `bench_packing` raises.
        MissingFileError: no model.
    """
    import torch

    from ropewalk.bench.model import model_cache
    from ropewalk.bench.packing import METHODS, PACKINGS, bench_packing, packing_table, row_name, variants
    from ropewalk.bench.report import machine
    from ropewalk.bench.shapes import parse_packing
    from ropewalk.errors import UsageError

    if (args.bits, args.group_size, args.desc_act, args.sym) != ([4], [128], None, None):
        raise UsageError("--pack: expected it for packing, found --bits, --group-size or the like")
    for option, found, expected in (("--device", args.device, "cpu"), ("--dtype", args.dtype, "float32")):
        if found not in (None, expected):
            raise UsageError(f"{option}: expected {expected} for packing, found {found}")
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = _folder(args.float_model)
    packings = list(map(parse_packing, args.pack)) if args.pack else PACKINGS
    wanted = variants(packings, args.methods or METHODS)
    context = max(args.context or [1024])
    rows: list[Row] = []
    root = Path(args.models) if args.models else model_cache()
    try:
        with out.bar(len(wanted) + 1, "packings", unit="packing") as bar:
            options = {"root": root, "tokens": args.tokens, "progress": bar.set_postfix_str}
            for row in bench_packing(folder, _texts(args), wanted, context, **options):
                rows.append(row)
                bar.update()
                out.note(f"{row_name(row)}: KL {row['kl']:.3g}")
    finally:
        # What was measured before an error or Ctrl-C is worth keeping.
        if rows:
            out.say(f"{folder.name}: {rows[0]['positions']:,} positions of held-out text, contexts of {context} tokens")
            out.say(packing_table(rows))
            result = {"machine": machine(torch.device("cpu")), "model": folder.name, "context": context}
            _write(args, out, {**result, "results": rows})


def _write(args: argparse.Namespace, out: Output, result: dict[str, Any]) -> None:
    """Print and write what there is, and draw it."""
    from ropewalk.bench.plots_packing import plot_packing

    out.result(result)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
        out.note(f"results: {args.out}")
    if args.plot:
        plot_packing(result["results"], args.plot, title=f"What packing costs {result['model']}")
        out.note(f"plot: {args.plot}")


def _folder(named: str | None) -> Path:
    """Return the folder of the model.

    Raises:
        MissingFileError: the one that is named, or that of a checkout, is not there.
    """
    from ropewalk.errors import MissingFileError

    if named is not None:
        return Path(named).expanduser()
    root = Path(__file__).resolve().parents[3]  # of a checkout; elsewhere some folder without bench/models
    for place in (root, Path.cwd()):
        if (place / DEFAULT_MODEL / "config.json").is_file():
            return place / DEFAULT_MODEL
    raise MissingFileError(
        DEFAULT_MODEL,
        "this model in float16, which a checkout of ropewalk has, or another one as FLOAT16-MODEL",
        "none",
    )


def _texts(args: argparse.Namespace) -> Texts:
    """Return the texts of --text and --calibration."""
    from ropewalk.bench.packing import Texts, divide
    from ropewalk.shipped import held_out_text

    text = held_out_text() if args.text is None else read_text(args.text, "--text")
    return Texts(read_text(args.calibration, "--calibration"), text) if args.calibration else divide(text)
