"""What the modes of packed layers on the CPU cost in quality: whole models against the same weights in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ropewalk import cpu
from ropewalk.bench.peers.ours import set_mode
from ropewalk.bench.perplexity import perplexity
from ropewalk.bench.report import largest_error
from ropewalk.errors import MissingPackageError
from ropewalk.gptq.cpu_ops import MODES
from ropewalk.gptq.format import dequantize, zeros_v1_to_v2
from ropewalk.loader.halves import HalfLinear
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.terminal import table

REFERENCE = "torch-float32"
# The logits of so many tokens are compared, the first of the text.
WINDOW = 512


class Quality(TypedDict):
    """What a model computes in one mode.

    Its keys: the mode, or REFERENCE; perplexity by length of context; its difference from the reference's, as a share
    of that; the largest difference of any logit from the reference's, and the largest logit.
    """

    mode: str
    perplexity: dict[str, float]
    relative_difference: dict[str, float]
    largest_logit_difference: float
    largest_logit: float


def bench_modes(
    model: Any, ids: Tensor, contexts: Sequence[int], progress: Callable[[int], None] | None = None
) -> list[Quality]:
    """Return the quality of the reference and of each mode.

    All of them read the same tokens and rotate alike; the reference is torch's in every linear layer.

    Args:
        model: a causal language model as `ropewalk.load` returns it, on the CPU in float32. Afterwards its layers are
            those of the reference: two models may be more than fits the memory.
        ids: token numbers [T].
        contexts: lengths of context, none above T.
        progress: called with the number of tokens done.

    Raises:
        MissingPackageError: there are no kernels for the CPU, and so no modes.
        ContextLengthError: a context below 2 or above T.
    """
    if not cpu.load():
        raise MissingPackageError("modes: expected kernels for the CPU, found none (see `ropewalk doctor`)")

    def compute() -> tuple[dict[str, float], Tensor]:
        with torch.inference_mode():
            logits = model(ids[None, :WINDOW], use_cache=False).logits[0]
        return {str(n): perplexity(model, ids, n, progress=progress) for n in contexts}, logits

    found = {}
    for mode in MODES:
        set_mode(model, mode)
        found[mode] = compute()
    unpack(model)
    expected, expected_logits = reference = compute()
    return [
        Quality(
            mode=mode,
            perplexity=values,
            relative_difference={n: value / expected[n] - 1 for n, value in values.items()},
            largest_logit_difference=largest_error(logits, expected_logits),
            largest_logit=float(logits.abs().max()),
        )
        for mode, (values, logits) in {REFERENCE: reference, **found}.items()
    ]


def unpack(model: nn.Module) -> None:
    """Put torch's linear layers with the same weights in float32 in place of packed ones and those of 16 bits."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (QuantLinear, HalfLinear)):
            weight = _dense(layer) if isinstance(layer, QuantLinear) else layer.weight.detach()
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
            model.set_submodule(name, plain)


def _dense(layer: QuantLinear) -> Tensor:
    """Return [N, K] from what the file holds."""
    file = layer.state_dict()
    zeros = file["qzeros"] if layer.checkpoint_format == "gptq_v2" else zeros_v1_to_v2(file["qzeros"], layer.bits)
    dense = dequantize(
        file["qweight"], file["scales"], zeros, file.get("g_idx"), bits=layer.bits, group_size=layer.group_size
    )
    return dense.t().contiguous()


def modes_table(rows: Sequence[Quality]) -> str:
    """Return the rows as text, with differences from the reference in percent."""
    contexts = list(rows[0]["perplexity"])
    head = [cell for n in contexts for cell in (f"context {n}", "difference")]
    lines = [["perplexity", *head, "largest logit", "difference"]]
    for row in rows:
        cells = []
        for n in contexts:
            cells += [f"{row['perplexity'][n]:.4f}", f"{100 * row['relative_difference'][n]:+.4f} %"]
        cells += [f"{row['largest_logit']:.2f}", f"{row['largest_logit_difference']:.2g}"]
        if row["mode"] == REFERENCE:
            cells[1::2] = ["–"] * len(cells[1::2])
        lines.append([row["mode"], *cells])
    return table(lines)
