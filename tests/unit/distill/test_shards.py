"""A cache is read as it was written, and damage to writer, disk or files is detected.

Run as a program it is killed over and over while it fills a folder: see `kill_until_done`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill.cache import fill_cache
from finetune.distill.codec import Columns
from finetune.distill.fingerprint import KEY_BYTES, key_of
from finetune.distill.shards import COMPLETE, FINGERPRINT, ShardReader, check_fingerprint, open_folder
from finetune.system.errors import ConfigError, IntegrityError, ResourceError
from finetune.system.sealed import seal, unseal

ORIGIN = {"version": 1, "kept": {"cache_kind": "sampled", "head": 2}}


def documents(count: int) -> list[Document]:
    """Of 1 to 7 targets; every fifth has none."""
    made = []
    for i in range(count):
        labels = np.full(9, IGNORE_INDEX, dtype=np.int32)
        labels[: 0 if i % 5 == 4 else 1 + i % 7] = 3
        made.append(Document(np.array([i, *range(8)], dtype=np.int32), labels, f"rows:{i + 1}"))
    return made


def columns_of(document: Document, width: int = 3) -> Columns:
    """Targets that identify the document's first token."""
    rng = np.random.default_rng(int(document.ids[0]))
    n = document.target_tokens
    return {"low": rng.integers(0, 2**16, (n, width), dtype=np.uint16), "entropy": rng.random(n, dtype=np.float32)}


def encode(some: Sequence[Document]) -> Iterator[Columns]:
    return map(columns_of, some)


def fill(folder: Path, some: Sequence[Document], encode=encode, flush_seconds: float = 1e9) -> int:
    return fill_cache(
        folder, ORIGIN, some, encode, group_tokens=20, progress=lambda done, total: None, flush_seconds=flush_seconds
    )


def keyed(some: Sequence[Document]) -> dict[bytes, Document]:
    return {key: document for document in some if (key := key_of(document)) is not None}


def assert_holds(folder: Path, some: Sequence[Document], width: int = 3) -> None:
    """The cache is complete and has the targets of each document."""
    reader = ShardReader(folder)
    for key, document in keyed(some).items():
        assert not len(reader.missing([key]))
        assert_equal(reader.read([key]), columns_of(document, width))


def assert_equal(found: Columns, wanted: Columns) -> None:
    assert found.keys() == wanted.keys()
    for name, column in wanted.items():
        assert found[name].dtype == column.dtype and np.array_equal(found[name], column), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete cache of four shards."""
    for count in (10, 20, 30, 40):
        fill(tmp_path / "cache", documents(count))
    assert len(list((tmp_path / "cache").glob("shard-*.safetensors"))) == 4
    return tmp_path / "cache"


# Reading


@pytest.mark.parametrize("name", ["../shard-00000.safetensors", "/etc/hostname", "", "x.safetensors"])
def test_a_list_of_shards_names_files_of_its_own_folder_only(folder, name):
    listed = unseal(json.loads((folder / COMPLETE).read_text()))
    listed["shards"][name] = listed["shards"].pop("shard-00000.safetensors")
    (folder / COMPLETE).write_text(json.dumps(seal(listed)))
    with pytest.raises(IntegrityError, match="which is no shard"):
        ShardReader(folder)


def rewrite(folder: Path, change) -> None:
    """Change the tensors of the first shard, and write the right sums for them."""
    shard = folder / "shard-00000.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    listed = unseal(json.loads((folder / COMPLETE).read_text()))
    content = shard.read_bytes()
    listed["shards"][shard.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / COMPLETE).write_text(json.dumps(seal(listed)))


ODD = {
    "no keys": lambda tensors: tensors.pop("keys"),
    "fewer keys": lambda tensors: tensors.update(keys=tensors["keys"][1:]),
    "keys of another width": lambda tensors: tensors.update(keys=tensors["keys"][:, :8].copy()),
    "counts that are negative": lambda tensors: tensors["counts"].__setitem__(0, -1),
    "counts beyond the rows": lambda tensors: tensors["counts"].__setitem__(0, 10**6),
    "counts of fractions": lambda tensors: tensors.update(counts=tensors["counts"].astype(np.float32)),
    "a column too short": lambda tensors: tensors.update(low=tensors["low"][1:]),
    "a column without rows": lambda tensors: tensors.update(low=np.array(1, np.uint16)),
}


@pytest.mark.parametrize("name", ODD)
def test_a_shard_whose_parts_do_not_fit_each_other_is_named(folder, name):
    rewrite(folder, ODD[name])
    with pytest.raises(IntegrityError, match=r"shard-00000.safetensors is corrupt"):
        ShardReader(folder)


def test_a_shard_with_other_columns_than_its_kind_is_named(folder):
    layout = {"low": ("U16", 2), "entropy": ("F32", 1)}
    ShardReader(folder).check_layout(layout)
    for change in (lambda tensors: tensors.pop("low"), lambda tensors: tensors.update(low=tensors["entropy"])):
        rewrite(folder, change)
        with pytest.raises(IntegrityError, match=r"shard-00000.safetensors is corrupt: .*low"):
            ShardReader(folder).check_layout(layout)


def test_documents_are_read_in_any_order_repeated_and_across_shards(folder):
    by_key = keyed(documents(40))
    reader, rng = ShardReader(folder), random.Random(0)
    for size in (1, 2, 7, 100):
        keys = rng.choices(list(by_key), k=size)
        parts = [columns_of(by_key[key]) for key in keys]
        assert_equal(reader.read(keys), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def test_no_document_gives_columns_without_entries(folder):
    assert_equal(ShardReader(folder).read([]), columns_of(documents(5)[4]))
    assert not len(ShardReader(folder).missing([]))


def test_a_cache_of_no_documents_is_complete_and_lacks_all_others(tmp_path):
    assert fill(tmp_path / "cache", documents(5)[4:]) == 0
    reader = ShardReader(tmp_path / "cache")
    assert reader.missing([b"k" * KEY_BYTES]).tolist() == [0] and reader.read([]) == {}


def test_missing_documents_are_returned_by_index(folder):
    keys = [*keyed(documents(50))]
    rng = random.Random(1)
    rng.shuffle(keys)
    there = keyed(documents(40)).keys()
    assert ShardReader(folder).missing(keys).tolist() == [i for i, key in enumerate(keys) if key not in there]
    with pytest.raises(AssertionError, match="check_holds"):
        ShardReader(folder).read(keys)


def test_keys_with_a_common_prefix_or_suffix_are_distinct(tmp_path):
    keys = [b"12345678" + bytes([0, 0, 0, 0, 0, 0, i, j]) for i in (0, 1, 255) for j in (0, 1, 255)]
    keys += [bytes(KEY_BYTES), bytes([0] * 15 + [1]), b"\xff" * KEY_BYTES, b"\xff" * 15 + b"\0"]
    some = [columns_of(document) for document in documents(60) if document.target_tokens][: len(keys)]
    with open_folder(tmp_path / "cache", ORIGIN) as writer:
        for key, columns in zip(keys, some, strict=True):
            writer.add(key, columns)
        writer.finish()
    reader = ShardReader(tmp_path / "cache")
    for key, columns in zip(keys, some, strict=True):
        assert_equal(reader.read([key]), columns)
    assert reader.missing([b"12345678" + bytes([9] * 8), *keys]).tolist() == [0]


def test_a_shard_is_written_once_it_is_full(tmp_path):
    big = {"hidden": np.zeros((1 << 20, 9), dtype=np.uint16)}
    with open_folder(tmp_path / "cache", ORIGIN) as writer:
        writer.add(b"k" * KEY_BYTES, big)
        assert [file.stat().st_size // 2**20 for file in (tmp_path / "cache").glob("*.safetensors")] == [18]


# Going on


def test_a_second_run_writes_nothing_and_more_rows_add_only_themselves(folder):
    def never(some: Sequence[Document]) -> Iterator[Columns]:
        raise AssertionError("nothing is lacking")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert fill(folder, documents(40), never) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    encoded: list[Document] = []

    def recording(some: Sequence[Document]) -> Iterator[Columns]:
        encoded.extend(some)
        return encode(some)

    assert fill(folder, [*documents(50), *documents(50)], recording) == len(keyed(documents(50)[40:])) == len(encoded)
    assert_holds(folder, documents(50))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_documents_before_a_failure_are_kept(tmp_path, error):
    def fails(some: Sequence[Document]) -> Iterator[Columns]:
        for document in some:
            if document.ids[0] == 17:
                raise error
            yield columns_of(document)

    with pytest.raises(error):
        fill(tmp_path / "cache", documents(40), fails)
    assert fill(tmp_path / "cache", documents(40)) == len(keyed(documents(40)[17:]))
    assert_holds(tmp_path / "cache", documents(40))


def test_progress_starts_with_the_stored_documents_and_counts_each(tmp_path):
    fill(tmp_path / "cache", documents(10))
    reported: list[tuple[int, int]] = []
    fill_cache(
        tmp_path / "cache",
        ORIGIN,
        documents(20),
        encode,
        group_tokens=20,
        progress=lambda *figures: reported.append(figures),
    )
    assert reported == [(done, 16) for done in range(8, 17)]


def test_an_incomplete_cache_is_refused_with_the_command(tmp_path):
    with open_folder(tmp_path / "cache", ORIGIN) as writer:
        writer.add(b"k" * KEY_BYTES, columns_of(documents(1)[0]))
    with pytest.raises(ConfigError, match=r"cache is not complete\nhelp: run finetune cache"):
        ShardReader(tmp_path / "cache")


def test_a_cache_in_writing_serves_its_earlier_documents(folder):
    with pytest.raises(RuntimeError), open_folder(folder, ORIGIN) as writer:
        writer.add(b"k" * KEY_BYTES, columns_of(documents(1)[0]))
        writer.flush()
        raise RuntimeError
    assert_holds(folder, documents(40))
    assert ShardReader(folder).missing([b"k" * KEY_BYTES]).tolist() == [0]
    fill(folder, documents(40))
    assert not len(ShardReader(folder).missing([b"k" * KEY_BYTES]))


def kill_until_done(folder: Path, count: int) -> int:
    """Fill the folder, a shard a document, in processes that get SIGKILL at random moments; returns how many did."""

    def shards() -> int:
        return len(list(folder.glob("shard-*.json")))

    rng, killed = random.Random(0), 0
    while True:
        enough = shards() + rng.randrange(10)
        if not (process := os.fork()):
            fill(folder, documents(count), flush_seconds=-1)
            os._exit(0)
        ended = 0
        while not ended and shards() < enough:
            time.sleep(0.001)
            ended, status = os.waitpid(process, os.WNOHANG)
        if not ended:
            time.sleep(rng.uniform(0, 0.005))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return killed
        killed += 1


def test_a_writer_killed_at_any_moment_ends_with_the_content_of_an_unbroken_one(tmp_path, repo_root):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "killed")],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 5, "it was killed so often"
    assert_holds(tmp_path / "killed", documents(100))
    names = {file.name for file in (tmp_path / "killed").iterdir()}
    shards = json.loads((tmp_path / "killed" / COMPLETE).read_text())["shards"]
    notes = {name.replace(".safetensors", ".json") for name in shards}
    assert names == {FINGERPRINT, COMPLETE, ".lock", *shards, *notes}, "nothing half done stays"


@pytest.mark.parametrize(
    "left",
    [".fingerprint.json.tmp", ".shard-00007.safetensors.tmp", ".shard-00007.json.tmp", "shard-00007.safetensors"],
)
def test_incomplete_files_of_a_killed_writer_are_removed(tmp_path, left):
    if not left.startswith(".fingerprint"):
        fill(tmp_path, documents(5))
    (tmp_path / left).write_text("{")
    fill(tmp_path, documents(10))
    assert_holds(tmp_path, documents(10))
    assert not (tmp_path / left).exists()


def test_only_one_process_writes(tmp_path):
    def second(some: Sequence[Document]) -> Iterator[Columns]:
        with pytest.raises(ConfigError, match=r"another process is writing to .*cache\nhelp: wait"):
            fill(tmp_path / "cache", documents(10))
        return encode(some)

    assert fill(tmp_path / "cache", documents(10), second) == 8
    assert fill(tmp_path / "cache", documents(10)) == 0


# The disk


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def wide(some: Sequence[Document]) -> Iterator[Columns]:
    return (columns_of(document, 10_000) for document in some)


def test_a_full_disk_keeps_earlier_documents_and_the_writer_continues_later(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "1m"):
        with pytest.raises(ResourceError, match=r"the disk of .*cache is full\nhelp: free some space") as failure:
            fill(disk / "cache", documents(40), wide, flush_seconds=-1)
        assert failure.value.exit_code == 4
        written = {file.name: file.read_bytes() for file in (disk / "cache").glob("shard-*.json")}
        assert len(written) >= 3
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert fill(disk / "cache", documents(40), wide, flush_seconds=-1) == 32 - len(written)
        assert {name: (disk / "cache" / name).read_bytes() for name in written} == written
        assert_holds(disk / "cache", documents(40), 10_000)


@pytest.mark.parametrize("call", range(1, 8))
def test_a_disk_full_at_any_rename_loses_nothing(tmp_path, monkeypatch, call):
    calls = iter(range(1, 100))

    def full(source: Path, target: Path) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Path(source).rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ResourceError):
            for count in (5, 10, 15):
                fill(tmp_path / "cache", documents(count))
    fill(tmp_path / "cache", documents(20))
    assert_holds(tmp_path / "cache", documents(20))


def test_a_read_only_folder_or_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"file cannot be written to: .*File exists"):
        fill(tmp_path / "file", documents(5))
    with pytest.raises(ConfigError, match=r"fingerprint.json cannot be read: Not a directory"):
        check_fingerprint(tmp_path / "file", ORIGIN)
    with small_disk(tmp_path / "disk", "1m"):
        fill(tmp_path / "disk" / "cache", documents(5))
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(ConfigError, match=r"cache cannot be written to: .*Read-only file system"):
            fill(tmp_path / "disk" / "cache", documents(10))
        assert_holds(tmp_path / "disk" / "cache", documents(5))


# Damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(2).randrange(len(content))] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "missing": Path.unlink,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_shard_is_named_and_only_its_documents_are_written_again(folder, damage):
    shard = folder / "shard-00001.safetensors"
    DAMAGES[damage](shard)
    with pytest.raises(IntegrityError, match=shard.name) as failure:
        ShardReader(folder)
    assert failure.value.exit_code == 3 and "remove both files" in str(failure.value)
    if damage != "missing":
        with pytest.raises(IntegrityError, match=shard.name):
            fill(folder, documents(40))
        shard.unlink()
    with pytest.raises(IntegrityError, match=shard.name):
        fill(folder, documents(40))
    shard.with_suffix(".json").unlink()
    assert fill(folder, documents(40)) == len(keyed(documents(20)[10:]))
    assert_holds(folder, documents(40))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sha256": 5}', "\udcff"])
def test_a_corrupt_note_of_a_shard_is_named(folder, content):
    note = folder / "shard-00002.json"
    note.write_text(content, errors="surrogateescape")
    with pytest.raises(IntegrityError, match=note.stem):
        fill(folder, documents(40))


@pytest.mark.parametrize(
    "content", ["", '{"shards": {', "[]", "{}", '{"shards": 3}', '{"shards": {"shard-00000.safetensors": 1}}']
)
def test_a_corrupt_list_of_shards_is_named_and_written_again(folder, content):
    (folder / COMPLETE).write_text(content)
    with pytest.raises(IntegrityError, match=r"complete\.json|shard-00000"):
        ShardReader(folder)
    (folder / COMPLETE).unlink()
    assert fill(folder, documents(40)) == 0
    assert_holds(folder, documents(40))


@pytest.mark.parametrize("content", ["", '{"kept": {', "[]", "\udcff"])
def test_a_corrupt_fingerprint_is_named(folder, content):
    (folder / FINGERPRINT).write_text(content, errors="surrogateescape")
    for act in (lambda: check_fingerprint(folder, ORIGIN), lambda: fill(folder, documents(40))):
        with pytest.raises(IntegrityError, match=r"fingerprint\.json is corrupt(.|\n)*write a new folder"):
            act()


def test_a_folder_with_other_files_or_without_a_cache_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        fill(tmp_path, documents(5))
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", ".lock"}
    with pytest.raises(ConfigError, match=r"not a cache\nhelp: .*finetune cache"):
        check_fingerprint(tmp_path / "nowhere", ORIGIN)


if __name__ == "__main__":
    print(kill_until_done(Path(sys.argv[1]), 100))
