"""What is said of a program that decoded: rows, tables, and where the time of ours goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.decode.base import Decoder, ModelProgram
from ropewalk.bench.peers.decode.with_transformers import TransformersDecoder
from ropewalk.bench.peers.ours import OURS
from ropewalk.bench.report import Report, Row, computes, duration, verdict
from ropewalk.bench.timing import Timing
from ropewalk.loader.experts import PackedExperts
from ropewalk.loader.fuse import is_fused
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.terminal import size, table

CHECKED = 8  # tokens after the prompt whose logits are compared, besides those of its last one

# Largest error of logits over the largest logit. What rounds activations to 8 bits in each of 22 layers of random
# weights is off by 0.05 (llama.cpp), and bfloat16 by 0.03; a model that computes something else by 0.4 and more.
MOST = 0.1


@dataclass(frozen=True)
class Case:
    """What is decoded: `tokens` for each of `batch` sequences, with `context` tokens in the cache before, of which the
    last `prompt` are read.
    """

    context: int
    prompt: int
    batch: int
    tokens: int

    @property
    def filled(self) -> int:
        """Tokens before the prompt."""
        return self.context - self.prompt

    @property
    def capacity(self) -> int:
        """Tokens that the cache must hold."""
        return self.context + max(self.tokens, CHECKED)

    @property
    def average(self) -> float:
        """Tokens that are there already when one is decoded, on average."""
        return self.context + (self.tokens - 1) / 2


@dataclass
class Measured:
    """What was measured of a program in a case.

    Attributes:
        nbytes: memory that the model and, at the peak, the case took.
        prompt: int64 [B, T].
        error, agreeing: of the logits against those that are right.
        filled_by: what lies before the prompt, "keys" or "tokens".
        steps, prefills: seconds of a step, and of reading the prompt.
        note: what the program is made of, for a person.
    """

    dtype: torch.dtype
    nbytes: int
    prompt: Tensor
    case: Case
    error: float = 0.0
    agreeing: float = 0.0
    filled_by: str = "keys"
    steps: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    note: str = ""


@dataclass
class Timed(Measured):
    """A decoder in a case, and what was measured of it."""

    decoder: Decoder = field(kw_only=True)

    def decode(self) -> float:
        """Read the prompt and decode greedily; return the seconds of a step, by the median."""
        self.decoder.rewind(self.case.filled)
        begin = time.perf_counter()
        tokens = self.decoder.prefill(self.prompt).argmax(-1).cpu()  # reading the numbers waits for a GPU
        self.prefills.append(time.perf_counter() - begin)
        steps = []
        for _ in range(self.case.tokens):
            begin = time.perf_counter()
            tokens = self.decoder.step(tokens).argmax(-1).cpu()
            steps.append(time.perf_counter() - begin)
        self.steps += steps
        return Timing.of(steps).seconds


def decode_row(
    report: Report, model: PackedModel, peer: ModelProgram, one: Measured, case: Case, tolerance: float
) -> Row:
    """Return the row of a program in a case; times are of a token, of which a step gives one for each sequence."""
    step, prefill = Timing.of(one.steps), Timing.of(one.prefills)
    nbytes = peer.nbytes(model, one.dtype, case.average, case.batch)
    least, bound = report.limits.least_seconds(nbytes, operations(model, case))
    row: Row = {
        "kernel": peer.name,
        "device": str(report.device),
        "model": model.name,
        **model.packing._asdict(),
        "dtype": str(one.dtype).removeprefix("torch."),
        "context": case.context,
        "batch": case.batch,
        "prompt_tokens": case.prompt,
        "tokens": case.tokens,
        "seconds_per_token": step.seconds / case.batch,
        "seconds_per_step": step.seconds,
        "tokens_per_s": case.batch / step.seconds,
        "prefill_tokens_per_s": case.batch * case.prompt / prefill.seconds,
        "gb_per_s": nbytes / step.seconds / 1e9,
        "share_of_limit": least / step.seconds,
        "limit_tokens_per_s": case.batch / least,
        "bound": bound,
        "token_bytes": nbytes,
        "kv_bytes": case.batch * model.shape.kv_bytes(case.context, one.dtype.itemsize),
        "peak_bytes": one.nbytes,
        "max_error": one.error,
        "ratio_to": {},
        "verdict": verdict(one.error, tolerance, 1.0, MOST),
        "tolerance": tolerance,
        "same_choice": one.agreeing,
        "p20": step.p20 / case.batch,
        "p80": step.p80 / case.batch,
        "samples": step.samples,
        "mode": peer.mode,
        "filled_by": one.filled_by if case.filled else None,
        "note": one.note,
    }
    decoder: Any = one.decoder if isinstance(one, Timed) else None
    ours = peer.name.startswith(OURS) and isinstance(decoder, TransformersDecoder) and not decoder.compiled
    # A fused layer that is watched is not fused, so that looking at its parts would change them.
    if ours and not is_fused(decoder.model):
        row["time_in"] = time_in(decoder, one.prompt, min(case.tokens, 16), case.filled)
    return row


def operations(model: PackedModel, case: Case) -> float:
    """Return how many operations a step takes: two for each weight of each token, and those of attention."""
    shape = model.shape
    attention = 4 * case.average * shape.layers * shape.heads * shape.head_dim
    return case.batch * (2 * shape.dense_count() + attention)


def time_in(decoder: TransformersDecoder, prompt: Tensor, tokens: int, filled: int = 0) -> dict[str, float]:
    """Return which share of a step's time is spent in packed layers, in the output embedding, and elsewhere.

    What it takes to look at the clock counts as elsewhere; that is about 2 µs for each layer.

    Args:
        prompt: int64 [B, T].
        tokens: how many steps.
        filled: tokens before the prompt, which are in the cache.
    """
    spent = {"packed": 0.0, "lm_head": 0.0}
    device = decoder.model.device
    head = decoder.model.get_output_embeddings()
    begun = [0.0]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(module: Any, inputs: Any) -> None:
        begun[0] = now()

    def after(module: Any, inputs: Any, output: Any) -> None:
        spent["lm_head" if module is head else "packed"] += now() - begun[0]

    with _hooks([head, *_packed(decoder.model)], before, after):
        decoder.rewind(filled)
        chosen = decoder.prefill(prompt).argmax(-1)
        spent.update(packed=0.0, lm_head=0.0)
        begin = now()
        for _ in range(tokens):
            chosen = decoder.step(chosen).argmax(-1)
        total = now() - begin
    shares = {name: seconds / total for name, seconds in spent.items()}
    return {**shares, "elsewhere": 1 - sum(shares.values())}


def _packed(module: Any) -> Iterator[Any]:
    """Yield packed layers, experts that are computed together as one of them."""
    for child in module.children():
        if isinstance(child, (QuantLinear, PackedExperts)):
            yield child
        else:
            yield from _packed(child)


@contextmanager
def _hooks(modules: Sequence[Any], before: Any, after: Any) -> Iterator[None]:
    handles = []
    for module in modules:
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decode_table(rows: Sequence[Row], ours: str) -> str:
    """Return the rows of one case as a table, a line for each program."""
    lead: dict[str, float] = next((row["ratio_to"] for row in rows if row["kernel"] == ours), {})
    heads = ("tokens/s", "a token", "p20", "p80", "of limit", "prompt/s", "memory", "max error")
    lines = [("", "dtype", *heads, "", f"{ours} is")]
    for row in rows:
        ratio, peak = lead.get(row["kernel"]), row.get("peak_bytes")
        lines.append(
            (
                row["kernel"],
                computes(row),
                f"{row['tokens_per_s']:.3g}",
                *(duration(row[key]) for key in ("seconds_per_token", "p20", "p80")),
                f"{row['share_of_limit']:.2f}",
                f"{row['prefill_tokens_per_s']:.3g}",
                "" if peak is None else size(peak),
                f"{row['max_error']:.1e}",
                {"wrong": "WRONG"}.get(row["verdict"], row["verdict"]),
                "" if ratio is None else f"{ratio:.2f}x as fast",
            )
        )
    return table(lines)


def decode_lines(rows: Sequence[Row], ours: str) -> list[str]:
    """Return what there is to say of a case besides the table: the limit, and where the time of ours goes."""
    lines = []
    for row in rows:
        if row["kernel"] == ours:
            limit = f"{row['limit_tokens_per_s']:.3g} tokens/s; {ours} reaches {row['share_of_limit']:.0%} of that"
            allows = "arithmetic" if row.get("bound") == "flops" else "the memory"
            cache = f", {size(int(row['kv_bytes']))} of it keys and values" if row.get("kv_bytes") else ""
            lines.append(f"a step reads {size(int(row['token_bytes']))}{cache}, and {allows} allows {limit}")
        if "time_in" in row:
            shares = {"packed layers": "packed", "the output embedding": "lm_head", "everything else": "elsewhere"}
            parts = ", ".join(f"{row['time_in'][key]:.0%} in {name}" for name, key in shares.items())
            lines.append(f"a token of {row['kernel']} spends {parts}")
    return lines
