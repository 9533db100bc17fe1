"""Rows that are already tokenized: labels and masks select targets, padding is cut off."""

from __future__ import annotations

import pytest

from finetune.config.schema import SourceConfig
from finetune.data.formats.detection import detect_format
from finetune.data.formats.messages import TokenRow
from finetune.data.formats.parser import RowParser
from finetune.system.errors import DataError

IDS = [5, 6, 7, 8]


def parse(row, columns: dict[str, str] | None = None):
    return RowParser(SourceConfig(path="rows.jsonl", columns=columns or {}), "tokens", "a system text").parse(row)


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({}, None),
        ({"labels": None, "attention_mask": None, "completion_mask": None}, None),
        ({"attention_mask": [1, 1, 1, 1], "token_type_ids": [0, 0, 0, 0], "length": 4}, None),
        ({"labels": IDS}, (5, 6, 7, 8)),
        ({"labels": [-100, -100, 7, 8]}, (-100, -100, 7, 8)),
        ({"labels": [-100] * 4}, (-100,) * 4),
        ({"completion_mask": [0, 0, 1, 1]}, (-100, -100, 7, 8)),
        ({"assistant_masks": [0, 1, 0, 1]}, (-100, 6, -100, 8)),
        ({"assistant_masks": [False, True, False, True]}, (-100, 6, -100, 8)),
        ({"assistant_masks": [0, 1, 0, 1], "completion_mask": [0, 0, 1, 1]}, (-100, -100, -100, 8)),
        ({"labels": [-100, 6, 7, -100], "completion_mask": [0, 0, 1, 1]}, (-100, -100, 7, -100)),
        ({"position_ids": [0, 1, 2, 3], "seq_lengths": [4]}, None),
        ({"position_ids": [1, 1, 2, 3]}, None),
    ],
)
def test_labels_and_masks_select_the_targets(columns, labels):
    assert detect_format(frozenset({"input_ids", *columns}), "rows.jsonl") == "tokens"
    assert parse({"input_ids": IDS, **columns}) == TokenRow((5, 6, 7, 8), labels)


def test_padding_is_cut_off_at_both_ends_with_its_labels():
    assert parse({"input_ids": IDS, "attention_mask": [0, 1, 1, 0]}) == TokenRow((6, 7))
    padded = {"input_ids": IDS, "attention_mask": [0, 1, 1, 0], "labels": [-100, -100, 7, -100]}
    assert parse(padded) == TokenRow((6, 7), (-100, 7))


def test_columns_can_be_mapped():
    row = {"tokens": IDS, "mask": [0, 0, 1, 1]}
    assert parse(row, {"input_ids": "tokens", "completion_mask": "mask"}) == TokenRow((5, 6, 7, 8), (-100, -100, 7, 8))


HOSTILE = [
    ({"input_ids": []}, "input_ids must be a list of whole numbers, found none"),
    ({"input_ids": None}, "input_ids", "found null"),
    ({"input_ids": "5 6"}, "input_ids", "found text"),
    ({"input_ids": [5, -1]}, "input_ids[1] must be a whole number from 0 on, found -1"),
    ({"input_ids": [5, 6.0]}, "input_ids[1]", "found 6.0"),
    ({"input_ids": [5, True]}, "input_ids[1]", "found true or false"),
    ({"input_ids": [[5, 6]]}, "input_ids[0]", "found a list"),
    ({"input_ids": [None]}, "input_ids[0]", "found null"),
    ({"labels": [5, 6]}, "labels has 2 entries, input_ids has 4"),
    ({"labels": 3}, "labels must be a list as long as input_ids, found a number"),
    ({"labels": [6, 7, 8, -100]}, "labels[0] is 6, but its token is 5", "not shifted", "-100"),
    ({"labels": [-1, -1, 7, 8]}, "labels[0] is -1"),
    ({"labels": [None, 6, 7, 8]}, "labels[0] is null"),
    ({"labels": [5.0, 6, 7, 8]}, "labels[0] is 5.0"),
    ({"completion_mask": [0, 1]}, "completion_mask has 2 entries"),
    ({"assistant_masks": [0, 0, 2, 1]}, "assistant_masks[2] must be 0 or 1, found 2"),
    ({"assistant_masks": [0, 0, 1.0, 1]}, "assistant_masks[2] must be 0 or 1, found 1.0"),
    ({"attention_mask": [0, 0, 0, 0]}, "attention_mask is 0 everywhere"),
    ({"attention_mask": [1, 0, 1, 1]}, "attention_mask[1] is 0 between"),
    ({"attention_mask": [1, 1]}, "attention_mask has 2 entries"),
    ({"position_ids": [0, 1, 0, 1]}, "position_ids[2] starts again", "several documents"),
    ({"position_ids": [0, 1]}, "position_ids has 2 entries"),
    ({"position_ids": [0, None, 1, 2]}, "position_ids[1]", "found null"),
    ({"seq_lengths": [2, 2]}, "seq_lengths names 2 documents"),
]


@pytest.mark.parametrize(("columns", "words"), [(columns, words) for columns, *words in HOSTILE])
def test_the_error_of_a_bad_row_names_column_and_problem(columns, words):
    with pytest.raises(DataError) as error:
        parse({"input_ids": IDS, **columns})
    assert [word for word in words if word not in str(error.value)] == []
