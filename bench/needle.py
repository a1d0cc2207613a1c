"""A needle in a haystack: whether a model finds a line again that it has read, by length and depth.

The needle is the line "The word of Moses is gold." with a key and a value drawn at random, hidden in real text
among lines of the same form with other keys. The prompt ends with "The word of Moses is"; right is an answer
whose every token is the model's first choice, which is what greedy decoding would have written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropewalk.bench.perplexity import CHUNK, logits_from
from ropewalk.errors import ContextLengthError, FormatError, UsageError

# Short names of the texts that the small model has read.
KEYS = (
    *("Aaron", "Anne", "Bennet", "Catherine", "Crawford", "Darcy", "David", "Edmund", "Elinor", "Elizabeth", "Elton"),
    *("Emma", "Fanny", "Harriet", "Jacob", "Jane", "John", "Judah", "Knightley", "Marianne", "Moses", "Saul"),
    *("Solomon", "Thomas", "Weston", "Woodhouse"),
)
VALUES = (
    *("altar", "beast", "blood", "body", "book", "bread", "brother", "child", "city", "day", "death", "door", "earth"),
    *("evening", "face", "faith", "family", "father", "field", "fire", "flesh", "friend", "girl", "glory", "gold"),
    *("ground", "hand", "head", "heart", "heaven", "house", "joy", "king", "lady", "land", "law", "letter", "life"),
    *("light", "love", "meat", "morning", "mother", "mouth", "name", "night", "peace", "power", "priest", "prophet"),
    *(
        "room",
        "sea",
        "servant",
        "silver",
        "sister",
        "soul",
        "spirit",
        "sword",
        "truth",
        "uncle",
        "voice",
        "wall",
        "water",
    ),
    *("wind",),
)


class Line(NamedTuple):
    """The tokens of a needle: what the question repeats, the value, and the end of the line."""

    question: tuple[int, ...]
    value: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """All of it."""
        return self.question + self.value + self.end


class Needles:
    """Needles in the tokens of a tokenizer.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        plain, special = self._encode("a"), tokenizer("a")["input_ids"]
        places = (i for i in range(len(special)) if special[i : i + len(plain)] == plain)
        self.begin = special[: next(places, 0)]  # <s>, or nothing

    def line(self, key: str, value: str) -> Line:
        """Return the needle of a key and a value.

        Raises:
            FormatError: a tokenizer that joins the value with what stands around it.
        """
        texts = [f"\nThe word of {key} is", f" {value}", ".\n"]
        parts: list[tuple[int, ...]] = []
        for i in range(3):
            known = [token for part in parts for token in part]
            found = self._encode("".join(texts[: i + 1]))
            if found[: len(known)] != known or len(found) == len(known):
                raise FormatError("tokenizer", f"{texts[i]!r} in tokens of its own behind {texts[i - 1]!r}", "others")
            parts.append(tuple(found[len(known) :]))
        return Line(*parts)

    def draw(self, count: int, generator: torch.Generator) -> list[Line]:
        """Return needles with different keys, at most `len(KEYS)`, and random values."""
        keys = torch.randperm(len(KEYS), generator=generator)[:count].tolist()
        values = torch.randint(len(VALUES), (len(keys),), generator=generator).tolist()
        return [self.line(KEYS[key], VALUES[value]) for key, value in zip(keys, values, strict=True)]


def check_distractors(count: int) -> None:
    """Raise UsageError unless so many distractors have keys of their own."""
    if not 0 <= count < len(KEYS):
        raise UsageError(f"distractors: expected 0 to {len(KEYS) - 1}, found {count}")


def chance(distractors: int) -> dict[str, float]:
    """Return how often guessing is right: among all values, and among those in the prompt."""
    # A line with another key may have the same value.
    lines, same = 1 + distractors, 1 / len(VALUES)
    return {"any_value": same, "value_in_prompt": (1 + distractors * same) / lines}


class Prompts(NamedTuple):
    """Prompts of one length with their answers behind them.

    Attributes:
        tokens: [B, T].
        answers: how many of a row's last tokens are the value.
    """

    tokens: Tensor
    answers: list[int]


def prompts(
    needles: Needles, text: Tensor, length: int, depth: float, count: int, distractors: int, generator: torch.Generator
) -> Prompts:
    """Return `count` prompts of exactly `length` tokens, the value that is asked for included.

    Args:
        needles: lines in the tokens of the model.
        text: tokens [T] of real text; each prompt takes a random piece of it.
        length: in tokens.
        depth: where the needle stands in the text: 0 at its beginning, 1 right before the question.
        count: of prompts.
        distractors: how many other lines stand at random places.
        generator: of all that is random.

    Raises:
        ContextLengthError: a length that does not hold the lines, or a text shorter than it.
        UsageError: more distractors than there are keys.
    """
    check_distractors(distractors)
    rows, answers = [], []
    for _ in range(count):
        asked, *others = needles.draw(1 + distractors, generator)
        tail = asked.question + asked.value
        room = length - len(needles.begin) - len(asked.whole) - len(tail) - sum(len(line.whole) for line in others)
        if room < 0 or room > len(text):
            what = f"at least {length - room}" if room < 0 else f"at most {length - room + len(text)}"
            raise ContextLengthError(f"length: expected {what} tokens for a needle in this text, found {length}")
        start = int(torch.randint(len(text) - room + 1, (), generator=generator))
        places = [round(depth * room), *torch.randint(room + 1, (distractors,), generator=generator).tolist()]
        lines = sorted((at, line.whole) for at, line in zip(places, (asked, *others), strict=True))
        hay = splice(text[start : start + room], lines)
        rows.append(torch.cat([torch.tensor(needles.begin), hay, torch.tensor(tail)]))
        answers.append(len(asked.value))
    return Prompts(torch.stack(rows), answers)


def splice(text: Tensor, lines: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Return text [T] with each of the lines put in at its place, which are in order."""
    pieces, place = [], 0
    for at, line in lines:
        pieces += [text[place:at], torch.tensor(line)]
        place = at
    return torch.cat([*pieces, text[place:]])


@torch.inference_mode()
def retrieve(
    model: Any,
    made: Prompts,
    chunk: int | None = CHUNK,
    tokens_per_batch: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[bool], list[float]]:
    """Return for each prompt whether every token of its value is the likeliest one, and the value's probability.

    Args:
        model: a causal language model of transformers.
        made: the prompts.
        chunk: how many tokens of a prompt are read at once (see `logits_from`).
        tokens_per_batch: how many tokens of prompts go through the model side by side (at least one prompt does).
        progress: called with the number of tokens done after each batch.
    """
    length, most = made.tokens.shape[1], max(made.answers)
    size = max(1, tokens_per_batch // length)
    right: list[bool] = []
    probabilities: list[float] = []
    for tokens, answers in zip(made.tokens.split(size), torch.tensor(made.answers).split(size), strict=True):
        tokens = tokens.to(model.device)
        # The logits of a place are those of the token behind it.
        parts = [part for _, part in logits_from(model, tokens, length - most - 1, chunk)]
        logits = torch.cat(parts, dim=1)[:, :-1].float()
        wanted = tokens[:, -most:]
        asked = torch.arange(most, 0, -1, device=tokens.device) <= answers[:, None].to(tokens.device)
        right += ((logits.argmax(-1) == wanted) | ~asked).all(-1).tolist()
        each = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        probabilities += (each * asked).sum(-1).exp().tolist()
        if progress is not None:
            progress(tokens.numel())
    return right, probabilities
