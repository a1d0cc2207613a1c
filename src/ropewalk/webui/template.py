"""Prompt templates as webui wants them: Jinja over the messages of a conversation."""

from __future__ import annotations

import json

from ropewalk.templates import Template


def jinja(template: Template) -> str:
    """Return a chat template that gives what `Template.conversation` gives; webui puts the <s> before it."""
    before, _, after = template.opening.partition("{system}")
    user, _, answer = template.turn.partition("{user}")
    # Where it says so, the model was trained on a space between the colon and the answer, which webui strips.
    space = " " if answer.endswith((":", "]")) else ""
    names = {"before": before, "system": template.system, "after": after, "user": user, "answer": answer}
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
