"""A store reads back what was written; an incomplete store is not valid."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.encoded import Encoded
from finetune.data.media.media import Media
from finetune.data.positions import PlacedMedia
from finetune.data.tokens.store import (
    ROW,
    BadRow,
    EncodedBatch,
    StoreWriter,
    TokenStore,
    has_outdated_bad_rows,
    is_valid,
)
from finetune.models.families import PositionRule
from finetune.system.errors import DataError
from finetune.system.sealed import seal, unseal

WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 2.25])
ROWS = st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), WEIGHTS), min_size=1, max_size=9), max_size=20)


def encoded(row: list[tuple[int, float]]) -> Encoded:
    return Encoded(np.array([i for i, _ in row], np.int32), np.array([weight for _, weight in row], np.float32))


def batch(
    rows: list[list[tuple[int, float]]],
    first: int = 0,
    file: str = "a.jsonl",
    *,
    bad: tuple = (),
    media: tuple = (),
    chosen: tuple = (),
) -> EncodedBatch:
    pieces = [encoded(row) for row in rows]
    columns = [(len(piece.ids), piece.targets, first + i, i + 1, 0, 0, i) for i, piece in enumerate(pieces)]
    return EncodedBatch(
        file=file,
        unit="line" if file.endswith("jsonl") else "row",
        rows=np.array(columns, ROW),
        ids=np.concatenate([np.empty(0, np.int32), *(piece.ids for piece in pieces)]),
        weights=np.concatenate([np.empty(0, np.float32), *(piece.weights for piece in pieces)]),
        placed=media or (None,) * len(rows),
        chosen_tokens=chosen or (None,) * len(rows),
        bad=bad,
        bytes_read=0,
    )


def write(folder: Path, *batches: EncodedBatch) -> TokenStore:
    writer = StoreWriter(folder)
    for part in batches:
        writer.append(part)
    writer.finish({"made": "here"})
    return TokenStore(folder)


@given(st.lists(ROWS, max_size=3))
def test_rows_come_back_as_they_were_written(tmp_path_factory, batches):
    store = write(tmp_path_factory.mktemp("store") / "s", *map(batch, batches))
    rows = [row for part in batches for row in part]
    assert len(store) == len(rows)
    for read, row in zip(store, rows, strict=True):
        assert read.ids.tolist() == [i for i, _ in row]
        assert read.weights.tolist() == [w for _, w in row]
    # The first token of a row is not predicted.
    assert store.targets.tolist() == [sum(w > 0 for _, w in row[1:]) for row in rows]


def test_locations_name_file_and_line_or_row(tmp_path):
    one = [[(1, 1.0), (2, 1.0)]]
    store = write(tmp_path / "s", batch(one * 2), batch(one, 2, "b.parquet"))
    assert [store.location(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:2", "b.parquet:row 1"]


def test_bad_rows_are_listed(tmp_path):
    store = write(tmp_path / "s", batch([], bad=(BadRow(3, "a.jsonl:4", "is not JSON"),)))
    assert store.meta.bad_rows == 1
    assert json.loads(store.bad_rows.read_text()) == {"index": 3, "place": "a.jsonl:4", "reason": "is not JSON"}


@pytest.mark.parametrize("name", ["ids.bin", "codes.bin", "rows.npz", "meta.json", "bad_rows.jsonl"])
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_an_incomplete_store_is_not_valid(tmp_path, name, harm):
    write(tmp_path / "s", batch([[(1, 1.0), (2, 1.0)]], bad=(BadRow(3, "a.jsonl:4", "is not JSON"),)))
    assert is_valid(tmp_path / "s")
    file = tmp_path / "s" / name
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert not is_valid(tmp_path / "s")


@pytest.mark.parametrize(
    "change", [{"weights": ["x"]}, {"rows": "many"}, {"sizes": "none"}, {"files": 3}, {"notes": [[[]]]}, "[" * 100_000]
)
def test_a_record_of_wrong_types_is_not_valid(tmp_path, change):
    write(tmp_path / "s", batch([[(1, 1.0)]]))
    file = tmp_path / "s" / "meta.json"
    # Sealed anew, as another program would write it.
    meta = change if isinstance(change, str) else json.dumps(seal({**unseal(json.loads(file.read_text())), **change}))
    file.write_text(meta)
    assert not is_valid(tmp_path / "s") and not has_outdated_bad_rows(tmp_path / "s")


def test_the_content_digest_follows_tokens_weights_and_borders(tmp_path):
    def content(name: str, rows: list[list[tuple[int, float]]], file: str = "a.jsonl") -> str:
        return write(tmp_path / name, batch(rows, file=file)).meta.content

    rows = [[(1, 0.0), (2, 1.0)], [(3, 0.0), (4, 1.0)]]
    others = [
        [[(1, 0.0), (2, 1.0)], [(3, 0.0), (5, 1.0)]],
        [[(1, 0.0), (2, 0.5)], [(3, 0.0), (4, 1.0)]],
        [[(1, 0.0), (2, 0.25)], [(3, 0.0), (4, 1.0)]],
        [[(1, 0.0), (2, 1.0), (3, 0.0)], [(4, 1.0)]],
    ]
    digests = [content(str(i), other) for i, other in enumerate([rows, *others])]
    assert len(set(digests)) == len(digests)
    apart = write(tmp_path / "apart", batch(rows[:1], file="b.jsonl"), batch(rows[1:], file="c.parquet"))
    assert apart.meta.content == digests[0]


def placed(folder: Path, name: str, kind: str = "image") -> PlacedMedia:
    (file := folder / name).write_text(name)
    items = tuple(Media(kind, name.encode() * 16, str(file), 1, (1, 2, 2), 0.5 * i, i) for i in (1, 2))
    return PlacedMedia(items, (0, 1), PositionRule(25, True))


def test_media_come_back_and_enter_the_content_digest(tmp_path):
    rows = [[(1, 0.0), (2, 1.0)], [(3, 0.0), (4, 1.0)]]
    text = write(tmp_path / "text", batch(rows))
    given = [placed(tmp_path, name) for name in "ab"]
    media = [write(tmp_path / f"store {i}", batch(rows, media=(None, each))) for i, each in enumerate(given)]
    assert [piece.placed for piece in (*text, *media[0], *media[1])] == [None, None, None, given[0], None, given[1]]
    assert media[0].has_media.tolist() == [False, True]
    assert len({store.meta.content for store in (text, *media)}) == 3
    # The digest and the files of a text store never change, so stores made by earlier versions stay valid.
    assert text.meta.content == "6edbaedc5521353df2d8c7d744b71d1f97f6ec67728042769dbbdc79df554a37"
    files = {"ids.bin", "codes.bin", "rows.npz", "meta.json", "bad_rows.jsonl"}
    assert {file.name for file in text.folder.iterdir()} == files
    assert not np.load(text.folder / "rows.npz").keys() & {"media_ends"}


@pytest.mark.parametrize("change", ["written", "longer", "deleted"])
def test_a_store_is_not_valid_once_a_file_of_its_media_changed(tmp_path, change):
    store = write(tmp_path / "s", batch([[(1, 0.0), (2, 1.0)]], media=(placed(tmp_path, "a"),)))
    assert is_valid(store.folder)
    file = tmp_path / "a"
    match change:
        case "written":
            os.utime(file, ns=(0, 1))
        case "longer":
            file.write_text("longer")
        case "deleted":
            file.unlink()
    assert not is_valid(store.folder)


def test_more_weights_than_a_byte_can_index_are_refused(tmp_path):
    with pytest.raises(DataError, match="more than 254 different weights"):
        write(tmp_path / "s", batch([[(1, 0.0), *((2, i / 1000) for i in range(1, 300))]]))
