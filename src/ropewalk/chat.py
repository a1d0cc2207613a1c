"""A conversation with a model: what was said, and as much of it as the context holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ropewalk import templates
from ropewalk.generation import context_length, generate


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        answer: the text, as it was generated.
        prompt_tokens, new_tokens: how many; new ones 0 where the answer was interrupted.
        tokens_per_second: of decoding.
        stopped: "length", "eos", "stop string" or "interrupt".
        dropped: how many of the oldest turns the prompt was without, for want of room.
    """

    answer: str
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    stopped: str
    dropped: int


def choose_template(asked: str, model: str, tokenizer: Any) -> tuple[str | None, str]:
    """Return (a template as `ropewalk.templates.converse` takes it, why that one).

    Args:
        asked: "auto", "none" or a name of `TEMPLATES`.
        model: the model's name or path.
        tokenizer: of transformers.
    """
    if asked != "auto":
        return (None if asked == "none" else asked), "as asked for"
    if getattr(tokenizer, "chat_template", None):
        return "auto", "the tokenizer's own"
    found = templates.by_name(model)
    if found is not None:
        return found, "by the model's name"
    return None, "since neither the tokenizer nor the model's name tells one (--template NAME)"


class Chat:
    """A conversation.

    Args:
        model, tokenizer: of transformers.
        template: as `ropewalk.templates.converse` takes it.
        system: the system text, in place of the template's own.
        stop: strings that end an answer, besides those of the template.
        history: whether a turn knows of those before.
        sampling: as `ropewalk.generation.generate` takes it.

    Attributes:
        context: how many tokens the model's context holds.

    Raises:
        UsageError, CheckpointError: as `converse`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str | None,
        *,
        system: str | None = None,
        stop: list[str] | None = None,
        history: bool = True,
        **sampling: Any,
    ):
        self.model, self.tokenizer, self.template, self.system = model, tokenizer, template, system
        self.history, self.sampling, self.context = history, sampling, context_length(model)
        self.turns: list[tuple[str, str]] = []
        self.stop = [*self._prompt([("", None)])[1], *(stop or [])]

    def reset(self) -> None:
        """Forget what was said."""
        self.turns.clear()

    def answer(self, text: str, on_text: Callable[[str], None] = lambda text: None) -> Reply:
        """Answer what the user says; Ctrl-C ends the answer, and what there is of it counts.

        Args:
            text: what the user says.
            on_text: called with every piece of the answer as it comes.

        Raises:
            ContextLengthError: it alone fills the context. The conversation is as it was then.
        """
        if not self.history:
            self.reset()
        prompt, count, dropped = self._fitting(text)
        pieces: list[str] = []

        def hand_out(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            made = generate(self.model, self.tokenizer, prompt, stop=self.stop, on_text=hand_out, **self.sampling)
            reply = Reply(made.text, count, made.new_tokens, made.tokens_per_second, made.stopped, dropped)
        except KeyboardInterrupt:
            reply = Reply("".join(pieces), count, 0, 0.0, "interrupt", dropped)
        self.turns = [*self.turns[dropped:], (text, reply.answer)]
        return reply

    def _fitting(self, text: str) -> tuple[str, int, int]:
        """Return (prompt, its tokens, how many turns it goes without): an answer has a quarter of the context left, or
        what it may take if that is less.
        """
        room = self.context - min(self.sampling.get("max_new_tokens", 200), self.context // 4)
        for dropped in range(len(self.turns) + 1):
            prompt, _ = self._prompt([*self.turns[dropped:], (text, None)])
            count = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            if count <= room:
                break
        return prompt, count, dropped

    def _prompt(self, turns: list[tuple[str, str | None]] | list[tuple[str, Any]]) -> tuple[str, list[str]]:
        return templates.converse(turns, self.template, system=self.system, tokenizer=self.tokenizer)
