"""A document has one key in any batch, and another key if anything that changes the teacher's targets differs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batch import build_batch, dummy_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill.fingerprint import KEY_BYTES, key_of, keys_of


def document(ids: list[int], targets: list[int]) -> Document:
    """targets: positions that predict the token after them; the last position predicts nothing."""
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    labels[targets] = np.array(ids, dtype=np.int32)[np.array(targets, dtype=np.int64) + 1]
    return Document(np.array(ids, dtype=np.int32), labels, "rows:1")


@st.composite
def documents(draw: st.DrawFn) -> Document:
    ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    targets = draw(st.lists(st.sampled_from(range(len(ids) - 1)), unique=True)) if len(ids) > 1 else []
    return document(ids, sorted(targets))


def meaning(some: Document) -> tuple[list[int], list[int]] | None:
    """The inputs of a teacher's targets: ids up to the last target, and the positions of the targets."""
    targets = np.flatnonzero(some.labels != IGNORE_INDEX).tolist()
    return (some.ids[: targets[-1] + 1].tolist(), targets) if targets else None


@given(documents(), documents())
def test_two_keys_are_equal_if_the_teachers_inputs_are(a, b):
    assert (key_of(a) == key_of(b)) == (meaning(a) == meaning(b))
    assert (key_of(a) is None) == (meaning(a) is None)


def test_every_id_up_to_the_last_target_and_every_place_of_a_target_counts():
    base = document([7, 8, 9, 10, 11, 12], [2, 4])
    keys = [key_of(base)]
    for t in range(5):
        ids = base.ids.copy()
        ids[t] += 1
        keys.append(key_of(replace(base, ids=ids)))
    keys += [key_of(document(base.ids.tolist(), targets)) for targets in ([2], [4], [1, 4], [2, 3], [1, 2, 4])]
    assert len(set(keys)) == len(keys) == 11 and all(len(key) == KEY_BYTES for key in keys)


@pytest.mark.parametrize(
    "changed",
    [
        lambda d: replace(
            d, ids=np.append(d.ids, [3, 4]).astype(np.int32), labels=np.append(d.labels, [IGNORE_INDEX] * 2)
        ),
        lambda d: replace(d, ids=d.ids[:-1], labels=d.labels[:-1]),
        lambda d: replace(d, weights=np.linspace(0, 1, len(d), dtype=np.float32)),
        lambda d: replace(d, location="other:9", row=8),
        lambda d: replace(d, ids=d.ids.astype(np.int64), labels=d.labels.astype(np.int64)),
        lambda d: replace(d, ids=np.repeat(d.ids, 2)[::2]),
    ],
    ids=["longer", "shorter", "weights", "place", "int64", "strided"],
)
def test_tokens_that_no_target_sees_do_not_change_the_key(changed):
    some = document([7, 8, 9, 10, 11, 12], [2, 3])
    assert key_of(changed(some)) == key_of(some)


@given(st.lists(documents(), min_size=1, max_size=6), st.booleans(), st.randoms())
def test_a_batch_has_the_keys_of_its_documents(some, share_prefixes, random):
    random.shuffle(some)
    wanted = [(key, d.target_tokens) for d in some if (key := key_of(d)) is not None]
    assert list(keys_of(build_batch(some, share_prefixes=share_prefixes))) == wanted


def test_batches_of_any_size_and_documents_with_weights_have_the_same_keys():
    some = [document([1, 2, 3, i], [1, 2]) for i in range(6)] + [document([4, 5], [])]
    some[2] = replace(some[2], weights=np.full(4, 0.5, np.float32))
    alone = [pair for each in some for pair in keys_of(build_batch([each]))]
    assert len(alone) == 6
    for size, share_prefixes in itertools.product((2, 3, 7), (False, True)):
        batches = [build_batch(some[i : i + size], share_prefixes=share_prefixes) for i in range(0, len(some), size)]
        assert [pair for batch in batches for pair in keys_of(batch)] == alone


def test_without_a_target_there_is_no_key():
    assert key_of(document([1, 2, 3], [])) is None
    assert list(keys_of(dummy_batch(document([1, 2, 3], [0, 1])))) == []


def test_the_key_of_a_text_never_changes():
    """Caches made by earlier versions stay valid."""
    assert key_of(document([7, 8, 9, 10], [1, 2])).hex() == "5d1289b9a1883d1b20a8cf21f469d1ec"
