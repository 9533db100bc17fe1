"""Documents equal the stored rows: shifted by one, truncated, with every loss counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.documents import Documents, cut_to_length
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.tokens.store import TokenStore
from tests.unit.data.tokens.test_store import batch, write

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 1.0, 0.5])), min_size=2, max_size=12),
    min_size=1,
    max_size=8,
)


def cut(store: TokenStore, policy: str, limit: int):
    cfg = DataConfig(train=[SourceConfig(path="x")], max_length=limit, truncation=policy)
    return cut_to_length(store, np.arange(len(store)), cfg)


@given(ROWS)
def test_labels_are_shifted_and_the_last_position_predicts_nothing(tmp_path_factory, rows):
    store = write(tmp_path_factory.mktemp("s") / "s", batch(rows))
    for row, document in zip(rows, cut(store, "drop", 12).documents, strict=True):
        ids, weights = [i for i, _ in row], [w for _, w in row]
        assert document.ids.tolist() == ids
        assert document.labels.tolist() == [
            i if w else IGNORE_INDEX for i, w in zip(ids[1:], weights[1:], strict=True)
        ] + [IGNORE_INDEX]
        expected = [*weights[1:], 0.0]
        assert (document.weights if document.weights is not None else np.sign(expected)).tolist() == expected


@given(ROWS, st.sampled_from(["drop", "left", "right", "split"]), st.integers(2, 11))
def test_no_document_is_longer_than_the_limit_and_its_targets_are_counted(tmp_path_factory, rows, policy, limit):
    store = write(tmp_path_factory.mktemp("s") / "s", batch(rows))
    result = cut(store, policy, limit)
    kept = result.documents
    assert (kept.lengths <= limit).all()
    assert [len(d) for d in kept] == kept.lengths.tolist()
    assert [d.target_tokens for d in kept] == kept.targets.tolist()
    assert result.too_long.tolist() == [i for i, row in enumerate(rows) if len(row) > limit]
    for document, row in zip(kept, kept.rows, strict=True):
        ids = [i for i, _ in rows[row]]
        if len(ids) <= limit:
            assert document.ids.tolist() == ids
        elif policy in ("left", "right"):
            assert document.ids.tolist() == (ids[-limit:] if policy == "left" else ids[:limit])
    if policy == "split":
        # Every target is in some piece, except the first token of a piece, which is not predicted.
        for i, row in enumerate(rows):
            expected = sum(w > 0 for position, (_, w) in enumerate(row) if position % limit or len(row) <= limit)
            if len(row) <= limit:
                expected -= row[0][1] > 0
            assert kept.targets[kept.rows == i].sum() == expected


def test_documents_of_several_stores_join_in_order(tmp_path: Path):
    stores = [write(tmp_path / str(i), batch([[(i, 1.0), (10 + i, 1.0)]] * (i + 1))) for i in range(3)]
    parts = [cut(store, "drop", 9).documents for store in stores]
    joined = Documents.join([Documents.join(parts[:2]), parts[2]])
    assert [d.ids.tolist() for d in joined] == [[0, 10], [1, 11], [1, 11], [2, 12], [2, 12], [2, 12]]
    assert [d.ids.tolist() for d in joined[1:4:2]] == [[1, 11], [2, 12]]
    assert joined.digest() != Documents.join(parts[::-1]).digest()


@pytest.mark.parametrize("policy", ["left", "right", "split", "drop"])
def test_a_row_that_loses_all_its_targets_is_named(tmp_path: Path, policy):
    silent_ends = [(1, 0.0)] * 4 + [(2, 1.0)] * 2 + [(1, 0.0)] * 4
    store = write(tmp_path / "s", batch([silent_ends, [(1, 1.0)] * 3]))
    result = cut(store, policy, 3)
    assert result.without_target.tolist() == ([0] if policy in ("left", "right") else [])
    assert result.documents.rows.tolist() == ([0, 1] if policy == "split" else [1])
