"""The prompt templates of `ropewalk.templates` as Jinja over the messages of a conversation, which tokenizers of
transformers and text-generation-webui fill in.
"""

from __future__ import annotations

import json
from typing import Any

from ropewalk.errors import UsageError
from ropewalk.templates import TEMPLATES, Template


def chat_template(name: str, tokenizer: Any = None) -> str:
    """Return a template of `TEMPLATES` for messages of the roles system (the first, or none), user and assistant in
    turn; others raise an exception where it is filled in.

    Args:
        name: of the template.
        tokenizer: of transformers; where it puts a token before every text, as Llama's does, so does the template.

    Raises:
        UsageError: an unknown name.
    """
    if name not in TEMPLATES:
        raise UsageError(f"--template: expected one of {', '.join(TEMPLATES)}, found {name!r}")
    wrong = json.dumps(f"{name} takes a system text first, if any, and then user and assistant in turn")
    check = (
        "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
        "{%- for turn in turns -%}"
        "{%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
        f"{{{{- raise_exception({wrong}) -}}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
    return check + jinja(TEMPLATES[name], "" if tokenizer is None else _begins_with(tokenizer))


def jinja(template: Template, bos: str = "") -> str:
    """Return what gives what `Template.conversation` gives, with a text before all of it."""
    before, _, after = template.opening.partition("{system}")
    user, _, answer = template.turn.partition("{user}")
    # Where it says so, the model was trained on a space between the colon and the answer, which programs strip.
    space = " " if answer.endswith((":", "]")) else ""
    names = {"before": bos + before, "system": template.system, "after": after, "user": user, "answer": answer}
    text = {name: json.dumps(value, ensure_ascii=False) for name, value in names.items()}
    end, later = json.dumps(template.end), json.dumps(answer + space)
    return (
        f"{{%- set ns = namespace(system={text['system']}, turns=0) -%}}"
        "{%- for message in messages if message['role'] == 'system' -%}"
        "{%- set ns.system = message['content'] -%}"
        "{%- endfor -%}"
        f"{{{{- {text['before']} + ns.system + {text['after']} -}}}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- ({end} if ns.turns else '') + {text['user']} + message['content'] -}}}}"
        "{%- set ns.turns = ns.turns + 1 -%}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- {later} + message['content'] -}}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {text['answer']} -}}}}{{%- endif -%}}"
    )


def _begins_with(tokenizer: Any) -> str:
    """Return what the tokenizer puts before every text."""
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else ""
