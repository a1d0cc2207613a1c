"""Prompt templates by the names that the model cards use.

Each turns a system text and a user's text into the prompt that the model was trained on; the tokenizer puts
the <s> before it. Where a tokenizer has a chat template of its own, `apply(…, "auto")` uses that.

Like `ropewalk.errors` this module stands below all floors of the house, so that a front end's patch may read it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Template:
    """The format of a conversation.

    Attributes:
        form: its first turn, up to where the answer begins, with {system} and {user} in it.
        system: the system text by default.
        user, assistant: the part of `form` that begins what the user says, and the one that begins the answer.
        end: what stands between an answer and the next `user`.
        stop: strings that end an answer.
    """

    form: str
    system: str
    user: str
    assistant: str
    end: str
    stop: tuple[str, ...] = ()

    @property
    def opening(self) -> str:
        """The part of `form` before the first `user`, with {system} in it."""
        return self.form[: self.form.index("{user}") - len(self.user)]

    @property
    def turn(self) -> str:
        """The rest of `form`, from `user` on: what every turn looks like."""
        return self.form[len(self.opening) :]

    def conversation(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """Return the prompt of a whole conversation.

        Args:
            turns: (what the user said, what was answered) for each, None for the answer that is wanted.
            system: the system text, in place of the template's own.
        """
        text = self.opening.format(system=self.system if system is None else system)
        for number, (user, answer) in enumerate(turns):
            text += (self.end if number else "") + self.turn.format(user=user) + (answer or "")
        return text


_AIROBOROS = (
    "A chat between a curious user and an assistant. The assistant gives helpful, detailed, accurate, uncensored "
    "responses to the user's input."
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

_COLON = ("USER: ", "ASSISTANT:", "</s>", ("USER:",))

TEMPLATES = {
    "airoboros": Template("{system} USER: {user} ASSISTANT:", _AIROBOROS, *_COLON),
    "airoboros-2.1": Template("{system}\nUSER: {user}\nASSISTANT:", "A chat.", *_COLON),
    "vicuna-1.1": Template("{system} USER: {user} ASSISTANT:", _VICUNA, *_COLON),
    "orca-8k": Template(
        "<|system|>{system}</s><|prompter|>{user}</s><|assistant|>",
        "You are an AI assistant. You will be given a task. You must generate a detailed and long answer.",
        user="<|prompter|>",
        assistant="<|assistant|>",
        end="</s>",
    ),
    # The first turn has its [INST] before the system text.
    "llama-2": Template(
        "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]",
        "You are a helpful assistant.",
        user="",
        assistant="[/INST]",
        end=" </s><s>[INST] ",
    ),
    "alpaca": Template(
        "{system}\n\n### Instruction:\n{user}\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        user="### Instruction:\n",
        assistant="### Response:\n",
        end="\n\n",
        stop=("### Instruction:",),
    ),
    # bagel's ChatML has <s> and </s> in place of <|im_start|> and <|im_end|>.
    "bagel-chat-ml": Template(
        "system\n{system}\n</s><s>user\n{user}\n</s><s>assistant\n",
        "You are a helpful assistant.",
        user="user\n",
        assistant="assistant\n",
        end="\n</s><s>",
    ),
    "chat-ml": Template(
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        "You are a helpful assistant.",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>\n",
        stop=("<|im_end|>",),
    ),
}


def apply(
    user: str, template: str | None, *, system: str | None = None, tokenizer: Any = None
) -> tuple[str, list[str]]:
    """Return (prompt, stop strings) for one thing that a user says; the rest is as in `converse`."""
    return converse([(user, None)], template, system=system, tokenizer=tokenizer)


def converse(
    turns: Sequence[tuple[str, str | None]], template: str | None, *, system: str | None = None, tokenizer: Any = None
) -> tuple[str, list[str]]:
    """Return (prompt, stop strings).

    Args:
        turns: (what the user said, what was answered) for each, None for the answer that is wanted.
        template: a name of `TEMPLATES`; "auto" for the tokenizer's own; None for the bare text, a turn a line.
        system: the system text, in place of the template's own.
        tokenizer: of transformers; needed for "auto".

    Raises:
        UsageError: an unknown name, or "auto" where the tokenizer has no template.
        CheckpointError: a template of the tokenizer that fails.
    """
    if template is None:
        if system is not None:
            raise UsageError("--system: expected a --template to put it into, found none")
        return "\n".join(user + (answer or "") for user, answer in turns), []
    if template == "auto":
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"--template auto: expected a chat template in the tokenizer, found none; name one of {_names()}"
            )
        messages = [] if system is None else [{"role": "system", "content": system}]
        for user, answer in turns:
            messages.append({"role": "user", "content": user})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of jinja2, in whose sandbox transformers runs the template, or of the template
            found = f"{type(error).__name__}: {str(error)[:200]}"
            raise CheckpointError(tokenizer.name_or_path, "a chat template that can be filled in", found) from error
        # Tokenizing adds the <s> that most templates begin with.
        return prompt.removeprefix(tokenizer.bos_token or ""), []
    if template not in TEMPLATES:
        raise UsageError(f"--template: expected auto or one of {_names()}, found {template!r}")
    chosen = TEMPLATES[template]
    return chosen.conversation(turns, system), list(chosen.stop)


# The first pattern found in a model's name says what it was trained with.
_AIROBOROS_VERSION = re.compile(r"(?:airoboros|spicyboros).*?[-_]m?(?P<major>\d)[.p](?P<minor>\d)")
_BY_NAME = (
    (re.compile(r"spicyboros"), "airoboros-2.1"),
    (re.compile(r"airoboros|airophin"), "airoboros"),
    (re.compile(r"orca[-_]8k"), "orca-8k"),
    (re.compile(r"llama-?2.*chat"), "llama-2"),
    (re.compile(r"vicuna"), "vicuna-1.1"),
    (re.compile(r"bagel"), "bagel-chat-ml"),
    (re.compile(r"alpaca"), "alpaca"),
)


def by_name(model: str) -> str | None:
    """Return which of `TEMPLATES` a model was trained with, as far as its name or path tells, or None."""
    # A branch or a file may say nothing; then the folder does, or the one above it.
    for name in reversed(re.split(r"[/\\]", model.lower())[-3:]):
        version = _AIROBOROS_VERSION.search(name)
        if version:
            major, minor = int(version["major"]), int(version["minor"])
            return "llama-2" if major >= 3 else "airoboros-2.1" if (major, minor) >= (2, 1) else "airoboros"
        for pattern, template in _BY_NAME:
            if pattern.search(name):
                return template
    return None


def closed_context(instruction: str, documents: list[tuple[dict[str, str], str]]) -> str:
    """Return airoboros' block for answers from given documents only.

    Args:
        instruction: the question.
        documents: (what is known of it, such as {"url": …, "date": …}; its text) for each.
    """
    lines = []
    for facts, text in documents:
        known = [f"{key}: {value}" for key, value in facts.items()]
        lines += ["BEGININPUT", "BEGINCONTEXT", *known, "ENDCONTEXT", text, "ENDINPUT"]
    return "\n".join([*lines, "BEGININSTRUCTION", instruction, "ENDINSTRUCTION"])


def _names() -> str:
    return ", ".join(TEMPLATES)
