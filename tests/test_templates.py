"""Prompt templates as the model cards give them."""

import pytest

from ropewalk.errors import UsageError
from ropewalk.templates import TEMPLATES, apply, closed_context


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
    with pytest.raises(UsageError, match="found none; name one of airoboros"):
        apply("Hello", "auto", tokenizer=object())


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=r"airoboros-2.1.*found 'chatml'"):
        apply("Hello", "chatml")
    assert set(TEMPLATES) >= {"airoboros", "airoboros-2.1", "vicuna-1.1", "orca-8k", "llama-2", "alpaca", "chat-ml"}


def test_closed_context():
    block = closed_context(
        "What is blue?", [({"url": "a", "date": "2023"}, "The sky is blue."), ({}, "So is the sea.")]
    )
    assert block == (
        "BEGININPUT\nBEGINCONTEXT\nurl: a\ndate: 2023\nENDCONTEXT\nThe sky is blue.\nENDINPUT\n"
        "BEGININPUT\nBEGINCONTEXT\nENDCONTEXT\nSo is the sea.\nENDINPUT\n"
        "BEGININSTRUCTION\nWhat is blue?\nENDINSTRUCTION"
    )
