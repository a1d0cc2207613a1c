"""What each of several GPUs holds and reads of a model, and what they tell each other for a token, as vLLM splits it
with ropewalk's method for packed layers. Nothing is run.

Tensor parallelism splits every layer over n GPUs: q, k, v, gate, up and both embeddings by columns; o and down by rows
with the scales of their groups, of which a GPU may have a part; or, where rows cannot be cut so (o with act-order,
parts below 32 rows), by columns of all rows, and then the input is gathered first. With act-order down is cut by its
sorted rows, and the columns of gate and up with it; those of experts, too, unless expert parallelism deals experts out
whole. A layer's keys and values are split by heads; where there are fewer heads than GPUs, several hold the same one.
Pipeline parallelism puts blocks on stages one after the other, each of n GPUs.

For a token a block takes two all-reduces of `hidden` numbers, and an all-gather of the input of each layer that is cut
by columns against its rows; besides, the input embedding takes an all-reduce and the logits a gather. A ring of n GPUs
sends 2 (n - 1) / n of a message's bytes for an all-reduce and (n - 1) / n for an all-gather over each link (Patarasuk
and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"; nccl-tests, doc/PERFORMANCE.md).
Nothing is taken to overlap.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from ropewalk.bench.devices import LINKS, Device, Link
from ropewalk.bench.known_models import Model, Part
from ropewalk.bench.shapes import Packing
from ropewalk.bench.sizes import EMBEDDING, EXPERT, HEAD, Sizes, expert_count, is_small, is_tied, kv_heads, sizes_of
from ropewalk.errors import FormatError, UsageError
from ropewalk.gptq.layout import PLANE

PADDING = 64  # the vocabulary is filled up to a multiple of it, as vLLM's VocabParallelEmbedding does

_NUMBER = 2  # bytes of what goes over a link: 16 bits
_KEYS = {"k_proj", "v_proj"}
_COLUMNS = {"q_proj", "Wqkv", "gate_proj", "up_proj", "w1", "w3"} | _KEYS
_ROWS = {"o_proj", "out_proj", "down_proj", "w2"}
_SORTED = re.compile(r".+\.mlp\.(?:shared_expert\.)?down_proj(?:\.weight)?")  # the down of a gate and an up


@dataclass(frozen=True)
class Parallel:
    """How many GPUs hold a model, in vLLM's words.

    Attributes:
        tensor, pipeline: GPUs that share every layer; stages of blocks.
        experts: whether experts are dealt out whole to the GPUs of a stage.
        nnodes: machines; GPUs that share layers stand next to each other.
    """

    tensor: int = 1
    pipeline: int = 1
    experts: bool = False
    nnodes: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline

    def crosses(self, first: int, last: int) -> bool:
        """Tell whether GPUs with these numbers are in different machines."""
        here = self.gpus // self.nnodes
        return first // here != last // here


@dataclass(frozen=True)
class Stage:
    """GPUs with the same blocks.

    Attributes:
        ranks: what each of them holds.
        reduced, gathered: numbers of a token in each all-reduce and in each all-gather.
        link: between these GPUs; None for one.
        next_link: to the next stage; None for the last one.
    """

    ranks: tuple[Sizes, ...]
    reduced: tuple[int, ...]
    gathered: tuple[int, ...]
    link: Link | None
    next_link: Link | None

    def read_seconds(self, device: Device, context: int, kv_bits: int, batch: int) -> float:
        """Return what reading takes on the GPU that reads the most."""
        most = max(sizes.step_bytes(context, kv_bits, batch) for sizes in self.ranks)
        return most / (device.read_gb_per_s * 1e9)

    def link_seconds(self, batch: int) -> float:
        """Return what a step of `batch` tokens spends on links, the way to the next stage included."""
        seconds, n = 0.0, len(self.ranks)
        if self.link is not None:
            seconds += sum(all_reduce_seconds(_NUMBER * batch * count, n, self.link) for count in self.reduced)
            seconds += sum(all_gather_seconds(_NUMBER * batch * count, n, self.link) for count in self.gathered)
        if self.next_link is not None:  # vLLM sends the residual apart
            seconds += send_seconds(2 * _NUMBER * batch * self.ranks[0].hidden, self.next_link)
        return seconds


def all_reduce_seconds(nbytes: float, n: int, link: Link) -> float:
    """Return the time of an all-reduce of a message of so many bytes by a ring of n GPUs."""
    return link.latency_us * 1e-6 + 2 * (n - 1) / n * nbytes / (link.gb_per_s * 1e9)


def all_gather_seconds(nbytes: float, n: int, link: Link) -> float:
    """Return the time of an all-gather whose result has so many bytes, by a ring of n GPUs."""
    return link.latency_us * 1e-6 + (n - 1) / n * nbytes / (link.gb_per_s * 1e9)


def send_seconds(nbytes: float, link: Link) -> float:
    """Return the time of so many bytes from one GPU to another."""
    return link.latency_us * 1e-6 + nbytes / (link.gb_per_s * 1e9)


def stages_of(model: Model, parallel: Parallel, device: Device, link: Link | None = None) -> list[Stage]:
    """Return what every GPU holds.

    Args:
        link: between machines where there are several, else between GPUs; None for the device's own.

    Raises:
        UsageError: a model that vLLM does not split so, or a link that nobody knows.
    """
    _check(model, parallel)
    inside, between = _links(parallel, device, link)
    vocabulary = next((part.shape[0] for part in model.parts if EMBEDDING.fullmatch(part.name)), 0)
    hidden, stages, tied = model.config.get_text_config().hidden_size, [], is_tied(model)
    for stage, count in enumerate(_layers(model, parallel)):
        parts = [part for part in model.parts if stage in _stages_with(part, model, parallel, tied)]
        last = stage == parallel.pipeline - 1
        ranks = []
        for rank in range(parallel.tensor):
            mine = Model(model.config, list(_share(parts, model, parallel, rank)), model.packing)
            ranks.append(_of_rank(sizes_of(mine, tied and last), model, parallel, count))
        first_gpu = stage * parallel.tensor
        shared = parallel.crosses(first_gpu, first_gpu + parallel.tensor - 1)
        onward = any(
            parallel.crosses(first_gpu + rank, first_gpu + parallel.tensor + rank) for rank in range(len(ranks))
        )
        gathered = [part.shape[1] for part in parts if _is_row(part) and _by_columns(part, parallel.tensor)]
        stages.append(
            Stage(
                ranks=tuple(ranks),
                reduced=(hidden,) * (2 * count + (stage == 0)),
                gathered=(*gathered, *([vocabulary] if last else [])),
                link=None if parallel.tensor == 1 else between if shared else inside,
                next_link=None if last else between if onward else inside,
            )
        )
    return stages


def round_seconds(seconds: list[float], batch: int) -> float:
    """Return the time in which stages that take so long for a part of a batch make one token of each sequence: a batch
    goes through them in as many parts as there are stages, and a single sequence through one after the other.
    """
    return max(sum(seconds), min(batch, len(seconds)) * max(seconds))


def part_of(batch: int, stages: int) -> int:
    """Return the sequences that are in one stage at once."""
    return -(-batch // min(batch, stages))


def _of_rank(sizes: Sizes, model: Model, parallel: Parallel, layers: int) -> Sizes:
    """Return the sizes of one GPU, whose config still speaks of the whole model."""
    heads = kv_heads(model.config.get_text_config())
    experts, n = expert_count(model), parallel.tensor
    return replace(
        sizes,
        expert_count=experts,
        chosen=min(getattr(model.config.get_text_config(), "num_experts_per_tok", None) or experts, experts),
        expert_ranks=n if parallel.experts else 1,
        layers=layers,
        cached=sizes.cached // heads * max(1, heads // n),
        score_heads=sizes.score_heads // n,
    )


def _layers(model: Model, parallel: Parallel) -> list[int]:
    """Return the blocks of each stage: the rest of a division goes to the stages before the last, as vLLM's
    get_pp_indices has it.
    """
    each, more = divmod(model.config.get_text_config().num_hidden_layers, parallel.pipeline)
    counts = [each] * parallel.pipeline
    for i in range(more):
        counts[-2 - i] += 1
    return counts


def _stages_with(part: Part, model: Model, parallel: Parallel, tied: bool) -> set[int]:
    last = parallel.pipeline - 1
    if EMBEDDING.fullmatch(part.name):
        return {0, last} if tied else {0}
    found = re.search(r"\.(\d+)\.", part.name)
    if HEAD.fullmatch(part.name) or found is None:
        return {last}
    ends = list(accumulate(_layers(model, parallel)))
    return {bisect(ends, int(found[1]))}


def _share(parts: list[Part], model: Model, parallel: Parallel, rank: int) -> Iterator[Part]:
    """Yield what one GPU of a stage holds of its parts."""
    n, experts, heads = parallel.tensor, expert_count(model), kv_heads(model.config.get_text_config())
    for part in parts:
        expert = EXPERT.fullmatch(part.name)
        if n == 1:
            yield part
        elif expert and parallel.experts:
            if _rank_with(int(expert[1]), experts, n) == rank:
                yield part
        else:
            yield _cut(part, n, heads)


def _rank_with(expert: int, experts: int, n: int) -> int:
    """Return the GPU that an expert is on; the first ones hold one more where the number does not divide."""
    each, more = divmod(experts, n)
    return expert // (each + 1) if expert < more * (each + 1) else more + (expert - more * (each + 1)) // each


def _cut(part: Part, n: int, heads: int) -> Part:
    """Return what one of n GPUs holds of a part.

    Args:
        heads: of keys and values.
    """
    name = _layer_name(part)
    if EMBEDDING.fullmatch(part.name) or HEAD.fullmatch(part.name):
        rows = -(-part.shape[0] // PADDING) * PADDING
        return part._replace(shape=(_divided(rows, n, part, "rows"), *part.shape[1:]))
    if name in _COLUMNS:
        shares = min(n, heads) if name in _KEYS else n
        return _fitting(part._replace(shape=(_divided(part.shape[0], shares, part, "columns"), *part.shape[1:])), n)
    if _is_row(part):
        if _by_columns(part, n):
            return _fitting(part._replace(shape=(_divided(part.shape[0], n, part, "columns"), part.shape[1])), n)
        return _fitting(_cut_rows(part, n), n)
    if not is_small(part):
        known = ", ".join(sorted(_COLUMNS | _ROWS))
        raise UsageError(f"--tensor-parallel: expected layers called {known}, found {part.name}")
    return part


def _cut_rows(part: Part, n: int) -> Part:
    """Return some rows of a layer, in the order of all, so that a share needs none of its own."""
    rows, packing = _divided(part.shape[1], n, part, "rows"), part.packing
    if packing is None:
        return part._replace(shape=(part.shape[0], rows))
    group_size = _group_size(packing, rows)
    if group_size is None:
        raise UsageError(
            f"--tensor-parallel: expected a share of {part.name} that is whole parts of groups of "
            f"{packing.group_size}, found {n} GPUs for {part.shape[1]} rows"
        )
    here = packing._replace(desc_act=False, group_size=group_size)
    return part._replace(shape=(part.shape[0], rows), packing=here)


def _layer_name(part: Part) -> str:
    return part.name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _is_row(part: Part) -> bool:
    return _layer_name(part) in _ROWS and len(part.shape) == 2


def _by_columns(part: Part, n: int) -> bool:
    """Tell whether a layer whose input is split is cut by columns all the same, and its input gathered."""
    if part.packing is None or EXPERT.fullmatch(part.name):
        return False
    rows, packing = part.shape[1] // n, part.packing
    moved = packing.act_order and not _SORTED.fullmatch(part.name)
    return moved or _group_size(packing, rows) is None or rows * packing.bits % 32 != 0


def _group_size(packing: Packing, rows: int) -> int | None:
    """Return of how many rows the scales are where a GPU has so many rows of a layer; None where kernels need more."""
    if packing.group_size == -1:
        return -1
    size = math.gcd(packing.group_size, rows)
    return size if size == packing.group_size or size % PLANE == 0 else None


def _divided(count: int, n: int, part: Part, what: str) -> int:
    if count % n:
        raise UsageError(f"--tensor-parallel: expected a divisor of the {count} {what} of {part.name}, found {n}")
    return count // n


def _fitting(part: Part, n: int) -> Part:
    try:
        _ = part.nbytes
    except FormatError as error:
        raise UsageError(
            f"--tensor-parallel: expected a share of {part.name} that can be packed, found {n}: {error}"
        ) from None
    return part


def _links(parallel: Parallel, device: Device, link: Link | None) -> tuple[Link | None, Link | None]:
    """Return the links inside a machine and between machines, where they are needed."""
    inside = LINKS[device.link] if device.link else None
    if parallel.gpus == 1:
        return None, None
    if parallel.nnodes > 1:
        if link is None:
            raise UsageError(f"--link: expected what connects the {parallel.nnodes} machines, found none")
        if inside is None and parallel.gpus > parallel.nnodes:
            raise UsageError(f"--device: expected one whose link is known, found {device.name}")
        return inside, link
    if link is None and inside is None:
        raise UsageError(f"--link: expected one of {', '.join(LINKS)} for {device.name}, found none")
    return link or inside, None


def _check(model: Model, parallel: Parallel) -> None:
    """Refuse what vLLM refuses (ModelConfig.verify_with_parallel_config, and its Llama for keys and values)."""
    text, n = model.config.get_text_config(), parallel.tensor
    heads, keys, experts = text.num_attention_heads, kv_heads(text), expert_count(model)
    if heads % n:
        raise UsageError(f"--tensor-parallel: expected a divisor of the {heads} attention heads, found {n}")
    if max(keys, n) % min(keys, n):
        raise UsageError(
            f"--tensor-parallel: expected a divisor or a multiple of the {keys} heads of keys and values, found {n}"
        )
    if parallel.pipeline > text.num_hidden_layers:
        raise UsageError(f"--pipeline-parallel: expected at most {text.num_hidden_layers}, found {parallel.pipeline}")
    if parallel.experts and experts == 1:
        raise UsageError(f"--expert-parallel: expected a model with experts, found {text.model_type}")
    if parallel.experts and experts < n:
        raise UsageError(f"--expert-parallel: expected at most {experts} GPUs for as many experts, found {n}")
    if parallel.gpus % parallel.nnodes:
        raise UsageError(f"--nnodes: expected a divisor of {parallel.gpus} GPUs, found {parallel.nnodes}")
