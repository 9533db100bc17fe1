"""Find the reasoning in an assistant turn: the text between `<think>` and `</think>`, for `data.train_on=answer`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from finetune.data.formats.messages import Message
from finetune.data.template.layout import FilledRun, Slot
from finetune.system.errors import DataError

TAGS = OPEN, CLOSE = "<think>", "</think>"
_TAG = re.compile("|".join(TAGS))


class Stretch(NamedTuple):
    """Reasoning from tag to tag: characters [first, last); [before, after) with the blanks around it."""

    before: int
    first: int
    last: int
    after: int


def reasoning_in(filled: FilledRun, contents: Mapping[int, int], messages: Sequence[Message]) -> list[Stretch]:
    """Return the reasoning in the assistant turns of a run, in their texts and in what the template writes before.

    contents: of MarkedRow.
    Raises: DataError if a turn's tags do not pair up, or it is all reasoning.
    """
    slots = {piece.number: i for i, piece in enumerate(filled.run.pieces) if isinstance(piece, Slot)}
    stretches = []
    for piece, turn in filled.run.spans:
        if (content := slots.get(contents.get(turn, -1))) is None:
            continue
        begin, end = filled.offsets[piece], filled.offsets[content + 1]
        found = _stretches(filled.text[begin:end], turn)
        if found and not messages[turn].tool_calls and _cover(found, end - begin):
            raise DataError(
                f"message {turn} (assistant) is all reasoning, so data.train_on=answer would teach it to stop without "
                "an answer; add the answer, give the message weight 0, or set data.train_on=assistant"
            )
        stretches += [Stretch(*(begin + character for character in stretch)) for stretch in found]
    return stretches


def _stretches(text: str, turn: int) -> list[Stretch]:
    """The reasoning in a turn. A `</think>` without `<think>` ends reasoning that some templates open in the header."""
    tags = [(found.start(), found.end(), found[0]) for found in _TAG.finditer(text)]
    if tags and tags[0][2] == CLOSE:
        tags.insert(0, (0, 0, OPEN))
    for number, (at, _, tag) in enumerate(tags):
        if tag != TAGS[number % 2]:
            raise _unpaired(turn, tag, at, "is inside another" if tag == OPEN else "closes nothing")
    if len(tags) % 2:
        raise _unpaired(turn, OPEN, tags[-1][0], "is never closed")
    return [
        Stretch(len(text[:first].rstrip()), first, last, len(text) - len(text[last:].lstrip()))
        for (first, _, _), (_, last, _) in zip(tags[::2], tags[1::2], strict=True)
    ]


def _cover(stretches: Sequence[Stretch], length: int) -> bool:
    """Whether the stretches and the blanks around them cover all characters."""
    ends, starts = [0, *(found.after for found in stretches)], [*(found.before for found in stretches), length]
    return all(start <= end for start, end in zip(starts, ends, strict=True))


def _unpaired(turn: int, tag: str, at: int, what: str) -> DataError:
    return DataError(
        f"message {turn} (assistant): the {tag} at character {at} {what}, so data.train_on=answer cannot separate "
        "reasoning and answer; fix the row, give the message weight 0, or set data.train_on=assistant"
    )
