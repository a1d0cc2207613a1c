"""What packing costs in quality: a float16 model packed in many ways, each compared with itself in float.

Every variant is quantized once, by GPTQ (which GPTQModel computes) or by rounding to nearest, into a folder that stays.
Then both models compute the same tokens in plain torch and float32, so that what differs is the weights alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from ropewalk.bench.modes import unpack
from ropewalk.bench.perplexity import windows
from ropewalk.bench.shapes import Packing
from ropewalk.errors import CheckpointError, ContextLengthError
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.load import load
from ropewalk.loader.quantize import quantize
from ropewalk.terminal import table

METHODS = ("gptq", "rtn")
BITS = (2, 3, 4, 8)
GROUPS = (32, 128, -1)
# Act-order changes what GPTQ makes of one group, too: the inputs that matter most are rounded first.
PACKINGS = (
    *(Packing(bits, group, act, True) for bits in BITS for group in GROUPS for act in (False, True)),
    *(Packing(bits, 128, True, False) for bits in BITS),
)
SAMPLES = 128  # windows of the calibration text
_PIECE = 4000  # characters; of a text that also calibrates, every fourth piece of this length does


class Variant(NamedTuple):
    """A packing and what computes its codes: "gptq" or "rtn"."""

    packing: Packing
    method: str

    @property
    def name(self) -> str:
        """As its folder is called: 3b-g32-act-gptq."""
        return f"{self.packing.name}-{self.method}"


class Row(TypedDict):
    """What a variant computes; the float model itself has None for what it has not.

    Its keys: how it is packed and by what; bits of a packed weight with scales, zero points and order; the mean over
    positions of KL(float || packed) of the next token's distribution, in nats; the share of positions with the same
    likeliest token; perplexity; how many positions were compared.
    """

    method: str | None
    bits: int | None
    group_size: int | None
    desc_act: bool | None
    sym: bool | None
    bits_per_weight: float
    kl: float
    same_top: float
    perplexity: float
    positions: int


class Texts(NamedTuple):
    """What calibrates, and what is measured."""

    calibration: str
    held_out: str


def variants(packings: Sequence[Packing], methods: Sequence[str]) -> list[Variant]:
    """Return each packing by each method; rounding to nearest treats all inputs alike and has no order to follow."""
    found = [
        Variant(packing._replace(desc_act=packing.desc_act and method == "gptq"), method)
        for method in methods
        for packing in packings
    ]
    return list(dict.fromkeys(found))


def divide(text: str) -> Texts:
    """Return a text's parts where there is no other to calibrate with: every fourth piece of 4000 characters, cut at an
    end of a line, calibrates, and nothing that calibrates is measured.
    """
    pieces: list[str] = []
    for line in text.splitlines(keepends=True):
        if not pieces or len(pieces[-1]) >= _PIECE:
            pieces.append("")
        pieces[-1] += line
    return Texts("".join(pieces[::4]), "".join(piece for i, piece in enumerate(pieces) if i % 4))


def bench_packing(
    folder: Path,
    texts: Texts,
    wanted: Sequence[Variant],
    context: int,
    *,
    root: Path,
    tokens: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Yield a row for the float model, then one for each variant as soon as it is there.

    The logits of the float model stay in memory: 4 bytes for each position and token of the vocabulary.

    Args:
        folder: of the model in float16, with its tokenizer.
        context: tokens of a window; windows do not overlap, and calibration has the same length, at most 2048.
        root: where variants are kept, in a folder for each model and calibration text.
        tokens: use only so many of the held-out ones.
        progress: called with the name of what is quantized or compared next.

    Raises:
        CheckpointError: a model that is packed already, or has no tokenizer.
        ContextLengthError: less text than a window.
        MissingPackageError, UsageError, RopewalkError: what `ropewalk.quantize` raises.
    """
    checkpoint = open_checkpoint(folder)
    if checkpoint.quantize_config is not None:
        raise CheckpointError(folder, "float weights", f"{checkpoint.quantize_config.bits}-bit ones")
    model, tokenizer = load(folder, device_map="cpu", dtype=torch.float32)
    if tokenizer is None:
        raise CheckpointError(folder, "a tokenizer, for the text", "none")
    ids = torch.tensor(tokenizer(texts.held_out, verbose=False)["input_ids"])[:tokens]
    if len(ids) < context:
        raise ContextLengthError(f"text: expected at least one window of {context} tokens, found {len(ids)}")
    progress("float")
    unpack(model)
    reference = list(_logits(model, ids, context))
    yield _row(None, 16.0, reference, reference, ids, context)
    home = root / f"{folder.name}-{_digest(checkpoint, texts.calibration, context)}"
    for variant in wanted:
        progress(variant.name)
        packed = home / variant.name
        if not (packed / "config.json").is_file():  # a folder of this name is always whole
            _quantize(folder, packed, variant, texts, context)
        with _quiet():
            model, _ = load(packed, device_map="cpu", dtype=torch.float32)
        unpack(model)
        bits = _bits_per_weight(open_checkpoint(packed), variant.packing)
        yield _row(variant, bits, _logits(model, ids, context), reference, ids, context)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let our log say nothing but warnings: which rope it is was said when the float model was loaded."""
    log = logging.getLogger("ropewalk")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _quantize(folder: Path, out: Path, variant: Variant, texts: Texts, context: int) -> None:
    quantize(
        folder,
        out,
        **variant.packing._asdict(),
        method=variant.method,
        text=texts.calibration if variant.method == "gptq" else None,
        samples=SAMPLES,
        length=min(context, 2048),
        device="cpu",
    )


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, context: int) -> Iterator[Tensor]:
    """Yield logits [context - 1, V] of each window, at the positions whose next token is in it."""
    for begin, _ in windows(len(ids), context):
        yield model(ids[None, begin : begin + context], use_cache=False).logits[0, :-1].float()


@torch.inference_mode()
def _row(
    variant: Variant | None,
    bits_per_weight: float,
    found: Sequence[Tensor] | Iterator[Tensor],
    expected: Sequence[Tensor],
    ids: Tensor,
    context: int,
) -> Row:
    """Compare logits of the same windows, in float64: at 8 bits little is left of their difference."""
    kl, same, loss, count = 0.0, 0, 0.0, 0
    for (begin, _), ours, theirs in zip(windows(len(ids), context), found, expected, strict=True):
        of_packed, of_float = (log_softmax(logits.double(), -1) for logits in (ours, theirs))
        kl += float((of_float.exp() * (of_float - of_packed)).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        loss += float(cross_entropy(of_packed, ids[begin + 1 : begin + context], reduction="sum"))
        count += len(ours)
    packing = None if variant is None else variant.packing
    return Row(
        method=None if variant is None else variant.method,
        bits=packing and packing.bits,
        group_size=packing and packing.group_size,
        desc_act=None if packing is None else packing.desc_act,
        sym=None if packing is None else packing.sym,
        bits_per_weight=bits_per_weight,
        kl=kl / count,
        same_top=same / count,
        perplexity=math.exp(loss / count),
        positions=count,
    )


def _bits_per_weight(checkpoint: Checkpoint, packing: Packing) -> float:
    """Return the bits that are read for a weight of the packed layers."""
    from ropewalk.bench.known_models import packed_bytes

    layers = checkpoint.layers.values()
    nbytes = sum(packed_bytes(layer.in_features, layer.out_features, packing) for layer in layers)
    return 8 * nbytes / sum(layer.in_features * layer.out_features for layer in layers)


def _digest(checkpoint: Checkpoint, calibration: str, context: int) -> str:
    """Return what tells variants of this model and calibration from others."""
    hashed = hashlib.sha256(f"{SAMPLES} {context} {len(calibration)} {calibration}".encode())
    for file in (checkpoint.folder / "config.json", *sorted(checkpoint.files)):
        with file.open("rb") as stream:
            while data := stream.read(1 << 20):
                hashed.update(data)
    return hashed.hexdigest()[:12]


def packing_table(rows: Sequence[Row]) -> str:
    """Return a line for each row: how it is packed, its bits, KL, share of equal tokens, perplexity and what that is
    more than the float model's.
    """
    lines = [("", "bits a weight", "KL, nats", "same token", "perplexity", "")]
    whole = rows[0]["perplexity"]
    for row in rows:
        more = "" if row["bits"] is None else f"{100 * (row['perplexity'] / whole - 1):+.2f} %"
        figures = (f"{row['kl']:.2g}", f"{100 * row['same_top']:.1f} %", f"{row['perplexity']:.3f}", more)
        lines.append((row_name(row), f"{row['bits_per_weight']:.2f}", *figures))
    return table(lines)


def row_name(row: Row) -> str:
    """Return a row's packing in words: "3 bits, groups of 32, act-order, GPTQ"."""
    return "float16" if row["bits"] is None else f"{row['bits']} bits, {line_name(row)}"


def line_name(row: Row) -> str:
    """Return a row's packing in words, without its bits."""
    groups = "one group" if row["group_size"] == -1 else f"groups of {row['group_size']}"
    order = ", act-order" if row["desc_act"] else ""
    asym = "" if row["sym"] else ", asymmetric"
    return f"{groups}{order}{asym}, {'GPTQ' if row['method'] == 'gptq' else 'to nearest'}"
