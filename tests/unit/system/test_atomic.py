"""A file that a command writes is whole under its name, or is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.system.atomic import commit_folder, replaced_file, whole_file, write_bytes, write_text
from finetune.system.errors import InputError


def test_the_file_appears_at_the_end_and_nothing_else_stays(tmp_path: Path):
    with whole_file("html", str(tmp_path / "page.html")) as stream:
        stream.write("half")
        assert not (tmp_path / "page.html").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "half"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]):
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(error), whole_file("html", str(tmp_path / "page.html")) as stream:
        stream.write("new")
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_a_file_is_replaced_only_if_the_caller_allows_it(tmp_path: Path):
    file = tmp_path / "page.html"
    file.write_text("old")
    with pytest.raises(InputError, match=r"out=.*exists already"), whole_file("out", str(file), replace=False):
        pass
    with whole_file("html", str(file)) as stream:
        stream.write("new")
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    ("path", "said"),
    [("", "name a file"), (".", "is a folder"), ("none/x", "No such file"), ("\0", "null"), ("x" * 300, "too long")],
)
def test_a_path_that_cannot_be_written_fails_before_the_work(tmp_path, monkeypatch, path: str, said: str):
    monkeypatch.chdir(tmp_path)
    worked = []
    with pytest.raises(InputError, match=said), whole_file("dump", path):
        worked.append(1)
    assert not worked and not list(tmp_path.iterdir())


def test_only_a_regular_file_is_replaced(tmp_path: Path):
    (tmp_path / "link").symlink_to("nowhere")
    for path in ("/dev/null", str(tmp_path / "link")):
        with pytest.raises(InputError, match="not a regular file"), whole_file("html", path):
            pass


def test_half_a_surrogate_pair_is_escaped_as_in_json(tmp_path: Path):
    with whole_file("out", str(tmp_path / "rows.jsonl")) as stream:
        stream.write('"\ud800"\n')
    assert (tmp_path / "rows.jsonl").read_bytes() == b'"\\ud800"\n'


def test_a_text_is_replaced_in_one_rename(tmp_path: Path):
    write_text(tmp_path / "note.json", "a")
    write_text(tmp_path / "note.json", "b")
    assert [file.name for file in tmp_path.iterdir()] == ["note.json"] and (tmp_path / "note.json").read_text() == "b"


@pytest.mark.parametrize("durable", [True, False])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool):
    file = tmp_path / "note.bin"
    write_bytes(file, b"old", durable)
    with pytest.raises(KeyboardInterrupt), replaced_file(file, durable) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_replaces_another_with_all_its_files(tmp_path: Path):
    for name in ("new", "old"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / f"{name}.txt").write_text(name)
    commit_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "old" / "inner").iterdir()] == ["new.txt"]
