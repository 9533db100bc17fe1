"""Every file format reads back equal; a bad row is named and does not affect the others."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetune.config.schema import SourceConfig
from finetune.data.sources import readers, text_files
from finetune.data.sources.paths import resolve_source
from finetune.data.sources.readers import Row
from finetune.system.errors import DataError
from tests.source_rows import rows_of

GOOD = {"text": "whole"}


def read(path: Path) -> list[Row]:
    return rows_of(SourceConfig(path=str(path)))


def values(path: Path) -> list[Any]:
    return [row.value for row in read(path)]


def save(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_list(rows: list[dict]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def write_table(path: Path, rows: list[dict]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_arrow_file(path: Path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_arrow_stream(path: Path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def in_batches_of(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    monkeypatch.setattr(text_files, "BATCH_BYTES", size_bytes)
    monkeypatch.setattr(readers, "BATCH_BYTES", size_bytes)


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


# Text without half surrogate pairs, which UTF-8 cannot encode, and without NUL, which is refused.
text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
json_values = st.recursive(text | numbers, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=8)
json_rows = st.lists(st.dictionaries(text, json_values, max_size=4), min_size=1, max_size=8)
# A table has one type per column; the keys of a struct are the same in every row.
table_rows = st.lists(
    st.fixed_dictionaries(
        {
            "text": text,
            "score": st.floats(allow_nan=False) | st.none(),
            "id": st.integers(-(2**63), 2**63 - 1),
            "messages": st.lists(st.fixed_dictionaries({"role": text, "ids": st.lists(st.integers(0, 9))})),
        }
    ),
    min_size=1,
    max_size=8,
)
each_example_overwrites = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)

JSON_WRITERS: dict[str, Callable[[list[dict]], bytes]] = {
    "rows.jsonl": as_lines,
    "rows.json": as_list,
    "rows.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "rows.jsonl.bz2": lambda rows: bz2.compress(as_lines(rows)),
    "rows.jsonl.xz": lambda rows: lzma.compress(as_lines(rows)),
    "rows.jsonl.zst": lambda rows: zstd(as_lines(rows)),
    "rows.json.gz": lambda rows: gzip.compress(as_list(rows)),
    "objects.json": as_lines,
    "crlf.jsonl": lambda rows: as_lines(rows).replace(b"\n", b"\r\n"),
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + as_lines(rows),
    "mark.json": lambda rows: b"\xef\xbb\xbf\n " + as_list(rows) + b"\n",
    "blank.jsonl": lambda rows: b"\n \t\r\n" + as_lines(rows).replace(b"\n", b"\n\n"),
    "no_last_newline.jsonl": lambda rows: as_lines(rows)[:-1],
    "members.jsonl.gz": lambda rows: b"".join(gzip.compress(as_lines([row])) for row in rows),
    "frames.jsonl.zst": lambda rows: b"".join(zstd(as_lines([row])) for row in rows),
}
TABLE_WRITERS = {"rows.parquet": write_table, "rows.arrow": write_arrow_file, "stream.arrow": write_arrow_stream}


@pytest.mark.parametrize("name", JSON_WRITERS)
@each_example_overwrites
@given(rows=json_rows)
def test_json_reads_back_equal(tmp_path, name, rows):
    got = values(save(tmp_path / name, JSON_WRITERS[name](rows)))
    assert got == rows
    assert [list(row) for row in got] == [list(row) for row in rows]


@pytest.mark.parametrize("name", TABLE_WRITERS)
@each_example_overwrites
@given(rows=table_rows)
def test_tables_read_back_equal(tmp_path, name, rows):
    TABLE_WRITERS[name](tmp_path / name, rows)
    assert values(tmp_path / name) == rows


@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t"), ("rows.csv.gz", ",")])
@each_example_overwrites
@given(rows=st.lists(st.fixed_dictionaries({"a": text, "b, \"'\n": text, "c": text}), min_size=1, max_size=8))
def test_cells_read_back_equal(tmp_path, name, delimiter, rows):
    path = tmp_path / "plain"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    content = path.read_bytes()
    assert values(save(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)) == rows


@pytest.mark.parametrize("batch_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1 << 20])
def test_rows_do_not_depend_on_batch_and_piece_sizes(tmp_path, monkeypatch, batch_bytes, piece_bytes):
    rows = [
        {"text": 'a "quote", a \\ and [{ ' * (n % 5), "nested": [[], {"n": n, "deep": ["\\\\", '\\"']}]}
        for n in range(20)
    ]
    files = [save(tmp_path / "a.jsonl", as_lines(rows)), save(tmp_path / "b.json", as_list(rows))]
    expected = [(row.index, row.location, row.value) for file in files for row in read(file)]
    in_batches_of(monkeypatch, batch_bytes)
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    assert [(row.index, row.location, row.value) for file in files for row in read(file)] == expected
    assert [value for *_, value in expected] == rows * 2
    batches = list(resolve_source(SourceConfig(path=str(files[0]))).batches())
    assert (len(batches) > 1) == (batch_bytes < 1 << 20)


def test_a_batch_counts_the_bytes_read_and_is_picklable(tmp_path, monkeypatch):
    in_batches_of(monkeypatch, 100)
    save(tmp_path / "a.jsonl", as_lines([GOOD] * 50) + b"{broken\n")
    save(tmp_path / "b.csv", "text\n" + "cell\n" * 50)
    write_table(tmp_path / "c.parquet", [GOOD] * 50)
    files = resolve_source(SourceConfig(path=str(tmp_path / "*")))
    batches = list(files.batches())
    read_bytes = [batch.bytes_read for batch in batches]
    assert read_bytes == sorted(read_bytes) and read_bytes[-1] == files.size_bytes
    assert [batch.first_index for batch in batches] == [
        sum(len(b.items) for b in batches[:i]) for i in range(len(batches))
    ]
    for batch in batches:
        copy = pickle.loads(pickle.dumps(batch))  # noqa: S301 - our own bytes
        assert [(row.index, row.location, str(row.value)) for row in copy.rows()] == [
            (row.index, row.location, str(row.value)) for row in batch.rows()
        ]


BAD_LINES = {
    '{"text": "cut': "is cut off: (Unterminated string starting|Invalid control character) at column",
    '{"text": "cut"': "is cut off",
    "{'text': 1}": "is not JSON: Expecting property name",
    '{"text": 1}{"text": 2}': "is not JSON: Extra data at column 12",
    '{"text": "a\0b"}': r"holds a NUL character \(byte 12\)",
    r'{"text": "a\u0000b"}': "text holds a NUL character",
    r'{"messages": [{"content": "\ud83d"}]}': r"messages\[0\].content holds half of a surrogate pair",
    r'{"text": {"\uDE00": 1}}': "holds half of a surrogate pair",
    '{"text": "one", "text": "two"}': "has the key 'text' twice",
    '{"messages": [{"role": "user", "role": "user"}]}': "has the key 'role' twice",
    '{"text": NaN}': "holds NaN",
    '{"text": -Infinity}': "holds -Infinity",
    '{"text": 1e999}': "holds 1e999",
    '{"text": ' + "9" * 5000 + "}": "integer of more than 4,300 digits",
    '{"text": ' + "[" * 100 + "]" * 100 + "}": "nested more than 100 deep",
    "[" * 200_000: "nested more than 100 deep",
    '{"a":' * 200_000: "nested more than 100 deep",
    "[1]": "must be an object, found a list",
    "[": "opens a list",
    "null": "must be an object, found null",
    "true": "must be an object, found true",
    "7": "must be an object, found a number",
    '"text"': "must be an object, found text",
    "rubbish": "is not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:24]))
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line):
    rows = read(save(tmp_path / "rows.jsonl", as_lines([GOOD]) + b"\n" + line.encode() + b"\r\n" + as_lines([GOOD])))
    assert [row.value for row in (rows[0], rows[2])] == [GOOD, GOOD]
    assert [(row.index, row.location) for row in rows] == [
        (i, f"{tmp_path}/rows.jsonl:{n}") for i, n in enumerate((1, 3, 4))
    ]
    with pytest.raises(DataError, match=BAD_LINES[line]):
        raise rows[1].value


@pytest.mark.parametrize(
    "row",
    [
        r'{"text": "\\u0000 \\ud800"}',
        r'{"text": "\ud83d\ude00"}',
        '{"n": 1e300}',
        '{"n": [], "text": ' + "[" * 99 + '"x"' + "]" * 99 + "}",
    ],
)
def test_valid_lines_that_look_bad_are_read(tmp_path, row):
    assert values(save(tmp_path / "rows.jsonl", row)) == [json.loads(row)]


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    lines = values(save(tmp_path / "rows.jsonl", b'{"text": "caf\xe9"}\n' + as_lines([GOOD])))
    assert "is not UTF-8 (byte 14 is 0xe9)" in str(lines[0]) and lines[1] == GOOD
    cells = values(save(tmp_path / "rows.csv", b"text,more\ncaf\xe9,b\nwhole,b\n"))
    assert "text is not UTF-8 (byte 0xe9)" in str(cells[0]) and cells[1] == {"text": "whole", "more": "b"}


def test_a_bad_row_in_a_list_is_named_and_the_others_are_read(tmp_path):
    rows = read(
        save(tmp_path / "rows.json", '[{"text": "whole"}, {"text": tru}, {"text": "}]"}, 7,\n{"text": "whole"}]')
    )
    assert [row.location for row in rows] == [f"{tmp_path}/rows.json:row {n}" for n in range(1, 6)]
    assert [rows[i].value for i in (0, 2, 4)] == [GOOD, {"text": "}]"}, GOOD]
    assert "is not JSON" in str(rows[1].value) and "must be an object" in str(rows[3].value)


@pytest.mark.parametrize("content", ["[{},]", "[{},,{}]", "[,{}]"])
def test_an_extra_comma_is_one_bad_row(tmp_path, content):
    got = values(save(tmp_path / "rows.json", content))
    assert len(got) == content.count(",") + 1
    assert [str(value) for value in got if value != {}] == ["is empty; remove the extra comma"]


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
@pytest.mark.parametrize("length", [29, 30, 31, 500])
def test_a_row_that_is_too_long_is_one_bad_row_with_its_length(tmp_path, monkeypatch, kind, length):
    monkeypatch.setattr(text_files, "LONGEST_ROW_BYTES", 30)
    monkeypatch.setattr(text_files, "LONGEST_RECORD_BYTES", 30)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 8)
    ending = b"" if kind == "rows.json" else b"\n"
    long = json.dumps({"text": "x" * (length - len(ending) - 12)}).encode() + ending
    assert len(long) == length
    good = as_lines([GOOD])
    content = {
        "rows.jsonl": good + long + good,
        "rows.jsonl.gz": gzip.compress(good + long + good),
        "rows.json": b"[" + good + b"," + long + b"," + good + b"]",
        "rows.csv": b"text\nwhole\n" + long + b"whole\n",
    }[kind]
    got = values(save(tmp_path / kind, content))
    assert got[0] == got[2] == GOOD and len(got) == 3
    if length <= 30:
        assert isinstance(got[1], dict) or kind == "rows.csv"
    else:
        assert str(got[1]) == f"is {length} bytes long; a row may have 30"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_line_of_200_megabytes_is_not_kept_in_memory(tmp_path, name):
    path = save(tmp_path / name, b'[{"text": "' if name == "rows.json" else b'{"text": "')
    with path.open("r+b") as file:  # a sparse file reads as NULs and takes no disk
        file.seek(200_000_000)
        file.write(b'"}, {"text": "whole"}]' if name == "rows.json" else b'"}\n{"text": "whole"}\n')
    tracemalloc.start()
    long, good = values(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "200,000,00" in str(long) and good == GOOD
    assert peak_bytes < 100_000_000


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(megabytes: int) -> int:
        line = as_lines([{"text": "x" * 1000}])
        path = save(tmp_path / "rows.jsonl", line * (megabytes * 1000))
        tracemalloc.start()
        for _ in resolve_source(SourceConfig(path=str(path))).batches():
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    assert peak(24) < peak(6) + 1_000_000


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow"])
def test_memory_does_not_grow_with_a_table(tmp_path, name):
    rows = pyarrow.table({"text": [f"{i:01000}" for i in range(20_000)]})
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", rows.schema) as writer:
        writer.write_table(rows, max_chunksize=1000)
    parquet.write_table(rows, tmp_path / "rows.parquet", compression="none", use_dictionary=False)
    size_bytes = rows.nbytes
    del rows
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    batches = resolve_source(SourceConfig(path=str(tmp_path / name))).batches()
    peak_bytes = max(pyarrow.total_allocated_bytes() - before for _ in batches) + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < size_bytes / 2


BAD_CELLS = {
    "a,b\n1,2\n1\n1,2\n": (1, "rows.csv:3", "has 1 cells, .*has 2"),
    "a,b\n1,2\n1,2,3\n1,2\n": (1, "rows.csv:3", "has 3 cells"),
    'a,b\n"1\n1",2\n"1" x,2\n1,2\n': (1, "rows.csv:4", "record of cells"),
    'a,b\n1,2\n1,"2\n1,2\n': (1, "rows.csv:3", r"unexpected end of data \(read up to line 4\)"),
    "a,b\n1,2\n1\0,2\n1,2\n": (1, "rows.csv:3", "a holds a NUL character"),
    "a,b\n1,2\n1\r3,2\n1,2\n": (1, "rows.csv:3", "new-line character"),
}


@pytest.mark.parametrize("content", BAD_CELLS)
def test_a_bad_record_is_named_by_its_first_line(tmp_path, content):
    index, place, reason = BAD_CELLS[content]
    rows = read(save(tmp_path / "rows.csv", content))
    assert rows[index].location.endswith(place)
    with pytest.raises(DataError, match=reason):
        raise rows[index].value
    assert all(isinstance(row.value, dict) for i, row in enumerate(rows) if i != index)


@pytest.mark.parametrize("endless", ['"open,1\n', '"a\n",' * 60 + "\n"], ids=["one cell", "many cells"])
def test_a_record_without_an_end_is_cut_at_the_limit(tmp_path, monkeypatch, endless):
    monkeypatch.setattr(text_files, "LONGEST_RECORD_BYTES", 100)
    rows = read(save(tmp_path / "rows.csv", "text,more\nwhole,1\n" + endless + "whole,1\n" * 40))
    bad = [row for row in rows if isinstance(row.value, DataError)]
    assert bad[0].number == 3 and "bytes long; a row may have 100" in str(bad[0].value)
    assert [row.value for row in rows[-25:]] == [{"text": "whole", "more": "1"}] * 25


def test_a_cell_may_be_as_long_as_a_document(tmp_path):
    assert values(save(tmp_path / "rows.csv", "text\n" + "x" * 500_000 + "\n")) == [{"text": "x" * 500_000}]


def test_empty_cells_are_empty_texts_and_blank_lines_are_no_rows(tmp_path):
    path = save(tmp_path / "rows.csv", 'a,b\r\n\r\n,""\r\n" ",1\r\n')
    assert [(row.number, row.value) for row in read(path)] == [
        (3, {"a": "", "b": ""}),
        (4, {"a": " ", "b": "1"}),
    ]


def test_a_row_of_a_table_does_not_get_the_keys_of_another(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "call": {"city": "Rome"}}],
            "system": None,
        },
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "call": {"unit": "m"}}], "system": "s"},
        {"messages": None, "system": None},
    ]
    for name, write in TABLE_WRITERS.items():
        write(tmp_path / name, rows)
        assert values(tmp_path / name) == rows


def test_maps_lists_and_categories_are_plain_values(tmp_path):
    table = pyarrow.table(
        {
            "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "category": pyarrow.array(["x"]).dictionary_encode(),
            "large": pyarrow.array([["y"]], pyarrow.large_list(pyarrow.large_string())),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == [{"map": {"a": 1}, "category": "x", "large": ["y"]}]


def test_invalid_utf8_in_a_table_is_one_bad_row(tmp_path):
    column = pyarrow.array([b"whole", b"caf\xe9", b"a\0b"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    good, latin, nul = values(tmp_path / "rows.parquet")
    assert good == GOOD and "not UTF-8 (byte 0xe9)" in str(latin) and "text holds a NUL" in str(nul)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_duplicate_column_names_are_refused(tmp_path, name):
    table = pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="two columns of one name"):
        read(tmp_path / name)


WHOLE_FILES = {name: write([GOOD, {"text": 'a "quote"', "n": [1, {}]}] * 5) for name, write in JSON_WRITERS.items()}


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.xz", "rows.jsonl.zst", *TABLE_WRITERS]
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(data=st.data())
def test_a_damaged_file_gives_rows_or_a_data_error(tmp_path, name, data):
    path = tmp_path / name
    if name in TABLE_WRITERS:
        TABLE_WRITERS[name](path, [GOOD, {"text": "b"}] * 5)
    whole = bytearray(WHOLE_FILES.get(name) or path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.sampled_from(b'\x00\xff"{}[],\\\n\x80'))
    save(path, bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        rows = read(path)
    except DataError as error:
        assert str(error).startswith(str(path))
    else:
        assert rows and all(isinstance(row.value, dict | DataError) for row in rows)
