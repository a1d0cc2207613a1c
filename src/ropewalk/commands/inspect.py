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
    from ropewalk.bench.devices import Device, Link
    from ropewalk.bench.known_models import Model
    from ropewalk.bench.parallel import Parallel

# Where a model that is not here is reckoned, if nothing is said.
USUAL = ("h200", "a100", "4090", "3060")
# Options that mean nothing for a folder without --device.
_RECKONED = (
    *("context", "batch", "kv_bits", "prefill_chunk", "plot"),
    *("tensor_parallel", "pipeline_parallel", "expert_parallel", "nnodes", "link", "link_latency"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    from ropewalk.bench.devices import DEVICES, LINKS, MEASURED

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
    parser.add_argument(
        "--batch", type=positive, nargs="+", metavar="N", help="sequences at once, each with that context (default: 1)"
    )
    several = parser.add_argument_group("several GPUs (see docs/scaling.md)", "in the words of vllm serve")
    several.add_argument(
        "--tensor-parallel", type=positive, nargs="+", metavar="N", help="GPUs that share every layer (default: 1)"
    )
    several.add_argument("--pipeline-parallel", type=positive, metavar="N", help="stages of blocks (default: 1)")
    several.add_argument("--expert-parallel", action="store_true", help="deal experts out whole")
    several.add_argument("--nnodes", type=positive, metavar="N", help="machines (default: 1)")
    several.add_argument(
        "--link",
        choices=LINKS,
        metavar="NAME",
        help="what connects the machines, or with one machine its GPUs (default: the device's own): "
        f"{', '.join(LINKS)}",
    )
    several.add_argument(
        "--link-latency", type=float, metavar="US", help="microseconds of a collective operation there, once measured"
    )


def _count(text: str) -> int:
    """Parse a number of tokens, which may be 0, for argparse."""
    return 0 if text == "0" else positive(text)


def run(args: argparse.Namespace, out: Output) -> None:
    """Print what is in checkpoints, and what they cost.

    Raises:
        UsageError: options that do not fit.
    """
    check_rope(args.rope)
    given = [option for option in _RECKONED if getattr(args, option) not in (None, False, 16)]
    found, models = {}, {}
    for name in dict.fromkeys(args.model):
        found[name], models[name] = _known(name) or _opened(name, args)
        if models[name] is None and given:
            raise UsageError(f"--device: expected one with --{given[0].replace('_', '-')}, found none")
    reckoned = {name: model for name, model in models.items() if model is not None}
    if reckoned:
        _reckon(reckoned, found, _devices(args.device or USUAL), args, out)
    out.result(next(iter(found.values())) if len(found) == 1 else {"models": list(found.values())})
    for name in found:
        if len(found) == 1 or models[name] is None:
            _say(found[name], out)
    if len(reckoned) > 1:
        _say_models(found, args, out)


def _known(name: str) -> tuple[dict[str, Any], Model] | None:
    """Return a model that is not here, or None where the name stands for a file, a folder or the Hub."""
    from ropewalk.bench.known_models import known_model

    model = None if Path(name).exists() else known_model(name)
    return None if model is None else ({"model": name}, model)


def _opened(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], Model | None]:
    """Return what is in a checkpoint, and its parts where --device asks for what they cost."""
    from ropewalk.loader.inspect import describe, open_model

    checkpoint, rope = open_model(resolve(name), rope=args.rope, **chosen(args, ("revision", "bits", "group_size")))
    if args.device is None:
        return describe(checkpoint, rope), None
    from ropewalk.bench.sizes import model_of_checkpoint

    return describe(checkpoint, rope), model_of_checkpoint(checkpoint, rope)


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


def _parallels(args: argparse.Namespace) -> list[Parallel]:
    """Return how many GPUs share a model, one for each number of --tensor-parallel."""
    from ropewalk.bench.parallel import Parallel

    more = {"pipeline": args.pipeline_parallel or 1, "experts": args.expert_parallel, "nnodes": args.nnodes or 1}
    return [Parallel(tensor, **more) for tensor in dict.fromkeys(args.tensor_parallel or [1])]


def _link(args: argparse.Namespace) -> Link | None:
    """Return the link of --link and --link-latency.

    Raises:
        UsageError: a latency of nothing, or one that cannot be.
    """
    from ropewalk.bench.devices import LINKS

    if args.link_latency is None:
        return LINKS[args.link] if args.link else None
    if args.link is None:
        raise UsageError("--link-latency: expected --link with it, found none")
    if not 0 <= args.link_latency < 1e6:
        raise UsageError(f"--link-latency: expected microseconds from 0 to 1e6, found {args.link_latency}")
    return LINKS[args.link]._replace(latency_us=args.link_latency)


def _reckon(
    models: dict[str, Model],
    found: dict[str, dict[str, Any]],
    devices: list[Device],
    args: argparse.Namespace,
    out: Output,
) -> None:
    """Add "cost" to what was found, and draw it.

    Raises:
        UsageError: nowhere to draw to, or GPUs that a model is not split over.
    """
    from ropewalk.bench.cost import Load, cost
    from ropewalk.bench.sizes import sizes_of

    parallels, batches = _parallels(args), list(dict.fromkeys(args.batch or [1]))
    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise UsageError(f"--plot: expected a folder to write to, found none for {args.plot}")
    if args.plot and (batches != [1] or any(parallel.gpus > 1 for parallel in parallels)):
        raise UsageError("--plot: expected one GPU and one sequence, which it draws, found more")
    sizes = {name: sizes_of(model) for name, model in models.items()}
    for name, model in models.items():
        contexts = args.context or ([0, sizes[name].context] if len(models) == 1 else [0])
        load = Load(list(dict.fromkeys(contexts)), batches, args.kv_bits, args.prefill_chunk)
        found[name]["cost"] = cost(model, devices, load, parallels, _link(args))
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


def _say_models(found: dict[str, dict[str, Any]], args: argparse.Namespace, out: Output) -> None:
    """Print a table of several models for each context and batch, and one of what fits unless contexts are given."""
    from ropewalk.bench.cost import contexts_table, link_lines, models_table

    costs = {model: each["cost"] for model, each in found.items() if "cost" in each}
    devices = next(iter(costs.values()))["devices"]
    memory = ", memory of each GPU" if any(device["links"] for device in devices) else ""
    for place, row in enumerate(devices[0]["contexts"]):
        asked = f"{row['context']:,} tokens of context"
        if row["batch"] > 1:
            asked = f"{row['batch']} sequences of {asked}"
        out.say(f"tokens a second at most{memory}, with {asked}; calculated, not measured:")
        out.say(models_table(costs, place))
    if args.context is None:
        out.say("longest context of a sequence; calculated, not measured:")
        out.say(contexts_table(costs))
    for line in link_lines(devices):
        out.say(line)


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
