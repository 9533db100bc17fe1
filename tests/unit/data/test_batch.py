"""Documents with equal prefixes share the rows of a forward pass; documents with different media share none."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batch import assign_rows, build_batch
from finetune.data.documents import Document
from finetune.data.media.media import Media
from finetune.data.positions import PlacedMedia
from finetune.distill.fingerprint import key_of, keys_of
from finetune.models.families import PositionRule

# Few distinct tokens: random documents then share prefixes of every length, and some are equal or a prefix of another.
DOCUMENTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


def document(ids: list[int], image: bytes = b"") -> Document:
    """Tokens that are all targets. image: digest of an image that stands for the first token; empty for none."""
    tokens = np.array(ids, dtype=np.int32)
    items = (Media("image", image, "i.png", 1, (1, 2, 2)),)
    placed = PlacedMedia(items, (0,), PositionRule(25, True)) if image else None
    return Document(tokens, tokens, "rows:1", placed=placed)


@given(DOCUMENTS, st.data())
def test_two_tokens_share_a_row_exactly_if_they_end_the_same_prefix_after_the_same_media(texts, data):
    media = [data.draw(st.sampled_from([b"", b"a", b"b"])) for _ in texts]
    rows = assign_rows([document(*pair) for pair in zip(texts, media, strict=True)])
    prefixes = [(image, text[: i + 1]) for text, image in zip(texts, media, strict=True) for i in range(len(text))]
    distinct = [prefix for i, prefix in enumerate(prefixes) if prefix not in prefixes[:i]]
    if len(distinct) > 0.97 * len(prefixes):
        assert rows.tolist() == list(range(len(prefixes)))
    else:  # numbered by their first token
        assert rows.tolist() == [distinct.index(prefix) for prefix in prefixes]


def test_large_ids_and_negative_differences_sort_like_any_others():
    documents = [document([151_643, 5, 9]), document([7]), document([151_643, 5, 300])]
    assert assign_rows(documents).tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert assign_rows(documents, share_prefixes=False).tolist() == list(range(7))


def test_documents_with_equal_ids_and_different_media_share_no_row_and_no_teacher_key():
    text = document([5, 6, 7, 8])
    images = [document([5, 6, 7, 8], bytes([i]) * 16) for i in (1, 2)]
    batch = build_batch([text, *images, images[0]], share_prefixes=True)
    assert batch.row_of_token.tolist() == [*range(12), *range(4, 8)]
    assert len({key_of(each) for each in (text, *images)}) == 3
    assert [key for key, _ in keys_of(batch)] == [key_of(each) for each in (text, *images, images[0])]
