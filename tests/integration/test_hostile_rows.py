"""For any content of a file, the error is one sentence that names the row: no traceback, no row lost silently."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.formats.parser import FORMATS
from finetune.data.loader import load_data
from finetune.data.sources.readers import RawBatch
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.system.errors import DataError
from finetune.system.resources import packaged

GOOD = {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}
USER, ASSISTANT = GOOD["messages"]


@cache
def chat() -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5"))


def prepared(path: Path | str, **how: Any) -> Preparation:
    keys = SourceConfig.model_fields
    source = SourceConfig(path=str(path), **{key: value for key, value in how.items() if key in keys})
    settings = {"turn_order": "strict", **{key: value for key, value in how.items() if key not in keys}}
    return Preparation(DataConfig(train=[source], **settings), chat())


def chats(*turns: dict, **columns: Any) -> str:
    return json.dumps({"messages": list(turns), **columns})


# A line of a file of messages, and a part of its error.
BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "NUL": ('{"messages": "a\0"}', "holds a NUL character"),
    "NUL escaped": (r'{"messages": [{"role": "user", "content": "a\u0000"}]}', r"messages\[0\].content holds a NUL"),
    "lone surrogate": (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "half of a surrogate pair"),
    "Latin-1": (b'{"messages": [{"role": "caf\xe9"}]}', "is not UTF-8"),
    "half a line": (chats(USER, ASSISTANT)[:-9], "is cut off"),
    "broken JSON": ("{'messages': []}", "is not JSON"),
    "two rows in a line": (chats(USER, ASSISTANT) * 2, "is not JSON: Extra data"),
    "duplicate keys": ('{"messages": [{"role": "user", "role": "user"}]}', "has the key 'role' twice"),
    "NaN": (chats(USER, ASSISTANT | {"weight": float("nan")}), "holds NaN"),
    "huge weight": (chats(USER, ASSISTANT | {"weight": 10**400}), "weight must be a number"),
    "deep": ('{"messages": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 100 deep"),
    "a list": ("[1, 2]", "must be an object, found a list"),
    "a number": ("7", "must be an object, found a number"),
    "null": ("null", "must be an object, found null"),
    "no columns": ("{}", "messages"),
    "null messages": ('{"messages": null}', "messages must be a list"),
    "no messages": (chats(), "messages must be a list of at least one message"),
    "messages of another type": ('{"messages": 7}', "messages must be a list"),
    "a message of another type": (chats(USER, 7), r"messages\[1\] must be an object"),  # type: ignore[arg-type]
    "null content": (chats(USER, {"role": "assistant", "content": None}), r"messages\[1\].content must be text"),
    "an object for content": (chats({"role": "user", "content": {}}, ASSISTANT), r"messages\[0\].content must be text"),
    "an image": (
        chats({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
        r"content\[0\] of type 'image_url' has no file",
    ),
    "unknown role": (chats(USER, {"role": "robot", "content": "x"}), r"messages\[1\].role is 'robot'"),
    "a number for a role": (chats({"role": 1, "content": "x"}, ASSISTANT), r"messages\[0\].role"),
    "two system turns": (chats(*[{"role": "system", "content": "s"}] * 2, USER, ASSISTANT), "is a system turn"),
    "assistant first": (chats(ASSISTANT), "with no user turn before it"),
    "no assistant": (chats(USER), "no assistant message"),
    "an empty answer": (chats(USER, {"role": "assistant", "content": ""}), "is empty"),
    "tools that aren't JSON": (chats(USER, ASSISTANT, tools="[{"), "tools must be JSON"),
    "tools of another type": (chats(USER, ASSISTANT, tools=[7]), r"tools\[0\] must be an object"),
    "arguments that aren't JSON": (
        chats(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        "arguments must be JSON",
    ),
    "images": (chats(USER, ASSISTANT, images=["x.png"]), "images: file 1 of 1 has no tag"),
}


def file_of(folder: Path, lines: dict[str, tuple[str | bytes, str]]) -> Path:
    """Write good rows before, between and after bad ones, with a byte order mark and both kinds of line ends."""
    rows = [chats(USER, ASSISTANT).encode()]
    for line, _ in lines.values():
        rows += [line.encode() if isinstance(line, str) else line, json.dumps(GOOD).encode()]
    file = folder / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows[:2]) + b"\n" + b"\n".join(rows[2:]))
    return file


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, name):
    file = file_of(tmp_path, {name: BAD_LINES[name]})
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{BAD_LINES[name][1]}") as error:
        load_data(prepared(file))
    assert "rows.jsonl:1" not in str(error.value) and "rows.jsonl:3" not in str(error.value)


def test_more_bad_rows_than_allowed_are_refused_however_they_are_skipped(tmp_path):
    file = file_of(tmp_path, BAD_LINES)
    with pytest.raises(
        DataError, match=r"data.max_bad_share allows 5.0%, listed in .*:\n  .*rows.jsonl:2: holds a NUL"
    ):
        load_data(prepared(file, on_bad_row="skip"))


def test_bad_rows_leave_all_others_as_they_were(tmp_path):
    data = load_data(prepared(file_of(tmp_path, BAD_LINES), on_bad_row="skip", max_bad_share=0.9))
    store = data.train[0].store
    assert np.array_equal(store.indices, np.arange(0, 2 * len(BAD_LINES) + 1, 2))
    assert all(np.array_equal(store[row].ids, store[0].ids) for row in range(len(store)))
    listed = [json.loads(line) for line in store.bad_rows.read_text().splitlines()]
    assert [row["place"] for row in listed] == [f"{tmp_path}/rows.jsonl:{2 * i}" for i in range(1, len(BAD_LINES) + 1)]


def test_the_command_names_bad_rows_or_skips_them_if_asked(tmp_path, finetune_command):
    file = file_of(tmp_path, BAD_LINES)
    words = ("data", "config=quickstart.yaml", f"data.train=[{{path: {file}}}]", "data.turn_order=strict")
    refused = finetune_command(*words)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "rows.jsonl:2: holds a NUL character" in refused.stderr and "data.on_bad_row=skip" in refused.stderr
    skipped = finetune_command(*words, "data.on_bad_row=skip", "data.max_bad_share=0.9")
    assert skipped.returncode == 0, skipped.stderr
    assert f"bad rows: {len(BAD_LINES)}\n" in skipped.stdout


NO_SOURCE: dict[str, tuple[Callable[[Path], object], str]] = {
    "rows.jsonl": (lambda file: None, "does not exist"),
    "empty.jsonl": (lambda file: file.touch(), "has no rows"),
    "blank.jsonl": (lambda file: file.write_text("\n\n \n"), "has no rows"),
    "folder.jsonl": (lambda file: file.mkdir(), "is a folder without rows"),
    "utf16.jsonl": (lambda file: file.write_text(json.dumps(GOOD), "utf-16-le"), "looks like UTF-16 text"),
    "cut.jsonl.gz": (lambda file: file.write_bytes(gzip.compress(b"{}" * 999)[:-9]), "is broken or cut off"),
    "table.jsonl": (lambda file: parquet.write_table(pyarrow.table({"a": [1]}), file), "looks like a parquet file"),
    "text.parquet": (lambda file: file.write_text(json.dumps(GOOD)), ".parquet file"),
    "object.json": (lambda file: file.write_text(json.dumps({"things": [GOOD]}, indent=1)), "fit no format"),
    "notes.txt": (lambda file: file.write_text("x"), "must be one of .jsonl"),
    "all_bad.jsonl": (lambda file: file.write_text("{\n[\n"), "all_bad.jsonl:1: "),
    "unknown.jsonl": (lambda file: file.write_text('{"a": 1}'), "fit no format"),
}


@pytest.mark.parametrize("name", NO_SOURCE)
def test_a_source_that_cannot_be_read_is_refused_by_name(tmp_path, name):
    make, reason = NO_SOURCE[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=reason) as error:
        load_data(prepared(tmp_path / name))
    assert str(error.value).startswith("data.train[0]: ") and name in str(error.value)


def test_a_part_whose_type_is_no_text_is_an_object(tmp_path):
    part = {"type": ["text"], "text": "a"}
    (tmp_path / "rows.jsonl").write_text(chats(USER | {"content": [part]}, ASSISTANT))
    assert len(load_data(prepared(tmp_path / "rows.jsonl", on_object="json")).train[0].store) == 1


def test_a_file_of_empty_objects_is_refused_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match=r"rows.jsonl: rows with the columns none fit no format"):
        load_data(prepared(tmp_path / "rows.jsonl"))


def test_a_source_that_cannot_be_read_ends_the_command_with_2(tmp_path, finetune_command):
    (tmp_path / "rows.jsonl").write_text("")
    ended = finetune_command("data", "config=quickstart.yaml", "data.train=[{path: rows.jsonl}, {path: a/b/c}]")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "data.train[0]: rows.jsonl has no rows" in ended.stderr
    assert "data.train[1]: a/b/c does not exist" in ended.stderr


def test_a_line_of_200_megabytes_costs_its_own_row_only(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    with file.open("r+b") as rows:
        rows.seek(200_000_000)
        rows.write(b"\n" + json.dumps(GOOD).encode())
    store = load_data(prepared(file, on_bad_row="skip", max_bad_share=0.5)).train[0].store
    assert len(store) == 2 and "bytes long" in store.bad_rows.read_text()


# The same rows in every file format


def as_csv(rows: list[dict]) -> str:
    content = io.StringIO()
    writer = csv.DictWriter(content, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def test_the_same_rows_in_any_kind_of_file_are_the_same_tokens(tmp_path):
    rows = [{"prompt": f'question "{i}",\n☃', "completion": f"answer {i}\r\n"} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_bytes(as_csv(rows).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "rows.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "parts").mkdir()
    for part in range(4):
        name = f"train-{part:05}-of-00004.jsonl"
        (tmp_path / "parts" / name).write_bytes(b"".join(lines.splitlines(True)[part * 10 : part * 10 + 10]))
    sources = [tmp_path / f"rows.{kind}" for kind in ("jsonl", "json", "csv", "jsonl.gz", "jsonl.zst", "parquet")]
    digests = {load_data(prepared(path)).digest for path in (*sources, tmp_path / "saved", tmp_path / "parts" / "*")}
    digests.add(load_data(prepared(tmp_path / "parts", split="train")).digest)
    assert len(digests) == 1


# Random rows

words = st.sampled_from(
    [
        "messages",
        "conversations",
        "role",
        "content",
        "from",
        "value",
        "user",
        "human",
        "assistant",
        "gpt",
        "system",
        "tool",
        "function_call",
        "observation",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "tools",
        "type",
        "text",
        "train",
        "weight",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "history",
        "input_ids",
        "labels",
        "attention_mask",
        "completion_mask",
        "seq_lengths",
        "",
        "{}",
        "[]",
        '{"name": "f", "arguments": {}}',
        "\ue0f0",
        "<|im_end|>",
        "<|im_start|>system\n",
        "{{ 7 }}",
        "\n",
        " ",
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | st.text(max_size=5)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=5), max_leaves=12
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | anything, "content": words | anything},
        optional={"weight": anything, "train": anything, "tool_calls": anything, "name": anything},
    ),
    max_size=4,
)


def rows_of(format_name: str) -> st.SearchStrategy[dict]:
    """Draw rows with the format's columns, with plausible or arbitrary values."""
    fmt = FORMATS[format_name]
    likely = {"messages": messages, "conversations": messages, "input_ids": st.lists(st.integers(-1, 600), max_size=5)}
    columns = {name: likely.get(name, words) | anything for name in fmt.columns}
    return st.fixed_dictionaries(
        {name: columns[name] for name in fmt.required},
        optional={name: value for name, value in columns.items() if name not in fmt.required},
    )


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("format_name", FORMATS)
@settings(max_examples=100)
@given(data=st.data())
def test_any_row_is_encoded_or_named_as_bad(format_name, train_on, data):
    rows = data.draw(st.lists(rows_of(format_name) | st.dictionaries(words, anything), min_size=1, max_size=4))
    lines = tuple(json.dumps(row).encode() for row in rows)
    batch = RawBatch("rows.jsonl", "line", 10, tuple(range(1, len(rows) + 1)), lines, 0, format_name)
    preparation = prepared("rows.jsonl", train_on=train_on)
    encoded = preparation.encoder(preparation.cfg.train[0])(batch)
    assert sorted([*encoded.rows["indices"], *(row.index for row in encoded.bad)]) == list(range(10, 10 + len(rows)))
    assert all(row.place == f"rows.jsonl:{row.index - 9}" and row.reason for row in encoded.bad)
    assert int(encoded.rows["lengths"].sum()) == len(encoded.ids) == len(encoded.weights)
    assert np.isfinite(encoded.weights).all() and (encoded.ids >= 0).all()


def test_the_command_line_survives_names_that_break_lines(tmp_path, finetune_command):
    file = tmp_path / "a \x1b[31m\n.jsonl"
    file.write_text("{")
    ended: subprocess.CompletedProcess[str] = finetune_command(
        "data", "config=quickstart.yaml", f"data.train=[{{path: {json.dumps(str(file))}}}]"
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "\x1b" not in ended.stderr
