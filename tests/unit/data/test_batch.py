"""Rows shared by documents that open alike."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batch import share_prefixes

# Few distinct tokens: random documents then share openings of every length, and some are equal or open another.
DOCUMENTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


@given(DOCUMENTS)
def test_two_tokens_share_a_row_exactly_if_they_end_the_same_opening(texts: list[list[int]]):
    rows = share_prefixes([np.array(text, dtype=np.int32) for text in texts])
    openings = [tuple(text[: i + 1]) for text in texts for i in range(len(text))]
    distinct = list(dict.fromkeys(openings))
    if len(distinct) > 0.97 * len(openings):
        assert rows.tolist() == list(range(len(openings)))
    else:  # numbered by their first token
        assert rows.tolist() == [distinct.index(opening) for opening in openings]


def test_tokens_of_large_ids_and_negative_differences_sort_like_any_others():
    ids = [np.array([151_643, 5, 9], np.int32), np.array([7], np.int32), np.array([151_643, 5, 300], np.int32)]
    assert share_prefixes(ids).tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert share_prefixes(ids, share=False).tolist() == list(range(7))
