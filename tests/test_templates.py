"""Prompt templates as the model cards give them."""

import pytest

from ropewalk.errors import UsageError
from ropewalk.templates import TEMPLATES, apply, by_name, closed_context, converse


@pytest.mark.parametrize(
    ("name", "prompt", "stop"),
    [
        ("airoboros-2.1", "A chat.\nUSER: Hello\nASSISTANT:", ["USER:"]),
        (
            "vicuna-1.1",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: Hello ASSISTANT:",
            ["USER:"],
        ),
        ("llama-2", "[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\nHello [/INST]", []),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nHello\n\n### Response:\n",
            ["### Instruction:"],
        ),
        ("bagel-chat-ml", "system\nYou are a helpful assistant.\n</s><s>user\nHello\n</s><s>assistant\n", []),
    ],
)
def test_forms(name, prompt, stop):
    assert apply("Hello", name) == (prompt, stop)


def test_a_system_text_takes_the_place_of_the_templates_own():
    prompt, _ = apply("Hi", "orca-8k", system="Be brief.")
    assert prompt == "<|system|>Be brief.</s><|prompter|>Hi</s><|assistant|>"
    assert apply("{user} {system}", "alpaca")[0].count("{user} {system}") == 1  # text is never read as a form


def test_no_template():
    assert apply("Hello", None) == ("Hello", [])
    with pytest.raises(UsageError, match="--template"):
        apply("Hello", None, system="x")


def test_the_tokenizers_own():
    class Tokenizer:
        chat_template = "yes"
        bos_token = "<s>"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            assert not tokenize
            assert add_generation_prompt
            return "<s>" + "|".join(f"{m['role']}:{m['content']}" for m in messages)

    assert apply("Hello", "auto", tokenizer=Tokenizer()) == ("user:Hello", [])
    assert apply("Hello", "auto", system="Be", tokenizer=Tokenizer()) == ("system:Be|user:Hello", [])
    turns = [("Hi", "Ho"), ("Why?", None)]
    assert converse(turns, "auto", tokenizer=Tokenizer()) == ("user:Hi|assistant:Ho|user:Why?", [])
    with pytest.raises(UsageError, match="found none; name one of airoboros"):
        apply("Hello", "auto", tokenizer=object())


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=r"airoboros-2.1.*found 'chatml'"):
        apply("Hello", "chatml")
    assert set(TEMPLATES) >= {"airoboros", "airoboros-2.1", "vicuna-1.1", "orca-8k", "llama-2", "alpaca", "chat-ml"}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("airoboros-2.1", "A chat.\nUSER: Hi\nASSISTANT: Ho</s>USER: Why?\nASSISTANT:"),
        ("orca-8k", "<|system|>A chat.</s><|prompter|>Hi</s><|assistant|> Ho</s><|prompter|>Why?</s><|assistant|>"),
        ("llama-2", "[INST] <<SYS>>\nA chat.\n<</SYS>>\n\nHi [/INST] Ho </s><s>[INST] Why? [/INST]"),
        (
            "bagel-chat-ml",
            "system\nA chat.\n</s><s>user\nHi\n</s><s>assistant\n Ho\n</s><s>user\nWhy?\n</s><s>assistant\n",
        ),
        (
            "alpaca",
            "A chat.\n\n### Instruction:\nHi\n\n### Response:\n Ho\n\n### Instruction:\nWhy?\n\n### Response:\n",
        ),
    ],
)
def test_conversations(name, prompt):
    turns = [("Hi", " Ho"), ("Why?", None)]
    assert converse(turns, name, system="A chat.")[0] == prompt
    assert converse(turns, None) == ("Hi Ho\nWhy?", [])
    assert converse([("{system}", "{user}"), ("Why?", None)], name)[0].count("{") == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_parts_of_a_template_are_its_form(name):
    template = TEMPLATES[name]
    assert template.opening + template.turn == template.form
    assert template.turn.startswith(f"{template.user}{{user}}")
    assert template.turn.endswith(template.assistant)
    assert "{system}" in template.opening


@pytest.mark.parametrize(
    ("model", "template"),
    [
        ("TheBloke/Airoboros-c34B-2.1-GPTQ:gptq-4bit-32g-actorder_True", "airoboros-2.1"),
        ("models/airoboros-33B-gpt4-1.4-GPTQ/gptq_model-4bit-32g.safetensors", "airoboros"),
        ("C:\\models\\airophin-13b-pntk-16k-GPTQ", "airoboros"),
        ("jondurbin/airoboros-m-7b-3.1.2", "llama-2"),
        ("jondurbin/bagel-8x7b-v0.2", "bagel-chat-ml"),
        ("demo", None),
    ],
)
def test_a_models_name_tells_its_template(model, template):
    assert by_name(model) == template


def test_closed_context():
    block = closed_context(
        "What is blue?", [({"url": "a", "date": "2023"}, "The sky is blue."), ({}, "So is the sea.")]
    )
    assert block == (
        "BEGININPUT\nBEGINCONTEXT\nurl: a\ndate: 2023\nENDCONTEXT\nThe sky is blue.\nENDINPUT\n"
        "BEGININPUT\nBEGINCONTEXT\nENDCONTEXT\nSo is the sea.\nENDINPUT\n"
        "BEGININSTRUCTION\nWhat is blue?\nENDINSTRUCTION"
    )
