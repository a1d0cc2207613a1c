"""`ropewalk export MODEL OUT`."""

from __future__ import annotations

import argparse

from ropewalk.commands.options import add_packing, add_rope, add_source, check_rope
from ropewalk.shipped import resolve
from ropewalk.terminal import Output, size


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_source(parser)
    parser.add_argument("out", metavar="OUT", help="the folder to write, new or empty")
    add_rope(parser)
    add_packing(parser)
    parser.add_argument(
        "--link",
        action="store_true",
        help="hard-link standard safetensors instead of copying them, where the disk can: one file of two names, which "
        "takes no more space. Deleting or replacing one leaves the other, but what writes into one (safetensors up to "
        "0.7 does when a model is saved over it) writes into both",
    )


def run(args: argparse.Namespace, out: Output) -> None:
    """Export a checkpoint.

    Raises:
        what `ropewalk.export` raises.
    """
    from ropewalk.loader.export import export

    check_rope(args.rope)
    with out.bar(0, "writing", unit="B") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = export(
            resolve(args.model),
            args.out,
            rope=args.rope,
            link=args.link,
            bits=args.bits,
            group_size=args.group_size,
            revision=args.revision,
            progress=progress,
        )
    for warning in found["warnings"]:
        out.note(f"{args.model}: {warning}")
    count = len(found["files"])
    files = f"{count} file{'s' if count > 1 else ''} {found['weights']} ({size(found['bytes'])})"
    out.say(f"{args.out}: {found['rope_written']['note']}; {files}")
    out.result({"model": args.model, **found})
