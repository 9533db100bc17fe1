"""Rows for rewards: the prompt as a model gets it, then the answer of the row, if it has one, as the only targets."""

from __future__ import annotations

import json

import pytest

from finetune.config.schema import DataConfig, ModelConfig, SourceConfig
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.formats.detection import detect_format
from finetune.data.formats.messages import Message
from finetune.data.loader import LoadedData, load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import DataError

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2"},
]


@pytest.fixture(scope="module")
def chat(repo_root) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(ModelConfig(name=str(repo_root / "data/tiny-qwen2.5"))))


@pytest.fixture
def load(chat, tmp_path):
    def load(objective: str, *rows: dict, **settings) -> LoadedData:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = DataConfig(train=[SourceConfig(path=str(file))], cache=str(tmp_path / "cache"), **settings)
        return load_data(Preparation(cfg, chat, objective=objective))

    return load


def prompt_of(document: Document) -> list[int]:
    return document.ids[: document.first_target + 1].tolist()


def targets_of(document: Document, chat: ChatTemplate) -> list[str | None]:
    return [chat.token_of(label) for label in document.labels.tolist() if label != IGNORE_INDEX]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "2+2"}, TURNS[2:]),
        ({"prompt": TURNS, "level": 3}, TURNS),
        ({"messages": TURNS}, TURNS),
        ({"prompt": "2+2", "completion": ""}, TURNS[2:]),
        ({"conversations": [{"from": "human", "value": "2+2"}]}, TURNS[2:]),
    ],
)
def test_a_row_without_an_answer_has_the_end_token_as_its_only_target(load, chat, row, turns):
    [document] = load("reward", row).documents
    assert prompt_of(document) == chat.prompt_ids([Message(**turn) for turn in turns])
    assert targets_of(document, chat) == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": TURNS, "solution": "4"}, TURNS),
        ({"question": "2+2", "answer": "4"}, TURNS[2:]),
        ({"prompt": "2+2", "completion": "4"}, TURNS[2:]),
        ({"messages": [*TURNS, {"role": "assistant", "content": "4"}]}, TURNS),
        ({"messages": [*TURNS, {"role": "assistant", "content": "4", "train": False}]}, TURNS),
        ({"instruction": "2+2", "output": "4"}, TURNS[2:]),
    ],
)
def test_an_answer_follows_its_prompt(load, chat, row, turns):
    [document] = load("reward", row).documents
    assert prompt_of(document) == chat.prompt_ids([Message(**turn) for turn in turns])
    assert targets_of(document, chat) == ["4", "<|im_end|>"]


def test_a_row_has_the_tokens_of_supervised_training_on_its_last_answer(load):
    row = {"messages": [*TURNS, {"role": "assistant", "content": "It is four."}]}
    [judged], [learned] = load("reward", row).documents, load("none", row, train_on="last").documents
    assert judged.ids.tolist() == learned.ids[: len(judged)].tolist()
    assert judged.labels[:-1].tolist() == learned.labels[: len(judged) - 1].tolist()
    assert (learned.labels[len(judged) :] == IGNORE_INDEX).all(), "it ends with a newline that nobody predicts"


def test_a_prompt_holds_no_part_of_an_answer_that_starts_with_a_newline(load, chat):
    [document] = load("reward", {"prompt": "2+2", "completion": "\n4"}).documents
    assert prompt_of(document) == chat.prompt_ids([Message("user", "2+2")])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a pair of answers"),
        ({"text": "words"}, "without turns"),
        ({"input_ids": [1, 2, 3]}, "without turns"),
        ({"prompt": TURNS[:2]}, "end the prompt with a turn"),
        ({"prompt": "q", "completion": "a", "label": False}, "label is false"),
    ],
)
def test_a_row_that_rewards_cannot_use_is_named(load, row, words):
    with pytest.raises(DataError, match=r"rows\.jsonl:1") as error:
        load("reward", row)
    assert words in str(error.value)


@pytest.mark.parametrize("objective", ["none", "dpo", "kto"])
def test_prompts_alone_are_refused_by_other_objectives(load, objective):
    with pytest.raises(DataError, match="prompt"):
        load(objective, {"prompt": "2+2"})


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("prompt", "prompt"),
        ("prompt text", "prompt"),
        ("prompt page_content", "prompt"),
        ("prompt solution", "prompt_completion"),
        ("prompt completion", "prompt_completion"),
        ("prompt messages", "messages"),
        ("prompt chosen rejected", "preference"),
        ("text", "text"),
    ],
)
def test_a_prompt_alone_is_a_format_where_no_other_has_an_answer(columns, format):
    assert detect_format(frozenset(columns.split()), "rows.jsonl", objective="reward") == format


def test_a_mapped_prompt_leaves_the_answer_to_the_functions():
    columns = frozenset({"question", "answer"})
    assert detect_format(columns, "rows.jsonl", {"prompt": "question"}, "reward") == "prompt"


def test_objectives_do_not_share_tokens(load):
    row = {"messages": [*TURNS, {"role": "assistant", "content": "4"}]}
    folders = {load(objective, row).train[0].store.folder for objective in ("none", "reward", "none")}
    assert len(folders) == 2
