"""A manifest finds every change of what it lists, and a sealed object every change of its content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.system.errors import IntegrityError
from finetune.system.manifest import MANIFEST, check_files, differences, read_manifest, record_files
from finetune.system.sealed import seal, unseal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_listed_files_are_checked_and_others_are_not(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    record_files(tmp_path, ["a", "b"])
    check_files(tmp_path, ["a", "b", "c"])
    (tmp_path / "c").write_text("x")
    check_files(tmp_path, ["a", "b", "c", "missing"])
    (tmp_path / "b").write_text("x")
    check_files(tmp_path, ["a"])
    with pytest.raises(IntegrityError, match=r"b was altered"):
        check_files(tmp_path, ["a", "b"])
    (tmp_path / "a").write_text("longer")
    assert differences(tmp_path) == ["a has 6 bytes, not 1", "b was altered"]


def test_entries_are_replaced_and_forgotten(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    record_files(tmp_path, ["a", "b", "c"])
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").unlink()
    record_files(tmp_path, ["a", "b"], forget=["c"])
    assert read_manifest(tmp_path).keys() == {"a"} and differences(tmp_path) == []


def test_a_folder_without_a_manifest_is_read_unchecked(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    check_files(tmp_path, ["a"])
    assert read_manifest(tmp_path) == {}


def test_each_flipped_bit_of_a_manifest_is_found_or_changes_nothing(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    record_files(tmp_path, ["a"])
    content, entries = (tmp_path / MANIFEST).read_bytes(), read_manifest(tmp_path)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (tmp_path / MANIFEST).write_bytes(changed)
        try:
            found = read_manifest(tmp_path)
        except IntegrityError as error:
            assert MANIFEST in str(error)
        else:
            assert found == entries


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_sealed_object_is_read_back_through_json(content):
    assert unseal(json.loads(json.dumps(seal(content)))) == json.loads(json.dumps(content))


def test_a_changed_object_is_refused_and_one_of_an_older_version_is_read():
    sealed = seal({"a": 1, "b": [2.5]})
    with pytest.raises(ValueError, match="SHA-256"):
        unseal(sealed | {"a": 2})
    assert unseal({"a": 1, "sha256": "of something else"}) == {"a": 1, "sha256": "of something else"}
    for wrong in ([], {}, "text", None):
        with pytest.raises(ValueError, match="JSON object"):
            unseal(wrong)
