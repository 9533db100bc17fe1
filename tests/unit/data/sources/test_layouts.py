"""Unusual layouts of text files give the same rows as JSON lines, and are named once."""

from __future__ import annotations

import gzip
import json

import pytest

from finetune.config.schema import SourceConfig
from finetune.data.sources import text_files
from finetune.data.sources.paths import resolve_source
from finetune.system.errors import DataError
from tests.source_rows import rows_of

ROWS = [{"text": 'a "quote", ü\n]}', "n": [1, {"x": []}]}, {"text": "b", "n": []}, {"text": "\ufeff", "n": [2]}]
CELLS = [{"prompt": "Grüße, du", "completion": "née 0"}, {"prompt": "x", "completion": "y"}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
PRETTY = [json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS]
LIST = json.dumps(ROWS, indent=1)
CSV = "prompt;completion\r\nGrüße, du;née 0\r\nx;y\r\n"

# (name, content, rows)
LAYOUTS = {
    "list": ("a.jsonl", LIST, ROWS),
    "list in a line": ("a.jsonl", json.dumps(ROWS), ROWS),
    "objects": ("a.jsonl", "\n".join(PRETTY), ROWS),
    "objects with commas": ("a.jsonl", ",\n".join(PRETTY), ROWS),
    "objects in .json": ("a.json", "\n".join(PRETTY), ROWS),
    "data": ("a.json", json.dumps({"version": "1", "data": ROWS, "tags": ["x"], "info": {"data": [{}]}}), ROWS),
    "data over lines": ("a.json", json.dumps({"data": ROWS}, indent=1), ROWS),
    "train": ("a.json", json.dumps({"train": ROWS}), ROWS),
    "marks": ("a.jsonl", "\ufeff" + "\n\ufeff".join(LINES) + "\n\ufeff\n\ufeff", ROWS),
    "mark at the end": ("a.jsonl", "\n".join(LINES) + "\ufeff", ROWS),
    "mark in a list": ("a.json", "[" + ",\ufeff".join(LINES) + "]", ROWS),
    "carriage returns": ("a.jsonl", "\r".join(LINES) + "\r", ROWS),
    "carriage returns in cells": ("a.csv", CSV.replace(";", "\t").replace("\r\n", "\r"), CELLS),
    "semicolons": ("a.csv", CSV, CELLS),
    "semicolons and quotes": ("a.csv", '"prompt";"completion"\n"Grüße, du";"née 0"\n"x";"y"\n', CELLS),
    "names over lines": ("a.csv", '"a\nb",c\nx;y,z\n', [{"a\nb": "x;y", "c": "z"}]),
    "tabs": ("a.csv", CSV.replace(";", "\t"), CELLS),
    "commas in .tsv": ("a.tsv", 'prompt,completion\n"Grüße, du",née 0\nx,y\n', CELLS),
}


def read(path, **settings):
    return [row.value for row in rows_of(SourceConfig(path=str(path), **settings))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gzip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_rows(tmp_path, layout, encoding):
    name, text, rows = LAYOUTS[layout]
    packed = encoding == "gzip"
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode(encoding))
    assert read(path) == rows


@pytest.mark.parametrize("layout", ["list", "objects", "data", "carriage returns", "semicolons"])
def test_a_layout_is_named_once_per_file(tmp_path, capsys, layout):
    name, text, _ = LAYOUTS[layout]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    read(path)
    read(path)
    assert [line.startswith(f"{path}: read ") for line in capsys.readouterr().err.splitlines()] == [True]


def test_usual_files_say_nothing(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(LINES))
    (tmp_path / "b.json").write_text(LIST)
    (tmp_path / "c.csv").write_text("text\nx;y\n")
    assert read(tmp_path / "*") == [*ROWS, *ROWS, {"text": "x;y"}]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
def test_lists_under_split_names_are_splits(tmp_path, monkeypatch, piece_bytes, indent):
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=indent))
    assert read(path, split="train") == ROWS
    assert read(path, split="test") == ROWS[:1]
    assert read(path) == ROWS
    with pytest.raises(DataError, match=r"no split 'dev' \(available: train, test\)"):
        read(path, split="dev")


def test_of_several_lists_only_a_first_one_named_train_is_read_without_a_question(tmp_path):
    path = tmp_path / "a.json"
    for lists, best in ((("test", "train"), "train"), (("test", "dev"), "test"), (("data", "rows"), "data")):
        path.write_text(json.dumps(dict.fromkeys(lists, ROWS)))
        with pytest.raises(DataError, match=f"help: set split: {best}"):
            read(path)
    path.write_text(json.dumps({"training": ROWS, "data": ROWS[:1]}))
    assert read(path) == ROWS


def test_splits_of_one_file_have_digests_of_their_own(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    digests = {resolve_source(SourceConfig(path=str(path), split=split)).digest() for split in (None, "train", "test")}
    assert len(digests) == 3


def test_a_split_of_a_file_without_keys_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(LIST)
    with pytest.raises(DataError, match="has no split 'train'"):
        read(tmp_path / "a.json", split="train")


@pytest.mark.parametrize(
    "rows",
    [
        [{"data": [{"role": "user", "content": "q"}]}],
        [{"data": [{"a": 1}]}, {"data": [{"a": 2}]}],
        [{"conversation": [{"who": "q"}]}],
    ],
)
def test_rows_that_look_like_a_wrapped_list_stay_rows(tmp_path, rows):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path) == rows


def test_a_bad_object_over_several_lines_is_one_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([PRETTY[0], '{\n "text": tru\n}', PRETTY[1], '{\n "text": ']))
    first, bad, second, cut = read(path)
    assert [first, second] == ROWS[:2]
    assert isinstance(bad, DataError) and isinstance(cut, DataError)


def test_a_cut_first_line_does_not_take_the_next_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut"\n' + "\n".join(LINES))
    bad, *others = read(path)
    assert isinstance(bad, DataError) and others == ROWS


@pytest.mark.parametrize("comment", ["// rows", "# rows"])
def test_a_comment_is_named(tmp_path, comment):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([comment, *LINES]))
    bad, *others = read(path)
    assert "is a comment" in str(bad) and others == ROWS
