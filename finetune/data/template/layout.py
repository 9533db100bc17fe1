"""Find where a chat template puts a row's texts, its control tokens, what the model generates, and its reasoning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from finetune.data.formats.messages import THINK_TAGS, Message, out_of_order
from finetune.data.template.markers import MARKER, OPEN, MarkedRow, written
from finetune.system.errors import DataError

# (number of messages, with the header of the next answer) -> marked text
Render = Callable[[int, bool], str]
THINK, END_THINK = THINK_TAGS


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for one of a row's values. letters: as in markers.MARKER."""

    number: int
    letters: str


@dataclass(slots=True)
class Run:
    """Text up to the next control token.

    spans: (piece, message): from this piece to the control token, both included, all is a target of the message.
    fixed: the text, if it is the same for every row of the shape.
    """

    pieces: list[str | Slot] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    control: str | None = None
    fixed: str | None = None

    def fill(self, values: Sequence[Any]) -> FilledRun:
        """Put a row's values into the slots."""
        if self.fixed is not None:
            return FilledRun(self, self.fixed, [0])  # its spans begin with its first piece
        parts = [p if isinstance(p, str) else written(values[p.number], p.letters) for p in self.pieces]
        return FilledRun(self, "".join(parts), [*accumulate(map(len, parts), initial=0)])

    def numbers(self) -> list[int]:
        """Return the numbers of the values that the run writes."""
        return [piece.number for piece in self.pieces if isinstance(piece, Slot)]


@dataclass(frozen=True, slots=True)
class FilledRun:
    """A run with one row's values. offsets: the character at which each piece begins, then the text's length."""

    run: Run
    text: str
    offsets: list[int]


def control_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Compile a pattern that finds any of the tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def lay_out(
    render: Render, marked: MarkedRow, turns: frozenset[int], control: re.Pattern[str], *, complete: bool, prompt: bool
) -> list[Run]:
    """Cut a marked rendering at its control tokens, and find the targets of the given turns.

    complete: the template must write a text or tool call of every message.
    prompt: end with the header of the next answer.
    Raises: DataError if the targets differ from what the model generates, or the template leaves out a text.
    """
    whole = render(len(marked.messages), prompt)
    written_turns = {marked.owners[int(found[2])] for found in MARKER.finditer(whole)}
    if out_of_order([message["role"] for message in marked.messages]):
        _check_order(marked, whole)
        complete = True
    if marked.tools and -1 not in written_turns:
        raise DataError("the chat template leaves out the row's tools; set data.chat_template to one that writes them")
    _check_parts(marked, whole)
    regions = []
    for turn in sorted(turns):
        if turn not in written_turns:
            raise DataError(f"the chat template leaves out message {turn} ({marked.messages[turn]['role']})")
        if marked.messages[turn]["role"] == "assistant":
            regions.append((*_generated_region(render, marked, turn, control, whole), turn))
        else:  # from its text to the control token after it
            texts = [found for found in MARKER.finditer(whole) if marked.owners[int(found[2])] == turn]
            end = control.search(whole, texts[-1].end())
            regions.append((texts[0].start(), end.end() if end else len(whole), turn))
    if complete and (left_out := sorted(set(marked.owners) - written_turns)):
        i = left_out[0]
        raise DataError(
            f"the chat template leaves out message {i} ({marked.messages[i]['role']}); set data.chat_template to one "
            "that writes every message, or data.train_on=last to train on what it does write"
        )
    return _cut(whole, regions, control)


def _generated_region(
    render: Render, marked: MarkedRow, turn: int, control: re.Pattern[str], whole: str
) -> tuple[int, int]:
    """The characters [start, end) of an assistant turn that the model generates."""
    until = render(turn + 1, False)
    header = render(turn, True) if turn else _first_header(render, until)
    differs = (i for i, (a, b) in enumerate(zip(until, whole, strict=False)) if a != b)
    common = next(differs, min(len(until), len(whole)))
    start = len(header)
    texts = [found for found in MARKER.finditer(until) if marked.owners[int(found[2])] == turn]
    last_text = max(found.end() for found in texts) if texts else start
    if common < max(start, last_text) or not until.startswith(header):
        raise DataError(
            f"the chat template writes message {turn} (assistant) differently once the conversation goes on, or after "
            "a header that differs from the prompt's, so the model would train on what it never sees; "
            "set data.train_on=last, or data.chat_template to one that keeps earlier turns as they were"
        )
    if lost := _left_out(marked, turn, {int(found[2]) for found in texts if found.start() >= start}):
        raise DataError(f"the chat template leaves out a part of message {turn} (assistant): {lost[0]!r}")
    ends = [found.end() for found in control.finditer(whole, last_text) if found.end() <= common]
    if not ends:
        raise DataError(
            "the chat template ends an assistant turn without a control token, so the model would never learn to "
            "stop; set data.chat_template"
        )
    return start, ends[-1]


def _first_header(render: Render, until: str) -> str:
    """Return what precedes the text of a first turn: everything up to the header that the template puts before answers.

    Raises: DataError if this header is not there, or more than once.
    """
    prompt = render(1, True)
    opening = prompt[len(until) :] if prompt.startswith(until) else ""
    before = until[: until.index(OPEN)] if OPEN in until else until
    if not opening or before.count(opening) != 1:
        raise DataError(
            "the chat template writes message 0 (assistant) otherwise than an answer; give it weight 0, or remove it"
        )
    return before[: before.index(opening) + len(opening)]


def _check_order(marked: MarkedRow, whole: str) -> None:
    """Raise DataError if the template moves turns."""
    owners = [marked.owners[int(found[2])] for found in MARKER.finditer(whole)]
    owners = [owner for owner in owners if owner >= 0]
    if moved := [b for a, b in pairwise(owners) if b < a]:
        raise DataError(
            f"the chat template moves message {moved[0]} before others; remove the row, or reorder its turns"
        )


def _check_parts(marked: MarkedRow, whole: str) -> None:
    """Raise DataError if the template leaves out a text of a message with media."""
    inside = {int(found[2]) for found in MARKER.finditer(whole)}
    for i, message in enumerate(marked.messages):
        if isinstance(message["content"], list) and (lost := _left_out(marked, i, inside)):
            raise DataError(f"the chat template leaves out a text of message {i} ({message['role']}): {lost[0]!r}")


def _left_out(marked: MarkedRow, turn: int, inside: set[int]) -> list[str]:
    """The turn's texts that are not written, neither alone nor inside a larger value."""
    lost = []
    for number, (value, owner) in enumerate(zip(marked.values, marked.owners, strict=True)):
        at = number
        while at >= 0 and at not in inside:
            at = marked.parents[at]
        if owner == turn and isinstance(value, str) and at < 0:
            lost.append(value)
    return lost


def _cut(whole: str, regions: list[tuple[int, int, int]], control: re.Pattern[str]) -> list[Run]:
    """Cut a marked rendering at its control tokens. regions: (start, end, message) of the targets."""
    waiting = sorted(regions, reverse=True)
    runs, run, at = [], Run(), 0
    end, turn = 0, -1
    stops = re.finditer(f"(?P<marker>{MARKER.pattern})|(?P<control>{control.pattern})", whole)
    for found in chain(stops, [None]):
        stop = len(whole) if found is None else found.start()
        while waiting and waiting[-1][0] <= stop:
            start, end, turn = waiting.pop()
            run.pieces += [whole[at:start]] if start > at else []
            run.spans.append((len(run.pieces), turn))
            at = max(at, start)
        run.pieces += [whole[at:stop]] if stop > at else []
        if found is None:
            break
        at = found.end()
        if found["marker"]:
            run.pieces.append(Slot(int(found[3]), found[2]))
            continue
        run.control = found["control"]
        runs.append(run)
        run = Run(spans=[(0, turn)] if at < end else [])
    runs.append(run)
    for run in runs:
        if not run.numbers() and not any(piece for piece, _ in run.spans):
            run.fixed = "".join(piece for piece in run.pieces if isinstance(piece, str))
    return runs


class Reasoning(NamedTuple):
    """Reasoning from tag to tag: characters [first, last); [before, after) with the blanks around it."""

    before: int
    first: int
    last: int
    after: int


def reasoning_in(filled: FilledRun, contents: Mapping[int, int], messages: Sequence[Message]) -> list[Reasoning]:
    """Return the reasoning in the assistant turns of a run, in their texts and in what the template writes before.

    contents: of MarkedRow.
    Raises: DataError if a turn's tags do not pair up, or it is all reasoning.
    """
    slots = {piece.number: i for i, piece in enumerate(filled.run.pieces) if isinstance(piece, Slot)}
    reasoning = []
    for piece, turn in filled.run.spans:
        if (content := slots.get(contents.get(turn, -1))) is None:
            continue
        begin = filled.offsets[piece]
        text = filled.text[begin : filled.offsets[content + 1]]
        tags = _paired_tags(text, turn)
        edges = [0, *tags, len(text)]
        answer = "".join(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
        if tags and not messages[turn].tool_calls and not answer.strip():
            raise DataError(
                f"message {turn} (assistant) is all reasoning, so data.train_on=answer would teach it to stop without "
                "an answer; add the answer, give the message weight 0, or set data.train_on=assistant"
            )
        for first, last in zip(tags[::2], tags[1::2], strict=True):
            around = len(text[:first].rstrip()), first, last, len(text) - len(text[last:].lstrip())
            reasoning.append(Reasoning(*(begin + character for character in around)))
    return reasoning


def _paired_tags(text: str, turn: int) -> list[int]:
    """Where reasoning begins and ends, by turns. Some templates open it in the header: then the first tag ends it."""
    tags = [(found.start(), found.end(), found[0]) for found in re.finditer("|".join(THINK_TAGS), text)]
    if tags and tags[0][2] == END_THINK:
        tags.insert(0, (0, 0, THINK))
    problem = [
        f"the {tag} at character {at} {'is inside another' if tag == THINK else 'closes nothing'}"
        for number, (at, _, tag) in enumerate(tags)
        if tag != THINK_TAGS[number % 2]
    ]
    if not problem and len(tags) % 2:
        problem = [f"the {THINK} at character {tags[-1][0]} is never closed"]
    if problem:
        raise DataError(
            f"message {turn} (assistant): {problem[0]}, so data.train_on=answer cannot separate reasoning and answer; "
            "fix the row, give the message weight 0, or set data.train_on=assistant"
        )
    return [end if number % 2 else start for number, (start, end, _) in enumerate(tags)]


def loss_weights(messages: Sequence[Message], train_on: str) -> dict[int, float]:
    """Return the weight of each message whose targets weigh otherwise than the rest of the row.

    train_on: as in `ChatTemplate.encode`.
    Raises: DataError for a row without a target.
    """
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not turns and train_on != "all":
        raise DataError("the row has no assistant message, so it has no target")
    if empty := [i for i in turns if not messages[i].content and not messages[i].tool_calls]:
        raise DataError(f"assistant message {empty[0]} is empty, so it has no target")
    if train_on == "all":
        return {i: m.weight for i, m in enumerate(messages) if m.weight != 1 and (m.content or m.tool_calls)}
    selected = {"assistant": turns, "answer": turns, "last": turns[-1:]}[train_on]
    weights = {i: messages[i].weight for i in selected if messages[i].weight > 0}
    if not weights:
        raise DataError(f"every assistant message that data.train_on={train_on} selects has weight 0")
    return weights
