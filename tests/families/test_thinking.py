"""Qwen3's template drops the reasoning of earlier turns; what is trained is always what the model would see."""

from __future__ import annotations

import pytest

from finetune.data.formats.messages import Conversation, Message
from finetune.data.template.chat import ChatTemplate
from finetune.system.errors import DataError
from finetune.system.resources import packaged
from tests.families.tokenizers import build_tokenizer

OWN_TEXTS = packaged("configs") / "templates" / "qwen3.jinja"
THOUGHT = "<think>\nhm\n</think>\n\n4"
EMPTY = "<think>\n\n</think>\n\n"


def row(*turns: str) -> Conversation:
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("qwen3")


def targets(chat: ChatTemplate, tokenizer, conversation: Conversation, train_on: str) -> str:
    [encoded] = chat.encode([conversation], train_on)
    assert not isinstance(encoded, DataError), encoded
    return tokenizer.decode(encoded.ids[encoded.trained])


def test_an_answer_without_reasoning_gets_the_empty_block_of_the_template(tokenizer):
    chat = ChatTemplate(tokenizer)
    assert targets(chat, tokenizer, row("2 + 2?", "4"), "assistant") == f"{EMPTY}4<|im_end|>"
    assert targets(chat, tokenizer, row("2 + 2?", "4"), "answer") == "4<|im_end|>"
    assert tokenizer.decode(chat.prompt_ids(row("2 + 2?").messages)).endswith("<|im_start|>assistant\n")


def test_an_earlier_turn_that_the_template_writes_otherwise_is_refused_unless_only_the_last_is_trained(tokenizer):
    chat, turns = ChatTemplate(tokenizer), row("2 + 2?", "4", "sure?", "yes")
    [error] = chat.encode([turns])
    assert isinstance(error, DataError) and "data.train_on=last" in str(error)
    assert targets(chat, tokenizer, turns, "last") == f"{EMPTY}yes<|im_end|>"


@pytest.mark.parametrize("train_on", ["assistant", "answer", "last"])
def test_texts_that_the_template_takes_apart_are_refused_rather_than_guessed(train_on: str, tokenizer):
    [error] = ChatTemplate(tokenizer).encode([row("2 + 2?", THOUGHT)], train_on)
    assert isinstance(error, DataError) and "data.chat_template" in str(error)


def test_the_packaged_template_trains_every_turn_with_its_reasoning(tokenizer):
    chat = ChatTemplate(tokenizer, OWN_TEXTS.read_text(encoding="utf-8"))
    turns = row("2 + 2?", THOUGHT, "sure?", "yes")
    assert targets(chat, tokenizer, turns, "assistant") == f"{THOUGHT}<|im_end|>yes<|im_end|>"
    assert targets(chat, tokenizer, turns, "answer") == "4<|im_end|>yes<|im_end|>"
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    [encoded] = chat.encode([turns])
    assert [(encoded.ids == tag).sum() for tag in tags] == [1, 1]
    plain = row("2 + 2?", THOUGHT)
    stock = tokenizer.apply_chat_template([m.as_dict() for m in plain.messages], return_dict=False)
    [alone] = chat.encode([plain])
    assert alone.ids.tolist() == stock  # for the last turn both templates agree
