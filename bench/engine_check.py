"""Whether what an engine chose is right: its tokens and their probabilities against a float32 model given the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ropewalk.bench.decode_rows import Case
from ropewalk.bench.model import PackedModel
from ropewalk.bench.peers.decode.plain import plain_model
from ropewalk.bench.peers.decode.with_transformers import TransformersDecoder
from ropewalk.bench.report import Row

PROBABLE = 20  # tokens whose probability is checked at each place; vLLM tells no more


class Reference:
    """The model that is right, in float32, and prompts for it.

    Args:
        model: whose weights it has; it unpacks a layer at a time.
    """

    def __init__(self, model: PackedModel, device: torch.device):
        self.vocab = model.shape.vocab
        self._decoder = TransformersDecoder(plain_model(model, torch.float32, device, unpack=False))
        self._known: dict[tuple[int, ...], Tensor] = {}

    def prompts(self, case: Case) -> int:
        """Return how many prompts of a case differ: enough for one sequence to be taken for another."""
        return min(2, case.batch)

    def ids(self, case: Case) -> list[list[int]]:
        """Return the prompts of a case, which take turns among its sequences."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.vocab, (self.prompts(case), case.prompt), generator=generator).tolist()
        return [ids[i % len(ids)] for i in range(case.batch)]

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Return the logits [T, vocabulary] at the places of the tokens that follow a prompt."""
        key = (*prompt, -1, *tokens)
        if key not in self._known:
            ids = [*prompt, *tokens[:-1]]
            self._decoder.start(1, len(ids))
            self._known[key] = self._decoder.logits(torch.tensor([ids]), len(tokens))[0].float().cpu()
            self._decoder.stop()
        return self._known[key]

    def forget(self) -> None:
        """Let go of logits that were kept for the next engine of a case."""
        self._known.clear()


def score(
    prompts: Sequence[Sequence[int]], found: Row, logits: Callable[[Sequence[int], Sequence[int]], Tensor]
) -> tuple[float, float]:
    """Judge what an engine chose.

    Args:
        prompts: of its sequences.
        found: "tokens" and "logprobs", as `engine_worker` tells them.
        logits: returns those that are right, given a prompt and the tokens after it.

    Returns:
        the largest difference of a logarithm of a probability over the largest logit, and which share of the tokens
        is the one that is right. What has not a token of each place, or no number, is off by the largest float32.
    """
    nothing = torch.finfo(torch.float32).max
    error, largest, agreeing = 0.0, 0.0, []
    for prompt, tokens, places in zip(prompts, found["tokens"], found["logprobs"], strict=True):
        if len(tokens) != len(places):
            return nothing, 0.0
        expected = logits(prompt, tokens)
        largest = max(largest, float(expected.abs().max()))
        logarithms = expected.log_softmax(-1)
        for token, right, row, probable in zip(tokens, expected.argmax(-1).tolist(), logarithms, places, strict=True):
            agreeing.append(token == right)
            told = dict(map(tuple, probable))
            off = [abs(value - float(row[at])) for at, value in told.items()]
            # A token is the most probable one by its own account, or it was not chosen greedily.
            if token not in told or told[token] < max(told.values()):
                return nothing, 0.0
            error = max(error, *(each if each < nothing else nothing for each in off))
    return error / largest if error < nothing else nothing, sum(agreeing) / len(agreeing)
