"""What each benchmark of `ropewalk bench` is given: its options checked, who takes part, and how results are shown."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from ropewalk.bench.decode import Lengths
    from ropewalk.bench.matmul import Setting
    from ropewalk.bench.report import Report
    from ropewalk.bench.shapes import Packing


class Work(NamedTuple):
    """A benchmark: who may take part, and how it is run, given a report and the options that all have."""

    peers: Sequence[Any]
    run: Callable[..., None]


def work(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    """Check what --shapes and the options of packing say, and return the benchmark.

    Raises:
        UsageError: they do not fit.
    """
    makers = {"rope": _rope, "matmul": _matmul, "moe": _moe, "decode": _decode, "load": _load}
    return makers[args.what](args, device, dtype)


def _rope(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    from ropewalk.bench import rope
    from ropewalk.bench.peers import rotary_peers
    from ropewalk.errors import UsageError

    heads = [rope.Heads(*shape) for shape in _sizes(args, rope.PRESETS, "llama-2-13b", "40x40x128")]
    for one in heads:
        if one.head_dim % 2 or one.heads % one.kv_heads:
            found = f"{one.heads}x{one.kv_heads}x{one.head_dim}"
            raise UsageError(f"--shapes: expected heads of an even size, and heads of k that divide, found {found!r}")
    return Work(rotary_peers(), lambda report, **options: rope.bench_rope(report, heads, args.m, **options))


def _matmul(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    from ropewalk.bench import matmul
    from ropewalk.bench.peers import matmul_peers

    settings = _settings(_packings(args), _sizes(args, matmul.PRESETS, "4096x4096", "KxN"))
    peers = matmul_peers(device, args.mode)
    return Work(peers, lambda report, **options: matmul.bench_matmul(report, settings, args.m, **options))


def _moe(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    from ropewalk.bench import moe
    from ropewalk.bench.peers.experts import Sizes, experts_peers
    from ropewalk.errors import UsageError

    found, packings = [], _packings(args)
    for name in args.shapes or list(moe.PRESETS):
        text, _, top_k = moe.PRESETS.get(name, name).partition(":")
        experts, hidden, ffn = _numbers(name, text, "8x4096x14336:2", moe.PRESETS)
        if not (top_k or "2").isdecimal():
            raise _unknown(name, "8x4096x14336:2", moe.PRESETS)
        found.append(Sizes(experts, hidden, ffn, int(top_k or 2)))
        if not 1 <= found[-1].top_k <= experts:
            raise UsageError(f"--shapes: expected 1 to {experts} experts for a token, found {name!r}")
        _settings(packings, [(hidden, ffn), (ffn, hidden)])
    shapes = list(dict.fromkeys(found))
    peers = experts_peers(device, args.mode)
    return Work(peers, lambda report, **options: moe.bench_moe(report, shapes, packings, args.m, **options))


def _decode(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    from ropewalk.bench import decode
    from ropewalk.bench.peers.decode import decode_peers

    packings = _packings(args)
    names, root = _models(args, packings, "llama-1b")
    if args.engine:
        return _engine(args, names, packings, root, device, dtype)
    lengths = _lengths(args, tokens=64, batches=[1])

    def run(report: Report, **options: Any) -> None:
        decode.bench_decode(report, names, packings, lengths, root=root, **options)

    return Work(decode_peers(dtype, device, args.mode), run)


def _engine(
    args: argparse.Namespace,
    names: Sequence[str],
    packings: Sequence[Packing],
    root: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> Work:
    import torch

    from ropewalk.bench import engine
    from ropewalk.bench.peers.base import why_missing
    from ropewalk.bench.peers.engines import engine_peers
    from ropewalk.errors import MissingPackageError, UsageError

    if device.index:
        raise UsageError(f"--device: expected cpu or cuda with --engine (CUDA_VISIBLE_DEVICES chooses), found {device}")
    why = why_missing(args.engine)
    if why is not None:
        raise MissingPackageError(f"--engine {args.engine}: {why}; `pip install {args.engine}` brings it")
    lengths = _lengths(args, tokens=32, batches=[1, 8])
    threads = args.threads or torch.get_num_threads()

    def run(report: Report, **options: Any) -> None:
        engine.bench_engine(report, names, packings, lengths, root=root, threads=threads, **options)

    return Work(engine_peers(dtype, device, args.mode), run)


def _lengths(args: argparse.Namespace, tokens: int, batches: Sequence[int]) -> Lengths:
    """Return what --context, --tokens and --batch say, the last two of which have defaults of their own."""
    from ropewalk.bench.decode import Lengths

    contexts, sequences = (tuple(dict.fromkeys(given)) for given in (args.context or [128], args.batch or batches))
    return Lengths(contexts, args.tokens or tokens, sequences)


def _load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    from ropewalk.bench import load
    from ropewalk.bench.shapes import parse_packing
    from ropewalk.errors import UsageError

    if (args.bits, args.group_size, args.desc_act, args.sym) != ([4], [128], None, None):
        raise UsageError("--pack: expected it for load, found --bits, --group-size or the like")
    packings = [parse_packing(name) for name in dict.fromkeys(args.pack or [load.PACKING])]
    names, root = _models(args, packings, load.SHAPE)

    def run(report: Report, **options: Any) -> None:
        load.bench_load(report, names, packings, root=root, runs=args.runs, threads=args.threads, **options)

    return Work(load.load_peers(), run)


def _models(args: argparse.Namespace, packings: Sequence[Packing], default: str) -> tuple[list[str], Path]:
    """Return the models that --shapes names, each of which can be packed so, and where they are kept.

    Raises:
        UsageError: what it names is none, or cannot.
    """
    from ropewalk.bench.model import model_cache
    from ropewalk.bench.shapes import parse_shape

    names = list(dict.fromkeys(args.shapes or [default]))
    for name, packing in itertools.product(names, packings):
        parse_shape(name, packing)
    return names, Path(args.models) if args.models else model_cache()


def _sizes(args: argparse.Namespace, presets: dict[str, list[str]], default: str, form: str) -> list[tuple[int, ...]]:
    """Return the sizes that --shapes names, models replaced by their layers.

    Raises:
        UsageError: neither sizes nor a model that has any.
    """
    names = args.shapes or [default]
    found = [_numbers(name, text, form, presets) for name in names for text in presets.get(name, [name])]
    return list(dict.fromkeys(found))


def _numbers(name: str, text: str, form: str, presets: Iterable[str]) -> tuple[int, ...]:
    """Return the numbers of a text such as 40x40x128.

    Raises:
        UsageError: it has another form.
    """
    from ropewalk.bench.shapes import parse_sizes

    sizes = parse_sizes(text, form.count("x") + 1)
    if sizes is None:
        raise _unknown(name, form, presets)
    return sizes


def _unknown(name: str, form: str, presets: Iterable[str]) -> Exception:
    from ropewalk.errors import UsageError

    return UsageError(f"--shapes: expected {form} or one of {', '.join(presets)}, found {name!r}")


def _packings(args: argparse.Namespace) -> list[Packing]:
    """Return those of --pack, or every combination of the options.

    Raises:
        UsageError: a name in --pack that says nothing.
    """
    from ropewalk.bench.shapes import Packing, parse_packing

    if args.pack:
        return list(dict.fromkeys(map(parse_packing, args.pack)))
    orders, kinds = args.desc_act or [False], args.sym or [True]
    found = [
        Packing(bits, group_size, desc_act, sym)
        for bits, group_size, desc_act, sym in itertools.product(args.bits, args.group_size, orders, kinds)
        # One group has no order to it.
        if not (desc_act and len(orders) > 1 and group_size == -1)
    ]
    return list(dict.fromkeys(found))


def _settings(packings: Sequence[Packing], shapes: Sequence[tuple[int, ...]]) -> list[Setting]:
    """Return each shape in each packing; shapes innermost, so that what there is time for has all of them.

    Raises:
        UsageError: one that the format cannot hold.
    """
    from ropewalk.bench.matmul import Setting
    from ropewalk.errors import FormatError, UsageError
    from ropewalk.gptq.format import expected_tensors

    for packing, (k, n) in itertools.product(packings, shapes):
        try:
            expected_tensors(k, n, packing.bits, packing.group_size)
        except FormatError as error:
            option = f"--bits {packing.bits}, --group-size {packing.group_size}"
            raise UsageError(f"--shapes {k}x{n}, {option}: {error}") from None
    return [Setting(k, n, *packing) for packing in packings for k, n in shapes]
