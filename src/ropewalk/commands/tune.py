"""`ropewalk tune`: find the fastest plans for the GPU that is here, and keep them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ropewalk.commands.options import choose_device, positive
from ropewalk.terminal import Output

SHAPES = ("5120x5120", "13824x5120", "5120x27648", "8192x22016")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--device", help="cuda (default) or cuda:N")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="KxN", help="(default: %(default)s)")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), nargs="+", default=[4, 3], help="(default: 4 3)")
    parser.add_argument("--m", type=positive, nargs="+", metavar="M", help="largest number of tokens of each plan")
    parser.add_argument("--seconds", type=float, default=0.02, help="for each candidate and shape (default: 0.02)")
    parser.add_argument("--out", metavar="FILE", help="where to write (default: the user's folder of plans)")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print each choice, and write the file."""
    import torch
    import triton

    from ropewalk.bench.report import machine
    from ropewalk.bench.tune import BUCKETS, cases, tune
    from ropewalk.errors import UsageError
    from ropewalk.gptq import few_tokens
    from ropewalk.gptq.plans import device_slug, parse_plans, user_folder

    if args.seconds <= 0:
        raise UsageError(f"--seconds: expected a positive number, found {args.seconds}")
    device = choose_device(args.device or "cuda")
    interpreted = triton.knobs.runtime.interpret
    if device.type == "cpu" and not interpreted:
        raise UsageError("--device: expected a GPU, found cpu (with TRITON_INTERPRET=1 it would do, for a rehearsal)")
    shapes = [_shape(text) for text in args.shape]
    about: dict[str, Any] = machine(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, multiprocessors, capability = properties.name, properties.multi_processor_count, properties.major
    else:
        name, multiprocessors, capability = "cpu", 1, 9
    found = tune(
        cases(shapes, args.bits, device, rotate=1 if device.type == "cpu" else None),
        device=device,
        seconds=args.seconds,
        buckets=sorted(args.m) if args.m else BUCKETS,
        tensor_cores=capability >= 8,
        cuda=device.type == "cuda" and capability >= 8 and few_tokens.available(),
        multiprocessors=multiprocessors,
        say=out.say,
    )
    result = {"measured": f"{name}, torch {about['torch']}, triton {about['triton']}, {about['date']}", **found}
    file = Path(args.out) if args.out else user_folder() / f"{device_slug(name)}.json"
    text = json.dumps(result, indent=2) + "\n"
    parse_plans(text, str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    out.result({"file": str(file), **result})
    out.say(f"written to {file}")


def _shape(text: str) -> tuple[int, int]:
    from ropewalk.errors import UsageError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape: expected KxN, such as 5120x13824, found {text!r}")
    return int(parts[0]), int(parts[1])
