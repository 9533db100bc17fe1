"""A path finds exactly the rows it names, in one order, or the error names what exists instead."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from finetune.config.schema import SourceConfig
from finetune.data.sources.paths import resolve_source
from finetune.system.errors import DataError
from tests.source_rows import rows_of


def lines(*names: str) -> bytes:
    return b"".join(json.dumps({"text": name}).encode() + b"\n" for name in names)


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def texts_of(path: Path | str, **settings) -> list[str]:
    return [row.value["text"] for row in rows_of(SourceConfig(path=str(path), **settings))]


def refused(path: Path | str, **settings) -> str:
    """Return the text of the DataError; any other error fails the test."""
    with pytest.raises(DataError) as error:
        for _ in rows_of(SourceConfig(path=str(path), **settings)):
            pass
    return str(error.value)


def name_of(path: Path | str, **settings) -> str:
    return resolve_source(SourceConfig(path=str(path), **settings)).name


def write_parquet(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"text": list(names)}), path)
    return path


# Which files


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path):
    save(tmp_path / "b.jsonl", lines("b1", "b2") + b"{broken\n\n" + lines("b3"))
    save(tmp_path / "a.jsonl.gz", gzip.compress(lines("a1")))
    write_parquet(tmp_path / "c.parquet", "c1", "c2")
    save(tmp_path / "d.jsonl", b"")
    save(tmp_path / "e" / "e.csv", b"text\ne1\n")
    rows = list(rows_of(SourceConfig(path=f"{tmp_path}/*")))
    assert [row.value["text"] for row in rows if isinstance(row.value, dict)] == ["a1", "b1", "b2", "b3", "c1", "c2"]
    assert [row.index for row in rows] == list(range(7))
    assert [row.location.removeprefix(f"{tmp_path}/") for row in rows] == [
        "a.jsonl.gz:1",
        "b.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:3",
        "b.jsonl:5",
        "c.parquet:row 1",
        "c.parquet:row 2",
    ]
    assert texts_of(f"{tmp_path}/**/*.csv") == ["e1"]
    assert texts_of(f"{tmp_path}/[ce]*/*.csv") == ["e1"]


def test_the_order_of_files_is_that_of_their_names(tmp_path):
    names = [f"{i:02}" for i in range(40)]
    for name in sorted(names, key=hash):
        save(tmp_path / f"{name}.jsonl", lines(name))
    assert texts_of(f"{tmp_path}/*.jsonl") == names


def test_a_path_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "rows.jsonl", lines("x"))
    assert texts_of("~/rows.jsonl") == texts_of("~/*.jsonl") == ["x"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    save(tmp_path / "rows[1].jsonl", lines("literal"))
    save(tmp_path / "rows1.jsonl", lines("matched"))
    assert texts_of(tmp_path / "rows[1].jsonl") == ["literal"]


def test_suffixes_match_in_any_case_and_after_dots(tmp_path):
    assert texts_of(save(tmp_path / "v1.2.rows.JSONL", lines("x"))) == ["x"]
    assert texts_of(save(tmp_path / "rows.Json.GZ", gzip.compress(b'[{"text": "x"}]'))) == ["x"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
def test_a_limit_counts_rows_over_files_bad_ones_included(tmp_path, limit):
    save(tmp_path / "a.jsonl", lines("a") + b"\n{broken\n" + lines("c"))
    save(tmp_path / "b.jsonl", lines("d", "e"))
    whole = [(row.index, row.location) for row in rows_of(SourceConfig(path=f"{tmp_path}/*"))]
    limited = [(row.index, row.location) for row in rows_of(SourceConfig(path=f"{tmp_path}/*", limit=limit))]
    assert len(whole) == 5 and limited == whole[:limit]


def test_a_limit_reads_no_further(tmp_path):
    save(tmp_path / "a.jsonl", lines("a", "b"))
    save(tmp_path / "b.parquet", b"no table")
    assert texts_of(f"{tmp_path}/*", limit=2) == ["a", "b"]
    assert "b.parquet" in refused(f"{tmp_path}/*", limit=3)


def test_a_folder_has_splits_by_name(tmp_path):
    save(tmp_path / "train.jsonl", lines("train"))
    save(tmp_path / "test.csv.gz", gzip.compress(b"text\ntest\n"))
    for i in (2, 0, 1):
        write_parquet(tmp_path / f"valid-{i:05}-of-00003.parquet", f"valid{i}")
    save(tmp_path / "README.md", b"")
    assert texts_of(tmp_path, split="train") == ["train"]
    assert texts_of(tmp_path, split="test") == ["test"]
    assert texts_of(tmp_path, split="valid") == ["valid0", "valid1", "valid2"]
    assert texts_of(tmp_path.parent, subset=tmp_path.name, split="train") == ["train"]
    assert f"(available: test, train, valid)\nhelp: set {{path: {tmp_path}, split: train}}" in refused(tmp_path)
    assert "no split 'vald' (available: test, train, valid)" in refused(tmp_path, split="vald")
    assert "did you mean" in refused(tmp_path.parent, subset=tmp_path.name + "x", split="train")


def test_a_folder_of_files_without_names_of_splits_has_a_glob_for_all(tmp_path):
    save(tmp_path / "one.jsonl", lines("one"))
    save(tmp_path / "two.csv", b"text\ntwo\n")
    assert f"help: set {{path: {tmp_path}/*.*}}" in refused(tmp_path)
    assert texts_of(f"{tmp_path}/*.*") == ["one", "two"]


def test_an_incomplete_or_duplicate_split_is_refused(tmp_path):
    save(tmp_path / "train-00000-of-00002.jsonl", lines("first"))
    assert "1 of 2 files of train" in refused(tmp_path, split="train")
    save(tmp_path / "train-00001-of-00002.jsonl", lines("second"))
    assert texts_of(tmp_path, split="train") == ["first", "second"]
    write_parquet(tmp_path / "train.parquet", "third")
    assert "train more than once (train-00000-of-00002.jsonl, train.parquet)" in refused(tmp_path, split="train")


def test_a_saved_dataset_reads_back_equal(tmp_path):
    saved = datasets.Dataset.from_list([{"text": f"{i}"} for i in range(20)]).select(range(12, 1, -1))
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=saved, test=saved.select([1])).save_to_disk(tmp_path / "splits")
    expected = [f"{i}" for i in range(12, 1, -1)]
    assert texts_of(tmp_path / "one") == expected
    assert texts_of(tmp_path / "splits", split="train") == expected
    assert texts_of(tmp_path / "splits", split="test") == ["11"]
    assert "train, test" in refused(tmp_path / "splits")
    assert "no split 'dev' (available: train, test)" in refused(tmp_path / "splits", split="dev")
    assert "has no split 'train'; remove it" in refused(tmp_path / "one", split="train")
    assert name_of(tmp_path / "one") == "one" and name_of(tmp_path / "splits", split="test") == "test"


@pytest.mark.parametrize(
    "state",
    [b"", b"[]", b'{"_data_files": 1}', b'{"_data_files": [1]}', b'{"_data_files": [{"filename": 1}]}', b"[" * 99999],
)
def test_a_saved_dataset_without_its_state_is_refused(tmp_path, state):
    save(tmp_path / "state.json", state)
    assert "is damaged" in refused(tmp_path)


def test_a_saved_dataset_with_a_missing_or_outside_file_is_refused(tmp_path):
    write_parquet(tmp_path / "secret.arrow", "elsewhere")
    for name in ("gone.arrow", "../secret.arrow", str(tmp_path / "secret.arrow")):
        save(tmp_path / "saved" / "state.json", json.dumps({"_data_files": [{"filename": name}]}).encode())
        assert f"lacks {Path(name).name}" in refused(tmp_path / "saved")
    save(tmp_path / "dict" / "dataset_dict.json", b'{"splits": ["../saved"]}')
    assert "has no split" in refused(tmp_path / "dict", split="train")


def test_names_come_from_the_setting_the_split_or_the_file(tmp_path):
    save(tmp_path / "rows" / "train.jsonl.gz", gzip.compress(lines("x")))
    assert name_of(tmp_path / "rows" / "train.jsonl.gz") == "train"
    assert name_of(tmp_path / "rows" / "*.gz") == "rows"
    assert name_of(tmp_path / "rows" / "**" / "*.gz") == "rows"
    assert name_of(tmp_path / "rows", split="train") == "train"
    assert name_of(tmp_path / "rows", split="train", name="mine") == "mine"


@pytest.mark.parametrize("setting", ["split", "subset", "revision"])
def test_settings_of_a_dataset_are_refused_for_a_file(tmp_path, setting):
    save(tmp_path / "rows.jsonl", lines("x"))
    assert f"is a file and has no {setting} 'main'; remove it" in refused(tmp_path / "rows.jsonl", **{setting: "main"})
    assert f"is a glob and has no {setting} 'main'" in refused(tmp_path / "*.jsonl", **{setting: "main"})
    if setting == "revision":
        assert "is a folder and has no revision" in refused(tmp_path, revision="main", split="rows")


# Missing paths


def test_the_error_of_a_missing_path_suggests_similar_names(tmp_path, monkeypatch):
    save(tmp_path / "rows" / "train.jsonl", lines("x"))
    assert refused(tmp_path / "rows" / "trian.jsonl").endswith(f"did you mean {tmp_path}/rows/train.jsonl?")
    assert refused(tmp_path / "rwos" / "train.jsonl").endswith(f"did you mean {tmp_path}/rows?")
    assert refused(tmp_path / "zzz.jsonl").endswith(f"{tmp_path} holds rows/")
    assert refused(tmp_path / "rows" / "*.csv").endswith(f"{tmp_path}/rows holds train.jsonl")
    monkeypatch.chdir(tmp_path)
    assert refused("rows/trian.jsonl").endswith("did you mean rows/train.jsonl?")


def test_a_file_with_an_unknown_suffix_is_refused(tmp_path):
    for name in ("notes.txt", "rows", "rows.parquet.gz", "rows.gz", ".jsonl"):
        save(tmp_path / name, b"x")
        assert "must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow" in refused(tmp_path / name)
    assert "notes.txt" in refused(tmp_path / "*.txt")


def test_unreadable_paths_are_refused(tmp_path):
    assert "cannot be read: File name too long" in refused(tmp_path / ("x" * 5000))
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    refused(tmp_path / "loop.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nothing")
    assert "does not exist" in refused(tmp_path / "dangling.jsonl")
    refused("~nobody-of-that-name/rows.jsonl")


def test_pipes_and_devices_are_refused_without_reading(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "regular file" in refused(tmp_path / "pipe.jsonl")
    assert "regular file" in refused(tmp_path / "*.jsonl")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    assert "regular file" in refused(tmp_path / "zero.csv")


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Root ignores permissions, so run as another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can read, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_file_without_permission_is_refused(open_folder):
    file = save(open_folder / "folder" / "rows.jsonl", lines("x"))
    file.chmod(0)
    with an_ordinary_user():
        assert refused(file) == f"{file} cannot be read: Permission denied"
        with pytest.raises(DataError, match="Permission denied"):
            resolve_source(SourceConfig(path=str(file))).digest()
    file.parent.chmod(0)
    with an_ordinary_user():
        assert "cannot be read: Permission denied" in refused(file)
        assert "cannot be read: Permission denied" in refused(file.parent, split="rows")
    file.parent.chmod(0o755)


def test_a_file_that_vanishes_is_refused(tmp_path):
    file = save(tmp_path / "rows.jsonl", lines("x"))
    files = resolve_source(SourceConfig(path=str(file)))
    file.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(files.batches())


# Files without rows

TABLE = pyarrow.table({"text": ["x" * 1000] * 1000})


def parquet_bytes(table: pyarrow.Table = TABLE) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def arrow_bytes(new=pyarrow.ipc.new_file, table: pyarrow.Table = TABLE) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def arrow_with_wild_offsets() -> bytes:
    whole = arrow_bytes()
    offsets = struct.pack("<4i", 0, 1000, 2000, 3000)
    assert whole.count(offsets) == 1
    return whole.replace(offsets, struct.pack("<4i", 0, 1000, 2_000_000_000, 3000))


NO_ROWS = {
    "empty.jsonl": (b"", "has no rows"),
    "empty.json": (b"", "has no rows"),
    "empty.csv": (b"", "has no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "has no rows"),
    "empty.parquet": (b"", "is empty"),
    "empty.arrow": (b"", "is empty"),
    "zero_bytes.jsonl.gz": (b"", "has no rows"),
    "blank.jsonl": (b"\n \r\n\t\n", "has no rows"),
    "blank.json": (b"\n \r\n\t\n", "has no rows"),
    "mark.jsonl": (b"\xef\xbb\xbf", "has no rows"),
    "no_rows.parquet": (parquet_bytes(TABLE[:0]), "has no rows"),
    "no_rows.arrow": (arrow_bytes(table=TABLE[:0]), "has no rows"),
    "header.csv": (b"text,more\n", "has no rows"),
    "list.json": (b"[ ]", "has no rows"),
    "half.jsonl": (b"\xff\xfe" + "\ud800x".encode("utf-16-le", "surrogatepass"), "is not the UTF-16 text"),
    "utf32.jsonl": (lines("x").decode().encode("utf-32"), "looks like UTF-32 text"),
    "utf16be.jsonl": (lines("x").decode().encode("utf-16-be"), "looks like UTF-16 text"),
    "utf16le.csv": ("text\nx\n".encode("utf-16-le"), "looks like UTF-16 text"),
    "table.jsonl": (parquet_bytes(), "name it .parquet"),
    "table.csv": (arrow_bytes(), "looks like an arrow file"),
    "stream.json": (arrow_bytes(pyarrow.ipc.new_stream), "looks like an arrow stream"),
    "packed.jsonl": (gzip.compress(lines("x")), "looks like gzip"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "page.json": (b"<!DOCTYPE html>\n<html>", "a web page"),
    "plain.jsonl.gz": (lines("x"), "is broken or cut off"),
    "plain.jsonl.bz2": (lines("x"), "is broken or cut off"),
    "plain.jsonl.xz": (lines("x"), "is broken or cut off"),
    "plain.jsonl.zst": (lines("x"), "is broken or cut off"),
    "cut.jsonl.gz": (gzip.compress(lines("x") * 999)[:-20], "is broken or cut off"),
    "altered.jsonl.gz": (gzip.compress(lines("x") * 999)[:-8] + b"12345678", "is broken or cut off: CRC check failed"),
    "cut.jsonl.zst": (pyarrow.compress(lines("x") * 999, "zstd", asbytes=True)[:-9], "is broken or cut off"),
    "cut.parquet": (parquet_bytes()[:-100], ".parquet file"),
    "hollow.parquet": (parquet_bytes()[:200_000] + b"\xff" * 200_000 + parquet_bytes()[400_000:], "is damaged"),
    "text.parquet": (lines("x"), ".parquet file"),
    "cut.arrow": (arrow_bytes()[:500_000], ".arrow file"),
    "cut_stream.arrow": (arrow_bytes(pyarrow.ipc.new_stream)[:500_000], ".arrow file"),
    "text.arrow": (lines("x"), ".arrow file"),
    "wild.arrow": (arrow_with_wild_offsets(), ".arrow file"),
    "open_object.json": (b'{"data": [{"text": "x"}]', "is cut off: its object does not end"),
    "number.json": (b"7", "holds neither a list"),
    "open.json": (b'[{"text": "x"}, {"text": "y"', "is cut off: its list does not end; row 2"),
    "quote.json": (b'[{"text": "x"}, {"text": "y}]', "is cut off: its list does not end; row 2"),
    "escape.json": (b'[{"text": "\\', "is cut off: its list does not end; row 1"),
    "after.json": (b'[{"text": "x"}]\n[{"text": "y"}]', "goes on after the end of its list, which came after row 1"),
    "twins.csv": (b"a,a\n1,2\n", "has two columns of one name"),
    "header.tsv": (b"a\xe9\tb\n1\t2\n", "has no readable line of column names"),
    "quoted.csv": (b'"a,b\n1,2\n', "record of cells"),
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_a_file_that_holds_no_rows_is_refused(tmp_path, name):
    content, reason = NO_ROWS[name]
    file = save(tmp_path / name, content)
    message = refused(file)
    assert message.startswith(str(file)) and reason in message


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    assert "is a folder without rows" in refused(tmp_path / "rows.jsonl")
    save(tmp_path / "file", b"x")
    refused(tmp_path / "file" / "rows.jsonl")


# Digests


def test_files_with_other_rows_or_locations_have_another_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def digest(path: str, **settings) -> str:
        return resolve_source(SourceConfig(path=path, **settings)).digest()

    save(Path("a/train.jsonl"), lines("x"))
    save(Path("a/test.jsonl"), lines("x"))
    first = digest("a/train.jsonl")
    assert digest("a/train.jsonl", limit=3) == first == digest("a", split="train")
    assert digest("a", split="test") != first
    assert len(first) == len(hashlib.sha256().hexdigest())
    save(Path("a/train.jsonl"), lines("y"))
    assert digest("a/train.jsonl") != first
    both = digest("a/*")
    save(Path("a/train.jsonl"), b"")
    save(Path("a/test.jsonl"), lines("x", "y"))
    assert digest("a/*") != both


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub with one dataset, someone/rows, with two subsets of two splits."""
    folder = tmp_path / "hub"
    for subset in ("one", "two"):
        for split in ("train", "test"):
            save(folder / subset / f"{split}.jsonl", lines(*(f"{subset} {split} {i}" for i in range(3))))
    save(
        folder / "README.md",
        b"""---
configs:
- {config_name: one, data_files: [{split: train, path: one/train.jsonl}, {split: test, path: one/test.jsonl}]}
- {config_name: two, data_files: [{split: train, path: two/train.jsonl}, {split: test, path: two/test.jsonl}]}
---
""",
    )
    load = datasets.load_dataset

    def from_folder(path: str, *arguments, **settings):
        assert settings.pop("revision") is None
        place = str(folder) if path == "someone/rows" else path
        return load(place, *arguments, cache_dir=str(tmp_path / "cache"), **settings)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_hub_dataset_is_read_by_subset_and_split(hub):
    rows = list(rows_of(SourceConfig(path="someone/rows", subset="two", split="test", limit=2)))
    assert [row.value["text"] for row in rows] == ["two test 0", "two test 1"]
    assert [row.index for row in rows] == [0, 1]
    assert rows[1].location.startswith("someone/rows/") and rows[1].location.endswith("-test.arrow:row 2")
    assert name_of("someone/rows", subset="two", split="test") == "test"


def test_the_revision_is_passed_to_the_hub_and_no_code_is_run(monkeypatch):
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **settings: asked.update(settings) or {"train": 1})
    refused("someone/rows", revision="v2")
    assert asked["revision"] == "v2" and "trust_remote_code" not in asked


def test_an_unavailable_subset_or_split_is_an_error_with_the_setting(hub):
    assert "set split to one of train, test" in refused("someone/rows", subset="one")
    assert (
        "has no split 'dev'" in (message := refused("someone/rows", subset="one", split="dev")) and "'test'" in message
    )
    assert "has no subset 'three'" in (message := refused("someone/rows", subset="three", split="train"))
    assert "'one', 'two'" in message
    assert "has several subsets; set subset" in refused("someone/rows", split="train")
    assert "split must be one name" in refused("someone/rows", subset="one", split="train[:10%]")
    assert "split must be one name" in refused("someone/rows", subset="one", split="train+test")
    save(hub / "two" / "train.jsonl", lines("x") + b"{broken\n")
    assert "hub could not load it" in refused("someone/rows", subset="two", split="train")


def test_without_the_hub_the_error_names_similar_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "check the path or the network" in refused("openai/gsm8k", subset="main", split="train")
    save(tmp_path / "openai" / "gsm8k.jsonl", lines("x"))
    assert "did you mean openai/gsm8k.jsonl?" in refused("openai/gsm8k", subset="main", split="train")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "accept its terms"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "check its name"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "no longer supported"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the network"),
    ],
)
def test_errors_of_the_hub_are_advice(tmp_path, monkeypatch, error, advice):
    def fail(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert advice in refused("a/b", split="train")


def test_an_invalid_hub_id_never_reaches_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for path in ("rows", "./a/b", "/a/b", "a/b/c", "a/b.jsonl", "a/b.parquet", "~a/b", "../b", "a/"):
        refused(path, split="train")


def test_reading_text_loads_no_heavy_library(tmp_path):
    save(tmp_path / "rows.jsonl", lines("x"))
    code = (
        "import sys; from finetune.config.schema import SourceConfig;"
        "from finetune.data.sources.paths import resolve_source;"
        f"source = SourceConfig(path={str(tmp_path / 'rows.jsonl')!r});"
        "assert len(list(resolve_source(source).batches())) == 1;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
