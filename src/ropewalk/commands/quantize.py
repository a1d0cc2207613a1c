"""`ropewalk quantize MODEL OUT --text FILE`."""

from __future__ import annotations

import argparse
import time

from ropewalk.commands.options import add_rope, check_rope, positive, read_text
from ropewalk.errors import UsageError
from ropewalk.shipped import resolve
from ropewalk.terminal import Output


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("model", metavar="MODEL", help="a model in float16: a folder, or user/name:branch of the Hub")
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of the Hub, instead of :branch")
    parser.add_argument("out", metavar="OUT", help="the folder to write, new or empty")
    parser.add_argument(
        "--method", choices=("gptq", "rtn"), default="gptq", help="rtn rounds to nearest (default: gptq)"
    )
    parser.add_argument("--text", metavar="FILE", help="calibration text, which gptq needs; - is stdin")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="(default: 4)")
    parser.add_argument("--group-size", type=int, default=128, metavar="N", help="-1 is no groups (default: 128)")
    parser.add_argument("--desc-act", action=yes_or_no, default=True, help="act-order (default: on)")
    parser.add_argument(
        "--static-groups", action=yes_or_no, default=False, help="groups stay consecutive (default: off)"
    )
    parser.add_argument("--sym", action=yes_or_no, default=True, help="symmetric codes (default: on)")
    parser.add_argument("--damp", type=float, default=0.01, metavar="SHARE", help="(default: 0.01)")
    parser.add_argument("--samples", type=positive, default=128, metavar="N", help="windows of the text (default: 128)")
    parser.add_argument(
        "--length", type=positive, metavar="N", help="tokens of a window (default: the context, to 2048)"
    )
    parser.add_argument("--device", help="cpu, cuda:0, … (default: the GPU if there is one)")
    add_rope(parser)


def run(args: argparse.Namespace, out: Output) -> None:
    """Quantize a model.

    Raises:
        UsageError: options that do not fit, or a single file as the model; what `ropewalk.quantize` raises.
    """
    from ropewalk.loader.quantize import quantize
    from ropewalk.loader.source import find_source

    check_rope(args.rope)
    if args.method == "gptq" and args.text is None:
        raise UsageError("--text: expected a file with calibration text, found none")
    text = read_text(args.text, "--text") if args.text is not None else None
    source = find_source(resolve(args.model), revision=args.revision)
    if source.file is not None:
        raise UsageError(f"MODEL: expected a folder with a model in float16, found the file {source.file}")
    began = time.perf_counter()
    with out.bar(0, "blocks", unit="block") as bar:

        def progress(done: int, blocks: int) -> None:
            bar.total = blocks
            bar.update(done - bar.n)

        config = quantize(
            source.folder,
            args.out,
            bits=args.bits,
            group_size=args.group_size,
            desc_act=args.desc_act,
            static_groups=args.static_groups,
            sym=args.sym,
            damp_percent=args.damp,
            method=args.method,
            text=text,
            samples=args.samples,
            length=args.length,
            rope=args.rope,
            device=args.device,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    out.say(f"{args.out}: {args.bits} bits, group size {args.group_size}, by {args.method} in {seconds:.0f} s")
    out.result({"model": args.model, "out": args.out, "quantize_config": config, "seconds": seconds})
