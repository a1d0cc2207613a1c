"""What a model costs on devices, by arithmetic: bytes that a token needs read, the tokens a second that a device's
memory and the links between several allow at best, the memory that a context takes, and the longest that fits.

Nothing is run. What is read and held is in `ropewalk.bench.sizes`, how several GPUs share it in
`ropewalk.bench.parallel`; so

    tokens/s <= batch / (bytes of a step / bandwidth + time on the links)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ropewalk.bench.devices import RESERVED, Device, Link
from ropewalk.bench.known_models import Model
from ropewalk.bench.parallel import Parallel, Stage, part_of, round_seconds, stages_of
from ropewalk.bench.sizes import sizes_of
from ropewalk.terminal import size, table

USEFUL = 1024  # tokens of context without which a model is of no use on a device


class Load(NamedTuple):
    """What is asked of a model.

    Attributes:
        contexts: tokens.
        batches: sequences at once, each with so much context.
        kv_bits: 16 or 8, of a number in the cache.
        chunk: tokens of a prompt that are computed at once; None for all.
    """

    contexts: Sequence[int]
    batches: Sequence[int] = (1,)
    kv_bits: int = 16
    chunk: int | None = None


def cost(
    model: Model,
    devices: Iterable[Device],
    load: Load,
    parallels: Iterable[Parallel] = (Parallel(),),
    link: Link | None = None,
) -> dict[str, Any]:
    """Return what a model costs on devices, as `ropewalk inspect --json` has it.

    Args:
        parallels: numbers of each device that share it.
        link: as `stages_of` takes it.

    Raises:
        UsageError: a model that is not split so.
    """
    sizes, parallels = sizes_of(model), list(parallels)
    places = [(device, parallel) for device in devices for parallel in parallels]
    return {
        "packing": sizes.packing,
        "bytes": {
            "packed": sizes.packed,
            "packed_of_a_token": sizes.packed_read(),
            "output_embedding": sizes.head,
            "input_embedding": sizes.embedding,
            "other": sizes.others,
            "cache_of_a_token": sizes.cached * sizes.layers * load.kv_bits // 8,
        },
        "kv_bits": load.kv_bits,
        "prefill_chunk": load.chunk,
        "context": sizes.context,
        "devices": [
            _on(stages_of(model, parallel, device, link), device, parallel, load) for device, parallel in places
        ],
    }


def _on(stages: list[Stage], device: Device, parallel: Parallel, load: Load) -> dict[str, Any]:
    ranks = [sizes for stage in stages for sizes in stage.ranks]
    room = device.memory_bytes - RESERVED
    longest = {
        batch: min(sizes.longest_context(room, load.kv_bits, load.chunk, batch) for sizes in ranks)
        for batch in load.batches
    }
    rows = []
    for context in load.contexts:
        for batch in load.batches:
            fullest = max(ranks, key=lambda sizes: sizes.memory(context, load.kv_bits, load.chunk, batch))
            memory = fullest.memory(context, load.kv_bits, load.chunk, batch)
            cache = batch * fullest.cache_bytes(context, load.kv_bits)
            rows.append(
                {
                    "context": context,
                    "batch": batch,
                    **_rates(stages, device, context, load.kv_bits, batch),
                    "memory_bytes": memory,
                    "cache_bytes": cache,
                    "work_bytes": memory - cache - fullest.weights,
                    "fits": memory <= room,
                    "longest_context": longest[batch],
                }
            )
    links = {link.name: link._asdict() for stage in stages for link in (stage.link, stage.next_link) if link}
    return {
        **device._asdict(),
        "tensor_parallel": parallel.tensor,
        "pipeline_parallel": parallel.pipeline,
        "expert_parallel": parallel.experts,
        "nnodes": parallel.nnodes,
        "links": list(links.values()),
        "weights_bytes": max(sizes.weights for sizes in ranks),
        "longest_context": longest[load.batches[0]],
        "contexts": rows,
    }


def _rates(stages: list[Stage], device: Device, context: int, kv_bits: int, batch: int) -> dict[str, float]:
    """Return the bytes that the GPU that reads the most needs for a token of each sequence, and tokens a second."""
    part = part_of(batch, len(stages))
    read = [stage.read_seconds(device, context, kv_bits, part) for stage in stages]
    links = [stage.link_seconds(part) for stage in stages]
    both = [sum(each) for each in zip(read, links, strict=True)]
    step = max(sizes.step_bytes(context, kv_bits, part) for stage in stages for sizes in stage.ranks)
    return {
        "bytes_per_token": step / part,
        "limit_tokens_per_s": batch / round_seconds(read, batch),
        "link_s": sum(links),
        "tokens_per_s": batch / round_seconds(both, batch),
    }


def cost_table(found: dict[str, Any]) -> str:
    """Return what `ropewalk inspect --device` prints of one model: a line for each device, context and batch."""
    devices = found["devices"]
    several = any(_gpus(device) > 1 for device in devices)
    batches = any(row["batch"] > 1 for device in devices for row in device["contexts"])
    lines: list[tuple[str, ...]] = [
        (
            *(("", "GPUs", "GB/s of each") if several else ("", "GB/s")),
            "context",
            *(("batch",) if batches else ()),
            "GB a token",
            *(("ms on links", "tokens/s by memory") if several else ()),
            *("tokens/s at most", "memory", "", "longest context"),
        )
    ]
    for device in devices:
        for i, row in enumerate(device["contexts"]):
            head = [device["title"], *([_split(device)] if several else []), f"{device['read_gb_per_s']:.0f}"]
            linked = (f"{row['link_s'] * 1e3:.2f}", _rounded(row["limit_tokens_per_s"]))
            lines.append(
                (
                    *(head if i == 0 else [""] * len(head)),
                    f"{row['context']:,}",
                    *((str(row["batch"]),) if batches else ()),
                    _gigabytes(row["bytes_per_token"]),
                    *(linked if several else ()),
                    _rounded(row["tokens_per_s"]),
                    size(row["memory_bytes"]),
                    "fits" if row["fits"] else "too much",
                    f"{row['longest_context']:,}" if i == 0 or batches else "",
                )
            )
    sources = dict.fromkeys(f"{device['name']} {device['source']}" for device in devices)
    text = f"{table(lines)}\nGB/s: {'; '.join(sources)}"
    text += "".join(f"\n{line}" for line in link_lines(devices))
    return text + ("\nGB a token and memory: of the GPU that has the most" if several else "")


def models_table(costs: dict[str, dict[str, Any]], place: int) -> str:
    """Return tokens a second at most, a line for each model and a column for each device; of several GPUs with the
    memory of the one that holds the most.

    "–" is where fewer than USEFUL tokens of context fit.

    Args:
        costs: model -> what --json has of it as "cost"; all with the same devices.
        place: which of the contexts and batches.
    """
    devices = next(iter(costs.values()))["devices"]
    several = any(_gpus(device) > 1 for device in devices)
    titles = [f"{device['name']} ({device['read_gb_per_s']:.0f} GB/s)" for device in devices]
    lines = [("", *(_columns(devices) if several else ("GB a token", *titles)))]
    for model, found in costs.items():
        rows = [device["contexts"][place] for device in found["devices"]]
        cells = [_rounded(row["tokens_per_s"]) + f", {size(row['memory_bytes'])}" * several for row in rows]
        useful = [row["longest_context"] >= max(USEFUL, row["context"]) for row in rows]
        cells = [cell if fits else "–" for cell, fits in zip(cells, useful, strict=True)]
        lines.append((model, *([] if several else [_gigabytes(rows[0]["bytes_per_token"])]), *cells))
    return table(lines)


def contexts_table(costs: dict[str, dict[str, Any]]) -> str:
    """Return the longest context of one sequence that fits, a line for each model and a column for each device.

    Args:
        costs: as `models_table` takes them.
    """
    lines = [("", *_columns(next(iter(costs.values()))["devices"]))]
    for model, found in costs.items():
        longest = (device["longest_context"] for device in found["devices"])
        lines.append((model, *(f"{tokens:,}" if tokens >= USEFUL else "–" for tokens in longest)))
    return table(lines)


def _columns(devices: list[dict[str, Any]]) -> list[str]:
    """Return what several devices are called."""
    if all(_gpus(device) == 1 for device in devices):
        return [device["name"] for device in devices]
    return [f"{device['name']}, {_split(device)}" for device in devices]


def link_lines(devices: list[dict[str, Any]]) -> list[str]:
    """Return what is assumed of each link."""
    links = {link["name"]: link for device in devices for link in device["links"]}
    return [
        f"{name}: {link['gb_per_s']:g} GB/s each way, assumed {link['latency_us']:g} µs for an operation"
        for name, link in links.items()
    ]


def _gpus(device: dict[str, Any]) -> int:
    return int(device["tensor_parallel"] * device["pipeline_parallel"])


def _split(device: dict[str, Any]) -> str:
    """Return how many GPUs, as "TP 2" or "TP 2 x PP 2"."""
    tensor, pipeline = device["tensor_parallel"], device["pipeline_parallel"]
    if pipeline == 1:
        return f"TP {tensor}" if tensor > 1 else "1"
    return f"PP {pipeline}" if tensor == 1 else f"TP {tensor} x PP {pipeline}"


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}" if nbytes >= 1e9 else f"{nbytes / 1e9:.2g}"


def _rounded(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"
