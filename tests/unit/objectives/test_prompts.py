"""Documents find what their rows say beside tokens, whatever was filtered, limited, skipped or held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.schema import DataConfig, ModelConfig, SourceConfig
from finetune.data.loader import LoadedData, load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.models.tokenizer import load_tokenizer
from finetune.objectives.prompts import Prompts, read_prompts


@pytest.fixture(scope="module")
def chat(repo_root) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(ModelConfig(name=str(repo_root / "data/tiny-qwen2.5"))))


def write(folder: Path, name: str, *rows: object) -> Path:
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def read(chat: ChatTemplate, folder: Path, *sources: SourceConfig, **settings) -> tuple[LoadedData, Prompts]:
    cfg = DataConfig(train=list(sources), cache=str(folder / "cache"), **settings)
    preparation = Preparation(cfg, chat, objective="reward")
    data = load_data(preparation)
    return data, read_prompts([*data.train, *data.eval], preparation)


def question(number: int, answer: str | None = None, **columns) -> dict:
    return {"prompt": f"Number {number}", **({} if answer is None else {"completion": answer}), **columns}


def test_messages_answer_and_every_column_come_from_the_row(chat, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    row = {"messages": [*turns, {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}], "level": 3}
    file = write(tmp_path, "rows.jsonl", row)
    data, prompts = read(chat, tmp_path, SourceConfig(path=str(file)), system="Be short.")
    found = prompts.of(data.documents[0])
    system = {"role": "system", "content": "Be short."}
    assert found.messages == [system, *turns, {"role": "user", "content": "2+2"}]
    assert (found.expected, found.columns, found.location) == ("4", row, f"{file}:1")


def test_each_document_finds_its_own_row_in_every_source_and_split(chat, tmp_path):
    long = question(98, "word " * 300, id=98)
    first = write(tmp_path, "a.jsonl", *(question(i, f"{i}", id=i) for i in range(40)), "{broken", long, question(99))
    second = write(tmp_path, "b.jsonl", *(question(i, id=1000 + i) for i in range(10)), *(["{broken"] * 2))
    limited = SourceConfig(path=str(second), limit=7, weight=2.0)
    options = {"held_out": 0.3, "on_bad_row": "skip", "max_bad_share": 0.5, "max_length": 120}
    data, prompts = read(chat, tmp_path, SourceConfig(path=str(first), limit=42), limited, **options)
    documents = list(data.every_document)
    assert len(documents) == len(prompts) == 47
    assert len(data.eval) == 2
    assert sorted(prompts.of(document).columns["id"] for document in documents) == [*range(40), *range(1000, 1007)]
    for document in documents:
        prompt = prompts.of(document)
        tokens = chat.decode(document.ids[: document.first_target + 1])
        assert prompt.messages[0]["content"] == f"Number {prompt.columns['id'] % 1000}"
        assert prompt.messages[0]["content"] in tokens
        assert prompt.expected == chat.decode(document.ids[document.first_target + 1 :])
        assert prompt.location == document.location


def test_one_file_read_in_two_ways_gives_two_prompts(chat, tmp_path):
    file = write(tmp_path, "rows.jsonl", {"question": "2+2", "answer": "4", "other": "3+3"})
    ways = [{"prompt": name, "completion": "answer"} for name in ("question", "other")]
    data, prompts = read(chat, tmp_path, *(SourceConfig(path=str(file), columns=way) for way in ways))
    found = [prompts.of(document).messages[0]["content"] for document in data.documents]
    assert found == ["2+2", "3+3"]
