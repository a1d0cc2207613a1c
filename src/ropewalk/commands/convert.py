"""`ropewalk convert MODEL OUT`."""

from __future__ import annotations

import argparse
import time

from ropewalk.commands.options import add_packing, add_source
from ropewalk.shipped import resolve
from ropewalk.terminal import Output, size


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_source(parser)
    parser.add_argument("out", metavar="OUT", help="the folder to write, new or empty")
    parser.add_argument(
        "--format",
        choices=("gptq", "gptq_v2"),
        help="how zero points are stored: less one (gptq) or as they are (gptq_v2) (default: as in MODEL)",
    )
    add_packing(parser)
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="of a file at most: 5GB, 500MB, … (default: 5GB)"
    )


def run(args: argparse.Namespace, out: Output) -> None:
    """Convert a checkpoint.

    Raises:
        what `ropewalk.convert` raises.
    """
    from ropewalk.loader.convert import convert

    began = time.perf_counter()
    with out.bar(0, "writing", unit="B") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = convert(
            resolve(args.model),
            args.out,
            format=args.format,
            bits=args.bits,
            group_size=args.group_size,
            shard_size=args.shard_size,
            revision=args.revision,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    for warning in found["warnings"]:
        out.note(f"{args.model}: {warning}")
    config = found["quantize_config"]
    kind = "float weights"
    if config is not None:
        kind = f"{found['layers']} packed layers, {config['bits']} bits, {config['checkpoint_format']}"
        kind += f" (from {found['from']})" if found["from"] != "gptq" else ""
    files = f"{len(found['files'])} files" if len(found["files"]) > 1 else found["files"][0]
    out.say(f"{args.out}: {kind}, {size(found['bytes'])} in {files}, in {seconds:.1f} s")
    out.result({"model": args.model, **found, "seconds": seconds})
