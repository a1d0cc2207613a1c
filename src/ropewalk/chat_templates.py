"""The prompt templates of `ropewalk.templates` as chat templates, which tokenizers of transformers fill in."""

from __future__ import annotations

import json
from typing import Any

from ropewalk.errors import UsageError
from ropewalk.templates import TEMPLATES

# What a template puts between one of the user's texts and the next: the answer, the end of the turn, and how the next
# begins. Most models were trained on many turns in which only the first has the system text.
_NEXT = {
    "airoboros": (" ", "</s> USER: "),
    "airoboros-2.1": (" ", "\nUSER: "),
    "vicuna-1.1": (" ", "</s>USER: "),
    "orca-8k": ("", "</s><|prompter|>"),
    "llama-2": (" ", " </s><s>[INST] "),
    "alpaca": ("", "\n\n### Instruction:\n"),
    "bagel-chat-ml": ("", "\n</s><s>user\n"),
    "chat-ml": ("", "<|im_end|>\n<|im_start|>user\n"),
}


def chat_template(name: str, tokenizer: Any = None) -> str:
    """Return a template of `TEMPLATES` as Jinja, for messages of the roles system (the first, or none), user and
    assistant in turn.

    Args:
        name: of the template.
        tokenizer: of transformers; where it puts a token before every text, as Llama's does, so does the template.

    Raises:
        UsageError: an unknown name.
    """
    if name not in TEMPLATES:
        raise UsageError(f"--template: expected one of {', '.join(TEMPLATES)}, found {name!r}")
    template = TEMPLATES[name]
    before, _, after = template.form.partition("{user}")
    before_system, _, after_system = before.partition("{system}")
    answer, again = _NEXT[name]
    bos = "" if tokenizer is None else _begins_with(tokenizer)
    text = {
        "bos": bos + before_system,
        "system": template.system,
        "after_system": after_system,
        "after": after,
        "answer": answer,
        "again": again,
    }
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in text.items()}
    wrong = json.dumps(f"{name} takes a system text first, if any, and then user and assistant in turn")
    return (
        "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        f"{{%- else %}}{{% set system = {quoted['system']} %}}{{% set turns = messages %}}{{% endif -%}}"
        f"{{{{- {quoted['bos']} + system + {quoted['after_system']} -}}}}"
        "{%- for turn in turns -%}"
        f"{{%- if turn.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}}"
        f"{{{{- raise_exception({wrong}) -}}}}{{%- endif -%}}"
        "{%- if turn.role == 'user' -%}"
        f"{{{{- (turn.content if loop.first else {quoted['again']} + turn.content) + {quoted['after']} -}}}}"
        f"{{%- else -%}}{{{{- {quoted['answer']} + turn.content -}}}}{{%- endif -%}}"
        "{%- endfor -%}"
    )


def _begins_with(tokenizer: Any) -> str:
    """Return what the tokenizer puts before every text."""
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else ""
