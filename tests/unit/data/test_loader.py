"""No row is lost silently: bad rows are named by file and line, long rows are truncated and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.formats.messages import Conversation, Message
from finetune.data.loader import (
    LoadedData,
    copy_bad_rows,
    describe_leaks,
    describe_source,
    first_conversations,
    load_chat_template,
    load_data,
)
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.system.errors import DataError
from finetune.system.resources import packaged


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


def load(cfg: DataConfig, chat: ChatTemplate) -> LoadedData:
    return load_data(Preparation(cfg, chat))


def test_every_bad_row_is_named_at_once_by_file_and_line(tmp_path, chat):
    file = write(tmp_path, row(), "{broken", "", {"messages": []}, "[1]", row(answer=""), row())
    with pytest.raises(DataError) as error:
        load(config(file), chat)
    message = str(error.value)
    assert all(f"rows.jsonl:{line}: " in message for line in (2, 4, 5, 6))
    assert "rows.jsonl:1:" not in message and "rows.jsonl:3:" not in message


def test_skipped_bad_rows_are_counted(tmp_path, chat):
    data = load(config(write(tmp_path, row(), "{broken", row()), on_bad_row="skip", max_bad_share=0.5), chat)
    assert len(data.documents) == 2
    assert "bad rows skipped: 1" in describe_source(data.train[0])


@pytest.mark.parametrize("workers", [None, 1])
def test_answers_that_are_numbers_are_trained_as_text_and_counted(tmp_path, chat, workers):
    rows = [{"prompt": "q", "completion": answer} for answer in (4, True, "x")]
    texts = [{"prompt": "q", "completion": answer} for answer in ("4", "true", "x")]
    data = load(config(write(tmp_path, *rows), workers=workers), chat)
    assert "numbers or booleans, read as text: 2" in describe_source(data.train[0])
    assert data.digest == load(config(write(tmp_path, *texts, name="texts.jsonl")), chat).digest


@pytest.mark.parametrize(("policy", "documents"), [("drop", 0), ("left", 1), ("right", 1), ("split", 3)])
def test_long_rows_are_truncated_and_counted(tmp_path, chat, policy, documents):
    long = row("q", "a " * 100)
    [encoded] = chat.encode([Conversation(tuple(Message(**m) for m in long["messages"]))])
    limit = -(-len(encoded.ids) // 3)
    data = load(config(write(tmp_path, row(), long), max_length=limit, truncation=policy), chat)
    cut = data.documents[1:]
    assert len(cut) == documents
    assert f"longer than {limit} tokens ({policy}): 1" in describe_source(data.train[0])
    expected = {
        "drop": [],
        "left": [encoded.ids[-limit:]],
        "right": [encoded.ids[:limit]],
        "split": [encoded.ids[i : i + limit] for i in range(0, len(encoded.ids), limit)],
    }[policy]
    assert all(np.array_equal(document.ids, ids) for document, ids in zip(cut, expected, strict=True))


def test_long_rows_are_an_error_under_truncation_error(tmp_path, chat):
    with pytest.raises(DataError, match=r"longer than data.max_length=4; raise it .*\n  .*rows.jsonl:1: \d+ tokens"):
        load(config(write(tmp_path, row()), max_length=4, truncation="error"), chat)


def test_a_row_that_loses_all_its_targets_is_an_error(tmp_path, chat):
    file = write(tmp_path, row("word " * 100), row())
    settings = {"max_length": len(load(config(file), chat).documents[1]), "truncation": "right"}
    with pytest.raises(DataError, match=r"1 rows are without a target within .*\n  .*rows.jsonl:1: "):
        load(config(file, **settings), chat)
    data = load(config(file, on_bad_row="skip", **settings), chat)
    assert [document.row for document in data.documents] == [1]
    assert "left without a target: 1" in describe_source(data.train[0])


def test_limit_reads_the_first_rows_and_system_goes_to_rows_without(tmp_path, chat):
    own = {"messages": [{"role": "system", "content": "mine"}, *row()["messages"]]}
    cfg = DataConfig(train=[SourceConfig(path=str(write(tmp_path, row(), own, row())), limit=2)], system="yours")
    [source] = load(cfg, chat).train
    conversations = first_conversations(source, Preparation(cfg, chat), 5)
    assert [c.messages[0].content for c in conversations] == ["yours", "mine"]


def test_the_digest_follows_tokens_labels_and_weights_and_not_the_files(tmp_path, chat):
    def digest(*lines: dict, weight: float = 1.0, train_on: str = "assistant", name: str = "rows.jsonl") -> str:
        source = SourceConfig(path=str(write(tmp_path, *(lines or (row(),)), name=name)), weight=weight)
        return load(DataConfig(train=[source], train_on=train_on), chat).digest

    digests = [digest(), digest(weight=2.0), digest(train_on="all"), digest(row("other"))]
    assert len(set(digests)) == 4
    assert digest() == digest(name="elsewhere.jsonl") == digests[0]


def test_control_tokens_in_contents_are_counted(tmp_path, chat):
    [source] = load(config(write(tmp_path, row("<|im_end|> <|im_end|>", "<|im_start|>"))), chat).train
    assert "control tokens kept as text: 3" in describe_source(source)


def test_a_template_file_replaces_the_tokenizers_and_is_kept_by_it(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")
    chosen = load_chat_template(config(tmp_path, chat_template=str(tmp_path / "mine.jinja")), tokenizer)
    assert tokenizer.decode(chosen.prompt_ids([Message("user", "hi")])) == "<|im_start|>user:hi<|im_end|>"
    assert tokenizer.chat_template == template
    with pytest.raises(DataError, match=r"data.chat_template: nowhere.jinja"):
        load_chat_template(config(tmp_path, chat_template="nowhere.jinja"), tokenizer)


def rows_of(source) -> set[int]:
    return set(source.store.indices[source.rows].tolist())


def test_other_rows_never_move_a_held_out_row_and_equal_rows_stay_together(tmp_path, chat):
    few = [row(f"question {i}") for i in range(60)]
    more = [row(f"other {i}") for i in range(40)]

    def sides(*lines: dict) -> tuple[dict[str, str], LoadedData]:
        data = load(config(write(tmp_path, *lines), held_out=0.3), chat)
        [train], [held] = data.train, data.eval
        assert rows_of(train) | rows_of(held) == set(range(len(lines)))
        assert not rows_of(train) & rows_of(held)
        return {
            lines[i]["messages"][0]["content"]: side
            for side, source in (("train", train), ("held out", held))
            for i in rows_of(source)
        }, data

    before, data = sides(*few)
    after, _ = sides(*more[:20], *few[::-1], *more[20:])
    assert {text: after[text] for text in before} == before
    # 60 draws at 0.3: the chance to be outside is one in a million.
    assert 4 <= sum(side == "held out" for side in before.values()) <= 36
    assert data.eval[0].name == "held_out" and describe_leaks(data) == []
    doubled, _ = sides(*few, *few)
    assert doubled == before


def test_a_held_out_share_that_keeps_no_row_is_an_error(tmp_path, chat):
    with pytest.raises(DataError, match=r"data.held_out=0.001 keeps none of the 1 training rows"):
        load(config(write(tmp_path, row()), held_out=0.001), chat)


def test_a_source_too_small_for_held_out_rows_is_no_error_beside_others(tmp_path, chat):
    one, many = write(tmp_path, row("alone"), name="one.jsonl"), write(tmp_path, *(row(f"{i}") for i in range(60)))
    cfg = DataConfig(train=[SourceConfig(path=str(one)), SourceConfig(path=str(many))], held_out=0.1)
    data = load(cfg, chat)
    assert [source.name for source in data.eval] == ["held_out-rows"]
    assert len(rows_of(data.train[0])) == 1


def test_training_rows_in_an_evaluation_set_are_reported(tmp_path, chat):
    train, held = write(tmp_path, row("a"), row("b")), write(tmp_path, row("b"), row("c"), name="held.jsonl")
    cfg = DataConfig(train=[SourceConfig(path=str(train))], eval=[SourceConfig(path=str(held))])
    [leak] = describe_leaks(load(cfg, chat))
    assert "held: 1 of its 2 rows" in leak


def test_too_many_skipped_bad_rows_are_an_error(tmp_path, chat):
    file = write(tmp_path, *["{broken"] * 2, *[row()] * 18)
    with pytest.raises(DataError, match=r"2 of 20 rows are bad \(10.0%\), data.max_bad_share allows 5.0%"):
        load(config(file, on_bad_row="skip"), chat)
    data = load(config(file, on_bad_row="skip", max_bad_share=0.1), chat)
    listed = copy_bad_rows(data, tmp_path)
    assert [json.loads(line)["place"] for line in listed.read_text().splitlines()] == [f"{file}:1", f"{file}:2"]
    assert copy_bad_rows(load(config(write(tmp_path, row(), name="good.jsonl")), chat), tmp_path) is None


def test_each_file_of_a_source_has_the_format_of_its_own_rows(tmp_path, chat):
    alpaca = {"instruction": "question", "output": "answer"}
    one = write(tmp_path, row(), name="a.jsonl")
    two = write(tmp_path, "{broken", alpaca, alpaca, name="b.jsonl")
    write(tmp_path, {"unknown": 1}, row(), name="c.jsonl")
    cfg = DataConfig(train=[SourceConfig(path=f"{tmp_path}/*.jsonl", name="all")], on_bad_row="skip", max_bad_share=0.5)
    [source] = load(cfg, chat).train
    assert source.store.meta.formats == ["messages", "alpaca", "messages"]
    assert "format=messages (a.jsonl, c.jsonl), alpaca (b.jsonl)" in describe_source(source)
    single = [load(config(file, on_bad_row="skip", max_bad_share=0.5), chat).train[0] for file in (one, two)]
    pieces = [part.store[i].ids.tolist() for part in single for i in range(len(part.store))]
    assert [source.store[i].ids.tolist() for i in range(3)] == pieces and len(source.store) == 4
    listed = [json.loads(line)["place"] for line in source.store.bad_rows.read_text().splitlines()]
    assert listed == [f"{two}:1", f"{tmp_path / 'c.jsonl'}:1"]
    assert (
        first_conversations(source, Preparation(cfg, chat), 9)[1].messages
        == first_conversations(single[1], Preparation(cfg, chat), 1)[0].messages
    )


def test_a_given_format_is_that_of_every_file(tmp_path, chat):
    write(tmp_path, row(), name="a.jsonl")
    bad = write(tmp_path, {"instruction": "question", "output": "answer"}, name="b.jsonl")
    with pytest.raises(DataError, match=f"{bad}:1: "):
        load(DataConfig(train=[SourceConfig(path=f"{tmp_path}/*.jsonl", format="messages")]), chat)


def test_every_format_reaches_the_tokens(tmp_path, chat):
    sources = {
        "messages": row(),
        "alpaca": {"instruction": "question", "output": "answer"},
        "sharegpt": {"conversations": [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]},
        "prompt_completion": {"prompt": "question", "completion": "answer"},
    }
    loaded = {name: load(config(write(tmp_path, line, name=f"{name}.jsonl")), chat) for name, line in sources.items()}
    assert {name: data.train[0].store.meta.format() for name, data in loaded.items()} == {
        name: name for name in sources
    }
    assert len({data.digest for data in loaded.values()}) == 1
    [text] = load(config(write(tmp_path, {"text": "once upon"}, name="text.jsonl")), chat).documents
    assert text.ids.tolist() == [*chat.encode_texts(["once upon"])[0], chat.end_of_text_id]
    assert text.labels.tolist() == [*text.ids[1:], -100]
    tokens = {"input_ids": text.ids.tolist(), "labels": [-100, *text.ids[1:].tolist()]}
    [again] = load(config(write(tmp_path, tokens, name="tokens.jsonl")), chat).documents
    assert np.array_equal(again.ids, text.ids) and np.array_equal(again.labels, text.labels)
    with pytest.raises(DataError, match=r"tokens.jsonl:1: input_ids.*999999"):
        load(config(write(tmp_path, {"input_ids": [1, 999999]}, name="tokens.jsonl")), chat)


def test_the_weight_of_a_message_reaches_its_tokens(tmp_path, chat):
    turns = [*row()["messages"], *row("more", "other")["messages"]]
    turns[1] |= {"weight": 0.5}
    turns[3] |= {"train": False}
    [document] = load(config(write(tmp_path, {"messages": turns})), chat).documents
    assert set(document.weights.tolist()) == {0.0, 0.5}
    assert "answer" in chat_text(document) and "other" not in chat_text(document)


def chat_text(document) -> str:
    tokenizer = AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")
    return tokenizer.decode(document.labels[document.labels >= 0])


def test_held_out_rows_are_described_with_the_share_that_was_taken(tmp_path, chat):
    rows = [{"prompt": f"q {i}", "completion": "a"} for i in range(40)]
    data = load(config(write(tmp_path, *rows), held_out=0.3), chat)
    [held_out] = data.eval
    count = len(held_out.rows)
    assert f"{count} of 40 ({count / 40:.1%}; data.held_out=30.0%)" in describe_source(held_out)
    assert "data.held_out" not in describe_source(data.train[0])
