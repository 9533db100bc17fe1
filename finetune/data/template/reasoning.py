"""Where an assistant's turn thinks: what stands between `<think>` and `</think>`, for a mask that leaves it out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from finetune.data.formats.messages import Message
from finetune.data.template.layout import Run, Slot
from finetune.system.errors import DataError

TAGS = OPEN, CLOSE = "<think>", "</think>"
_TAG = re.compile("|".join(TAGS))


class Stretch(NamedTuple):
    """Reasoning from tag to tag: characters [first, last); [before, after) with the blanks around it."""

    before: int
    first: int
    last: int
    after: int


def reasoning_in(
    run: Run, text: str, places: Sequence[int], contents: Mapping[int, int], messages: Sequence[Message]
) -> list[Stretch]:
    """Where the assistant turns of a filled run think, by their texts and what the template writes before them.

    text, places: of the run, as `Run.fill` gives them. contents: as MarkedRow's.
    Raises: DataError if a turn's tags do not pair up, or it only thinks.
    """
    slots = {piece.number: i for i, piece in enumerate(run.pieces) if isinstance(piece, Slot)}
    stretches = []
    for piece, turn in run.spans:
        if (content := slots.get(contents.get(turn, -1))) is None:
            continue
        begin, end = places[piece], places[content + 1]
        found = _stretches(text[begin:end], turn)
        if found and not messages[turn].tool_calls and _cover(found, end - begin):
            raise DataError(
                f"message {turn} (assistant) is all reasoning, so data.train_on=answer would teach to stop without an "
                "answer; add the answer, give the message weight 0, or set data.train_on=assistant"
            )
        stretches += [Stretch(*(begin + place for place in stretch)) for stretch in found]
    return stretches


def _stretches(text: str, turn: int) -> list[Stretch]:
    """A `</think>` that nothing opened ends reasoning that began with the turn: some templates open it in the header
    that they prompt with.
    """
    tags = [(found.start(), found.end(), found[0]) for found in _TAG.finditer(text)]
    if tags and tags[0][2] == CLOSE:
        tags.insert(0, (0, 0, OPEN))
    for number, (at, _, tag) in enumerate(tags):
        if tag != TAGS[number % 2]:
            raise _unpaired(turn, tag, at, "stands inside another" if tag == OPEN else "closes nothing")
    if len(tags) % 2:
        raise _unpaired(turn, OPEN, tags[-1][0], "is never closed")
    return [
        Stretch(len(text[:first].rstrip()), first, last, len(text) - len(text[last:].lstrip()))
        for (first, _, _), (_, last, _) in zip(tags[::2], tags[1::2], strict=True)
    ]


def _cover(stretches: Sequence[Stretch], length: int) -> bool:
    """Whether they leave nothing of so many characters."""
    ends, starts = [0, *(found.after for found in stretches)], [*(found.before for found in stretches), length]
    return all(start <= end for start, end in zip(starts, ends, strict=True))


def _unpaired(turn: int, tag: str, at: int, what: str) -> DataError:
    return DataError(
        f"message {turn} (assistant): the {tag} at character {at} {what}, so data.train_on=answer cannot tell the "
        "reasoning from the answer; mend the row, give the message weight 0, or set data.train_on=assistant"
    )
