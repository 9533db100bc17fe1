"""Rows that are already tokenized, with Hugging Face's column names."""

from __future__ import annotations

from typing import Any

from finetune.data.encoded import IGNORE_INDEX
from finetune.data.formats.messages import TokenRow
from finetune.data.formats.values import Fields, kind, shown
from finetune.system.errors import DataError

# Masks with 1 for each target.
_TARGET_MASKS = ("assistant_masks", "completion_mask")
COLUMNS = ("labels", "attention_mask", *_TARGET_MASKS, "position_ids", "seq_lengths")


def parse_tokens(row: Fields) -> TokenRow:
    """Parse `{"input_ids": […]}` with optional labels, attention_mask, assistant_masks and completion_mask.

    A token is a target if labels and all masks agree. attention_mask marks padding, which is cut off at both ends.

    Raises: DataError naming the column and the token; also for a row that packs several documents.
    """
    ids = _whole_numbers(row, "input_ids")
    _refuse_packed(row, len(ids))
    trained = [True] * len(ids)
    labels = row.get("labels")
    if labels is not None:
        _check_length(row, "labels", len(ids))
        for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if type(label) is not int or label not in (token, IGNORE_INDEX):
                raise DataError(
                    f"{row.named('labels')}[{i}] is {shown(label)}, but its token is {token}; labels are not "
                    f"shifted: each is its token or {IGNORE_INDEX}"
                )
        trained = [label != IGNORE_INDEX for label in labels]
    given = [name for name in _TARGET_MASKS if row.get(name) is not None]
    for name in given:
        trained = [before and bool(mask) for before, mask in zip(trained, _mask(row, name, len(ids)), strict=True)]
    kept = _unpadded(row, len(ids))
    if labels is None and not given:
        return TokenRow(tuple(ids[kept]))
    selected = zip(ids[kept], trained[kept], strict=True)
    return TokenRow(tuple(ids[kept]), tuple(token if target else IGNORE_INDEX for token, target in selected))


def _whole_numbers(row: Fields, name: str) -> list[int]:
    values, location = row.get(name), row.named(name)
    if not isinstance(values, list) or not values:
        raise DataError(f"{location} must be a list of whole numbers, found {kind(values) if values != [] else 'none'}")
    # bool is a subclass of int, and no token id.
    if set(map(type, values)) != {int} or min(values) < 0:
        wrong = next(i for i, value in enumerate(values) if type(value) is not int or value < 0)
        raise DataError(f"{location}[{wrong}] must be a whole number from 0 on, found {shown(values[wrong])}")
    return values


def _check_length(row: Fields, name: str, length: int) -> None:
    values, location = row.get(name), row.named(name)
    if not isinstance(values, list):
        raise DataError(f"{location} must be a list as long as {row.named('input_ids')}, found {kind(values)}")
    if len(values) != length:
        raise DataError(f"{location} has {len(values)} entries, {row.named('input_ids')} has {length}; they must agree")


def _mask(row: Fields, name: str, length: int) -> list[Any]:
    _check_length(row, name, length)
    values = row.get(name)
    for i, value in enumerate(values):
        if not isinstance(value, int) or value not in (0, 1):
            raise DataError(f"{row.named(name)}[{i}] must be 0 or 1, found {shown(value)}")
    return values


def _unpadded(row: Fields, length: int) -> slice:
    if row.get("attention_mask") is None:
        return slice(0, length)
    mask = [int(value) for value in _mask(row, "attention_mask", length)]
    location = row.named("attention_mask")
    if 1 not in mask:
        raise DataError(f"{location} is 0 everywhere, so every token is padding")
    start, end = mask.index(1), length - mask[::-1].index(1)
    if 0 in mask[start:end]:
        hole = mask.index(0, start)
        raise DataError(f"{location}[{hole}] is 0 between tokens that are not padding; only the ends can be cut off")
    return slice(start, end)


def _refuse_packed(row: Fields, length: int) -> None:
    if row.get("position_ids") is not None:
        _check_length(row, "position_ids", length)
        positions = _whole_numbers(row, "position_ids")
        # Left padding repeats a position; a packed row goes back to 0 at its next document.
        if falls := [i for i in range(1, length) if positions[i] < positions[i - 1]]:
            raise DataError(
                f"{row.named('position_ids')}[{falls[0]}] starts again, so the row packs several documents; write one "
                "document per row"
            )
    lengths = row.get("seq_lengths")
    if isinstance(lengths, list) and len(lengths) > 1:
        raise DataError(f"{row.named('seq_lengths')} names {len(lengths)} documents; write one document per row")
