"""Nothing is left out silently: bad rows are named by file and line, long rows are treated as asked and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.chat import UNTRAINED, ChatTemplate
from finetune.data.loader import describe_source, load_chat_template, load_data
from finetune.data.reader import read_rows, resolve_source
from finetune.errors import DataError
from finetune.resources import packaged


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5"))


def row(question: str = "question", answer: str = "answer") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(folder: Path, *lines: object, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def config(file: Path, **settings) -> DataConfig:
    return DataConfig(train=[SourceConfig(path=str(file))], **settings)


def test_labels_are_shifted_and_the_last_position_predicts_nothing(tmp_path, chat):
    [document] = load_data(config(write(tmp_path, row())), chat).documents
    [encoded] = chat.encode([[*map(_message, row()["messages"])]])
    trained = np.flatnonzero(encoded.trained)
    assert np.array_equal(np.flatnonzero(document.labels != UNTRAINED), trained - 1)
    assert np.array_equal(document.labels[trained - 1], encoded.ids[trained])


def _message(turn: dict):
    from finetune.data.formats import Message

    return Message(turn["role"], turn["content"])


def test_every_bad_row_is_named_at_once_by_file_and_line(tmp_path, chat):
    file = write(tmp_path, row(), "{broken", "", {"messages": []}, "[1]", row(answer=""), row())
    with pytest.raises(DataError) as error:
        load_data(config(file), chat)
    message = str(error.value)
    assert all(f"rows.jsonl:{line}: " in message for line in (2, 4, 5, 6))
    assert "rows.jsonl:1:" not in message and "rows.jsonl:3:" not in message


def test_skipping_bad_rows_is_asked_for_and_counted(tmp_path, chat):
    data = load_data(config(write(tmp_path, row(), "{broken", row()), on_bad_row="skip"), chat)
    assert len(data.documents) == 2
    assert "bad rows skipped: 1" in describe_source(data.train[0])


@pytest.mark.parametrize(("policy", "documents"), [("drop", 0), ("left", 1), ("right", 1), ("split", 3)])
def test_long_rows_are_cut_as_asked_and_counted(tmp_path, chat, policy, documents):
    long = row("q", "a " * 100)
    [encoded] = chat.encode([[*map(_message, long["messages"])]])
    limit = -(-len(encoded.ids) // 3)
    data = load_data(config(write(tmp_path, row(), long), max_length=limit, truncation=policy), chat)
    cut = data.documents[1:]
    assert len(cut) == documents
    assert f"longer than {limit} tokens ({policy}): 1" in describe_source(data.train[0])
    expected = {
        "drop": [], "left": [encoded.ids[-limit:]], "right": [encoded.ids[:limit]],
        "split": [encoded.ids[i : i + limit] for i in range(0, len(encoded.ids), limit)],
    }[policy]  # fmt: skip
    assert all(np.array_equal(document.ids, ids) for document, ids in zip(cut, expected, strict=True))


def test_long_rows_are_an_error_where_that_is_asked(tmp_path, chat):
    with pytest.raises(DataError, match=r"rows.jsonl:1: has \d+ tokens, data.max_length is 4"):
        load_data(config(write(tmp_path, row()), max_length=4, truncation="error"), chat)


def test_a_row_that_loses_all_its_targets_is_an_error(tmp_path, chat):
    with pytest.raises(DataError, match="no target is left within 4 tokens"):
        load_data(config(write(tmp_path, row()), max_length=4, truncation="right"), chat)


def test_limit_reads_the_first_rows_and_system_goes_to_rows_without(tmp_path, chat):
    own = {"messages": [{"role": "system", "content": "mine"}, *row()["messages"]]}
    file = write(tmp_path, row(), own, row())
    cfg = DataConfig(train=[SourceConfig(path=str(file), limit=2)], system="yours")
    [source] = load_data(cfg, chat).train
    assert [c[0].content for c in source.conversations] == ["yours", "mine"]


def test_the_digest_follows_tokens_labels_and_weights(tmp_path, chat):
    def digest(weight: float = 1.0, train_on: str = "assistant", *lines: dict) -> str:
        source = SourceConfig(path=str(write(tmp_path, *(lines or (row(),)))), weight=weight)
        return load_data(DataConfig(train=[source], train_on=train_on), chat).digest

    digests = [digest(), digest(2.0), digest(1.0, "all"), digest(1.0, "assistant", row("other"))]
    assert len(set(digests)) == 4 and digests[0] == digest()


def test_control_tokens_in_contents_are_counted(tmp_path, chat):
    [source] = load_data(config(write(tmp_path, row("<|im_end|> <|im_end|>", "<|im_start|>"))), chat).train
    assert "control tokens kept as text: 3" in describe_source(source)


def test_a_template_file_replaces_the_tokenizers_and_is_kept_by_it(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")
    chosen = load_chat_template(config(tmp_path, chat_template=str(tmp_path / "mine.jinja")), tokenizer)
    assert tokenizer.decode(chosen.prompt_ids([_message(row("hi")["messages"][0])])) == "<|im_start|>user:hi<|im_end|>"
    assert tokenizer.chat_template == template
    with pytest.raises(DataError, match=r"data.chat_template: nowhere.jinja"):
        load_chat_template(config(tmp_path, chat_template="nowhere.jinja"), tokenizer)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        (b'{"a": 1}\n{"a": "\xff"}\n', [{"a": 1}, "is not UTF-8"]),
        (b'{"a": 1}\n{"a": ', [{"a": 1}, "is not JSON"]),
        (b"[" * 100_000 + b"\n", ["is not JSON"]),
        (b"", []),
    ],
)
def test_lines_are_read_as_people_write_them(tmp_path, content, values):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    for read, expected in zip(read_rows(file), values, strict=True):
        if isinstance(expected, str):
            assert isinstance(read.value, DataError) and expected in str(read.value)
        else:
            assert read.value == expected


def test_a_json_file_is_a_list_and_says_so_otherwise(tmp_path):
    (tmp_path / "rows.json").write_text('[{"a": 1}, 2]')
    assert [(r.place.rpartition(":")[2], r.value) for r in read_rows(tmp_path / "rows.json")] == [
        ("row 1", {"a": 1}),
        ("row 2", 2),
    ]
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}')
    with pytest.raises(DataError, match="jsonl"):
        list(read_rows(tmp_path / "rows.json"))


def test_what_a_path_may_name(tmp_path):
    file = write(tmp_path, row(), name="train.jsonl")
    write(tmp_path, row(), name="notes.txt")
    assert resolve_source(str(file), None) == resolve_source(str(tmp_path), "train") == file
    for path, split, complaint in [
        (tmp_path, None, "is a folder; name a file or set split .*train.jsonl"),
        (tmp_path, "test", "has no test.jsonl"),
        (tmp_path / "trian.jsonl", None, "does not exist; .* holds train.jsonl"),
        (file, "train", "has no split 'train'"),
        (tmp_path / "notes.txt", None, "must be a .jsonl or .json"),
    ]:
        with pytest.raises(DataError, match=complaint):
            resolve_source(str(path), split)
