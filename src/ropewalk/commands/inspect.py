"""`ropewalk inspect MODEL`, and with `--device` what it would cost there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.commands.options import add_packing, add_rope, add_source, check_rope, chosen, positive
from ropewalk.errors import UsageError
from ropewalk.shipped import resolve
from ropewalk.terminal import Output, size

if TYPE_CHECKING:
    from ropewalk.bench.cost import Sizes
    from ropewalk.bench.devices import Device

# Where a model that is not here is reckoned, if nothing is said.
USUAL = ("h200", "a100", "4090", "3060")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    from ropewalk.bench.devices import DEVICES, MEASURED

    add_source(
        parser,
        several=True,
        more="; or one that need not be here and a packing, as llama-2-13b:4b-g32 or mixtral-8x7b:4b-g128-act, for "
        "what it would cost",
    )
    add_packing(parser)
    add_rope(parser)
    parser.add_argument(
        "--device",
        nargs="+",
        choices=(*DEVICES, *MEASURED),
        metavar="NAME",
        help="calculate tokens a second and memory there: "
        f"{', '.join(DEVICES)}; cpu and cuda are what is here, measured first",
    )
    parser.add_argument(
        "--context", type=_count, nargs="+", metavar="N", help="with so many tokens (default: 0 and the model's own)"
    )
    parser.add_argument(
        "--kv-bits", type=int, choices=(16, 8), default=16, help="of keys and values in the cache (default: 16)"
    )
    parser.add_argument(
        "--prefill-chunk", type=positive, metavar="N", help="tokens of a prompt computed at once (default: all)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw tokens a second and memory over context to a PNG")


def _count(text: str) -> int:
    """Parse a number of tokens, which may be 0, for argparse."""
    return 0 if text == "0" else positive(text)


def run(args: argparse.Namespace, out: Output) -> None:
    """Print what is in checkpoints, and what they cost.

    Raises:
        UsageError: options that do not fit.
    """
    check_rope(args.rope)
    reckoned = any(value not in (None, 16) for value in (args.context, args.kv_bits, args.prefill_chunk, args.plot))
    found, sizes = {}, {}
    for model in dict.fromkeys(args.model):
        found[model], sizes[model] = _known(model) or _opened(model, args)
        if sizes[model] is None and reckoned:
            raise UsageError("--device: expected one with --context, --kv-bits, --prefill-chunk and --plot, found none")
    measured = {model: each for model, each in sizes.items() if each is not None}
    if measured:
        devices = _devices(args.device or USUAL)
        _reckon(measured, found, devices, args, out)
    out.result(next(iter(found.values())) if len(found) == 1 else {"models": list(found.values())})
    for model in found:
        if len(found) == 1 or sizes[model] is None:
            _say(found[model], out)
    if len(measured) > 1:
        _say_models(found, out)


def _known(model: str) -> tuple[dict[str, Any], Sizes] | None:
    """Return a model that is not here, or None where the name stands for a file, a folder or the Hub."""
    from ropewalk.bench.cost import sizes_of_known

    sizes = None if Path(model).exists() else sizes_of_known(model)
    return None if sizes is None else ({"model": model}, sizes)


def _opened(model: str, args: argparse.Namespace) -> tuple[dict[str, Any], Sizes | None]:
    """Return what is in a checkpoint, and its sizes where --device asks for them."""
    from ropewalk.loader.inspect import describe, open_model

    checkpoint, rope = open_model(resolve(model), rope=args.rope, **chosen(args, ("revision", "bits", "group_size")))
    if args.device is None:
        return describe(checkpoint, rope), None
    from ropewalk.bench.cost import sizes_of_checkpoint

    return describe(checkpoint, rope), sizes_of_checkpoint(checkpoint, rope)


def _devices(names: list[str] | tuple[str, ...]) -> list[Device]:
    """Return the devices of --device, those that are here measured.

    Raises:
        UsageError: cuda where there is none.
    """
    import torch

    from ropewalk.bench.devices import DEVICES, measured

    if "cuda" in names and not torch.cuda.is_available():
        raise UsageError("--device: expected another than cuda, since torch finds no GPU here")
    return [DEVICES[name] if name in DEVICES else measured(name) for name in dict.fromkeys(names)]


def _reckon(
    sizes: dict[str, Sizes],
    found: dict[str, dict[str, Any]],
    devices: list[Device],
    args: argparse.Namespace,
    out: Output,
) -> None:
    """Add "cost" to what was found, and draw it.

    Raises:
        UsageError: nowhere to draw to.
    """
    from ropewalk.bench.cost import cost

    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise UsageError(f"--plot: expected a folder to write to, found none for {args.plot}")
    one = len(sizes) == 1
    for model, each in sizes.items():
        contexts = args.context or ([0, each.context] if one else [0])
        found[model]["cost"] = cost(each, devices, dict.fromkeys(contexts), args.kv_bits, args.prefill_chunk)
    if args.plot:
        from ropewalk.bench.cost_plot import plot_cost

        longest = max(args.context or [each.context for each in sizes.values()])
        options = {"longest": max(longest, 1), "kv_bits": args.kv_bits, "chunk": args.prefill_chunk}
        plot_cost(sizes, devices, args.plot, **options)
        out.note(f"plot: {args.plot}")


def _say(found: dict[str, Any], out: Output) -> None:
    """Print one model."""
    rows = _rows(found) if "format" in found else [("model", found["model"])]
    cost = found.get("cost")
    if cost is not None:
        rows += _cost_rows(cost)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        out.say(f"{name.ljust(width)}  {text}")
    if cost is not None:
        from ropewalk.bench.cost import cost_table

        out.say("\ncalculated, not measured:")
        out.say(cost_table(cost))


def _say_models(found: dict[str, dict[str, Any]], out: Output) -> None:
    """Print a table of several models for each context."""
    from ropewalk.bench.cost import models_table

    costs = {model: each["cost"] for model, each in found.items() if "cost" in each}
    for place, row in enumerate(next(iter(costs.values()))["devices"][0]["contexts"]):
        out.say(f"tokens a second at most, with {row['context']:,} tokens of context; calculated, not measured:")
        out.say(models_table(costs, place))


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what there is to say of a checkpoint."""
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
    return rows + [("warning", text) for text in found["warnings"]]


def _cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what there is to say of the sizes behind a cost."""
    sizes = cost["bytes"]
    part = "" if sizes["packed_of_a_token"] == sizes["packed"] else f" of {size(sizes['packed'])}"
    kept = sum(sizes[name] for name in ("packed", "output_embedding", "input_embedding", "other"))
    return [
        (
            "a token reads",
            f"{size(int(sizes['packed_of_a_token']))}{part} in linear layers ({cost['packing']}), "
            f"{size(sizes['output_embedding'])} in the output embedding, {size(sizes['other'])} in norms and the like, "
            f"and {size(sizes['cache_of_a_token'])} for each token of context ({cost['kv_bits']} bits)",
        ),
        ("in memory", f"{size(kept)} of weights; made for a context of {cost['context']:,}"),
    ]
