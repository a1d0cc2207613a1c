"""`ropewalk inspect MODEL`."""

from __future__ import annotations

import argparse

from ropewalk.commands.options import add_packing, add_rope, add_source, check_rope, chosen
from ropewalk.shipped import resolve
from ropewalk.terminal import Output, size


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_source(parser)
    add_packing(parser)
    add_rope(parser)


def run(args: argparse.Namespace, out: Output) -> None:
    """Print what is in a checkpoint."""
    from ropewalk.loader.inspect import inspect

    check_rope(args.rope)
    options = chosen(args, ("revision", "bits", "group_size"))
    found = inspect(resolve(args.model), rope=args.rope, **options)
    out.result(found)
    rope = {k: v for k, v in found["rope"].items() if k not in ("type", "why")}
    groups = "one group" if found["group_size"] == -1 else f"groups of {found['group_size']}"
    packing = "float weights, not packed"
    if found["bits"]:
        order = "act-order" if found["desc_act"] else "no act-order"
        zeros = "symmetric" if found["sym"] else "asymmetric"
        packing = f"{found['format']}: {found['bits']} bits, {groups}, {order}, {zeros}"
    sizes = found["bytes"]
    rows = [
        ("model", found["model"]),
        ("architecture", found["architecture"]),
        ("weights", packing),
        ("rope", found["rope"]["type"] + "".join(f", {k} {v}" for k, v in rope.items() if not isinstance(v, list))),
        ("why", found["rope"]["why"]),
        ("size", f"{size(sizes['total'])} in {', '.join(found['files'])}"),
        ("kernels", ", ".join(f"{device}: {kernel}" for device, kernel in found["kernels"].items())),
    ]
    if found["bits"]:
        detail = (
            f"{size(sizes['packed'])} in {found['layers']['packed']} layers, {sizes['bits_per_weight']} bits a weight"
        )
        rows.insert(6, ("packed", detail))
    rows += [("warning", text) for text in found["warnings"]]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        out.say(f"{name.ljust(width)}  {text}")
