"""A packed stack of experts in plain torch: what the kernels are tested against, and what runs without a GPU.

The weights of E experts, each in the execution layout (layout.py) with rows sorted by its own act-order, lie one
after the other: words int32 [E, word_rows(K, bits), N], scales [E, G, N], zeros uint8 [E, G, N], order int32
[E, K], bias [E, N]. Gate and up of experts whose rows are in one order may share a stack, [E, 2, ...] but for the
order. A token t goes to the experts expert_ids[t]; an id outside 0 to E - 1 belongs to somebody else
and gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

# Returns the weight [K, N] of an expert in the dtype it is multiplied in.
WeightOf = Callable[[int], Tensor]


def packed_experts(
    x: Tensor, weight_of: WeightOf, bias: Tensor | None, expert_ids: Tensor, columns: int, experts: int
) -> Tensor:
    """Return the product of every token with each of its experts.

    Args:
        x: [T, K], or [T, top_k, K] where a token has a row for each of its experts.
        weight_of: called for the experts that have tokens.
        bias: [E, N] or None.
        expert_ids: integers [T, top_k].
        columns, experts: N and E.

    Returns:
        [T, top_k, N] in x's dtype.
    """
    y = x.new_zeros(*expert_ids.shape, columns)
    for expert, token, place in _tokens_of_experts(expert_ids, experts):
        rows = x[token] if x.ndim == 2 else x[token, place]
        y[token, place] = linear(rows, weight_of(expert).t(), None if bias is None else bias[expert].to(x.dtype))
    return y


def packed_experts_grad(
    grad: Tensor, weight_of: WeightOf, expert_ids: Tensor, in_features: int, experts: int
) -> Tensor:
    """Return grad [T, top_k, N] times the transposed weight of each expert: [T, top_k, K] in grad's dtype."""
    out = grad.new_zeros(*expert_ids.shape, in_features)
    for expert, token, place in _tokens_of_experts(expert_ids, experts):
        out[token, place] = linear(grad[token, place], weight_of(expert))
    return out


def both_halves(
    words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Yield gate, then up, of a stack that has both, [E, 2, ...]: (words, scales, zeros, bias) as views."""
    for i in (0, 1):
        yield (
            words[:, i],
            scales[:, i],
            None if zeros is None else zeros[:, i],
            None if bias is None else bias[:, i],
        )


def weighted_sum(y: Tensor, expert_ids: Tensor, routing_weights: Tensor, experts: int) -> Tensor:
    """Return the sum of y [T, top_k, N] over top_k by routing_weights [T, top_k], in float32 and in that order;
    [T, N] in y's dtype.
    """
    total = torch.zeros(y.shape[0], y.shape[2], dtype=torch.float32, device=y.device)
    weights = torch.where(is_here(expert_ids, experts), routing_weights.float(), 0.0)
    for place in range(y.shape[1]):
        total += weights[:, place, None] * y[:, place].float()
    return total.to(y.dtype)


def is_here(expert_ids: Tensor, experts: int) -> Tensor:
    """Tell which ids belong to this stack."""
    return (expert_ids >= 0) & (expert_ids < experts)


def _tokens_of_experts(expert_ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that has tokens, with these and their places among the token's experts."""
    for expert in expert_ids.unique().tolist():
        if 0 <= expert < experts:
            token, place = (expert_ids == expert).nonzero(as_tuple=True)
            yield expert, token, place
