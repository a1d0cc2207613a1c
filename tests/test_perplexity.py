"""Perplexity: which tokens count, and what they count."""

import math

import pytest
import torch

from ropewalk.bench.perplexity import perplexity, windows
from ropewalk.errors import ContextLengthError


class Model:
    """Gives the token two places back half of the probability, where the context reaches so far."""

    device = torch.device("cpu")
    vocabulary = 8

    def __call__(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, self.vocabulary)
        guess = torch.nn.functional.one_hot(ids, self.vocabulary).float() * math.log(self.vocabulary - 1)
        logits[:, 1:] = guess[:, :-1]  # position t guesses for t + 1 what stood at t - 1
        return type("Out", (), {"logits": logits})


def test_windows():
    assert windows(10, 4) == [(0, 3), (4, 3)]
    assert windows(8, 4) == [(0, 3), (4, 3)]
    assert windows(10, 4, stride=2) == [(0, 3), (2, 2), (4, 2), (6, 2)]
    assert windows(3, 4) == []


def test_disjoint_windows_by_hand():
    # a b a b …: from the third token of a window on, the model is right with probability 1/2, before that it has 1/8.
    ids = torch.tensor([1, 2] * 16)
    for context in (4, 8, 32):
        scored = context - 1
        expected = math.exp((math.log(8) + (scored - 1) * math.log(2)) / scored)
        assert perplexity(Model(), ids, context) == pytest.approx(expected, rel=1e-5)


def test_sliding_windows_count_every_token_once():
    ids = torch.tensor([1, 2] * 16)
    expected = math.exp((math.log(8) + 30 * math.log(2)) / 31)
    assert perplexity(Model(), ids, 8, stride=4) == pytest.approx(expected, rel=1e-5)


def test_batches_do_not_matter():
    ids = torch.randint(0, 8, (100,), generator=torch.Generator().manual_seed(0))
    done = []
    one = perplexity(Model(), ids, 10, tokens_per_batch=1, progress=done.append)
    assert sum(done) == 100
    assert one == pytest.approx(perplexity(Model(), ids, 10, tokens_per_batch=1000), rel=1e-6)


def test_impossible_lengths():
    ids = torch.arange(8)
    for context, stride in ((1, None), (9, None), (4, 4), (4, 0)):
        with pytest.raises(ContextLengthError):
            perplexity(Model(), ids, context, stride=stride)
