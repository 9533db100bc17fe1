"""Row formats: the meaning of a row's columns.

To add a format, write `parse(row: Fields, spelling: Spelling) -> Example`, add it to FORMATS with its columns, and add
its name to `SourceConfig.format` (a test compares the two). `Fields` gives the row's values under our names, and the
file's names for errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from finetune.config.schema import SourceConfig
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.formats.attachments import MEDIA_COLUMNS, attach_media, file_name_column, located, write_parts
from finetune.data.formats.columns import Reading, recognize
from finetune.data.formats.conversations import (
    KNOWN_KEYS,
    Spelling,
    conversation,
    read_tools,
    read_turns,
)
from finetune.data.formats.messages import Conversation, Example, Message, Preference, RawText, TokenRow, Turn
from finetune.data.formats.preferences import PROMPTS, SIDES, add_system, parse_preference
from finetune.data.formats.rules import DEFAULT_RULES, RowRules
from finetune.data.formats.values import Fields, as_json, is_empty, kind, listed, shown
from finetune.data.sources.readers import RawBatch, Row
from finetune.system.errors import DataError

# What to do with pairs in a run that learns from answers.
PREFERENCE = (
    "chosen and rejected answers need preference.objective=dpo (or ipo, orpo, simpo, kto); to train on the chosen "
    "answers alone set columns: {completion: chosen}, or {messages: chosen} if they hold the whole conversation"
)
# The format of rows without an answer.
PROMPT = "prompt"
# Columns that mark an answer as good or bad.
VERDICTS = ("label", "kto_tag")
# Our names of optional columns to other names.
_ALIASES = {"tools": "functions", **MEDIA_COLUMNS}
_OPTIONAL = ("system", "tools", *MEDIA_COLUMNS)
# Masks with 1 for each target.
_TARGET_MASKS = ("assistant_masks", "completion_mask")
_TOKEN_COLUMNS = ("labels", "attention_mask", *_TARGET_MASKS, "position_ids", "seq_lengths")


@dataclass(frozen=True)
class RowFormat:
    """The columns of a format, and the function that parses its rows.

    required: columns that every row has; `format: auto` recognizes the format by them.
    aliases: another name of a column.
    keys: our names of the keys of a message, if the rows hold lists of messages.
    """

    parse: Callable[[Fields, Spelling], Example]
    required: tuple[str, ...]
    optional: tuple[str, ...] = _OPTIONAL
    aliases: Mapping[str, str] = field(default_factory=lambda: _ALIASES)
    keys: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        """Our names of all columns."""
        return frozenset({*self.required, *self.optional})

    def is_in(self, columns: frozenset[str]) -> bool:
        """Return whether a row with these columns can have this format."""
        return all(column in columns or self.aliases.get(column) in columns for column in self.required)


def parse_messages(row: Fields, spelling: Spelling, column: str = "messages") -> Conversation:
    """Parse OpenAI's rows, or ShareGPT's with the column `conversations`.

    `{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}`
    `{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}`
    """
    items, location = row.get(column), row.named(column)
    if isinstance(items, str):  # in a CSV file
        items = as_json(items, location)
    return _chat(row, read_turns(items, location, spelling), spelling.rules)


def parse_prompt_completion(row: Fields, spelling: Spelling) -> Conversation:
    """Parse a prompt and its completion, each a text or a list of messages.

    Only the completion is trained: assistant turns in a prompt have weight 0 unless they give another.
    """

    prompt = _turns(row, "prompt", spelling, "user", 0.0)
    completion = _turns(row, "completion", spelling, "assistant", 1.0)
    if prompt[-1].message.role == completion[0].message.role == "assistant":
        raise DataError(
            f"{prompt[-1].location} and {completion[0].location} are both of the assistant; make them one turn"
        )
    return _chat(row, [*prompt, *completion], spelling.rules)


def parse_prompt(row: Fields, spelling: Spelling) -> Conversation:
    """Parse a prompt without an answer, a text or a list of messages, for a run that learns from rewards."""
    turns = _turns(row, "prompt", spelling, "user", 0.0)
    if turns[-1].message.role == "assistant":
        raise DataError(f"{turns[-1].location} is of the assistant; end the prompt with a turn that it answers")
    return _chat(row, turns, spelling.rules)


def _turns(row: Fields, column: str, spelling: Spelling, role: str, assistant_weight: float) -> list[Turn]:
    """Read a column as messages, or as the text of one message with this role."""
    value, location = row.get(column), row.named(column)
    if spelling.are_turns(value):
        return read_turns(value, location, spelling, assistant_weight)
    notes: list[str] = []
    return [Turn(location, Message(role, spelling.rules.text(value, location, notes), notes=tuple(notes)))]


def parse_alpaca(row: Fields, spelling: Spelling) -> Conversation:
    """Parse Alpaca's rows: instruction, output, and optional input (on a line of its own), system and history."""
    turns = []

    def turn(role: str, *values: tuple[Any, str]) -> Turn:
        notes: list[str] = []
        text = "\n".join(filter(None, (spelling.rules.text(value, location, notes) for value, location in values)))
        return Turn(values[0][1], Message(role, text, notes=tuple(notes)))

    history, location = row.get("history") or [], row.named("history")
    if not isinstance(history, list):
        raise DataError(f"{location} must be a list of pairs of texts, found {kind(history)}")
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise DataError(f"{location}[{i}] must be a pair of texts, found {kind(pair)}")
        for j, role in enumerate(("user", "assistant")):
            turns.append(turn(role, (pair[j], f"{location}[{i}][{j}]")))
    about = "" if row.get("input") is None else row.get("input")
    turns.append(turn("user", (row.get("instruction"), row.named("instruction")), (about, row.named("input"))))
    turns.append(turn("assistant", (row.get("output"), row.named("output"))))
    return _chat(row, turns, spelling.rules)


def parse_text(row: Fields, _: Spelling) -> RawText:
    """Parse raw documents, for continued pretraining: `{"text": …}`."""
    if not (text := row.text("text")):
        raise DataError(f"{row.named('text')} is empty")
    return RawText(text)


def _chat(row: Fields, turns: list[Turn], rules: RowRules) -> Conversation:
    if system := row.text("system", default=""):
        if turns[0].message.role == "system":
            raise DataError(f"{turns[0].location} and {row.named('system')} are both system texts; keep one of them")
        turns = [Turn(row.named("system"), Message("system", system)), *turns]
    verdict = next((row.get(column) for column in VERDICTS if row.get(column) is not None), None)
    chat = conversation(attach_media(row, turns), read_tools(row), rules)
    return replace(chat, verdict=verdict)


def parse_tokens(row: Fields, _: Spelling) -> TokenRow:
    """Parse `{"input_ids": […]}` with optional labels, attention_mask, assistant_masks and completion_mask.

    A token is a target if labels and all masks agree. attention_mask marks padding, which is cut off at both ends.

    Raises: DataError naming the column and the token; also for a row that packs several documents.
    """
    ids = _whole_numbers(row, "input_ids")
    _refuse_packed(row, len(ids))
    selections: list[list[bool]] = []
    if (labels := _column(row, "labels", len(ids))) is not None:
        for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if type(label) is not int or label not in (token, IGNORE_INDEX):
                raise DataError(
                    f"{row.named('labels')}[{i}] is {shown(label)}, but its token is {token}; labels are not "
                    f"shifted: each is its token or {IGNORE_INDEX}"
                )
        selections.append([label != IGNORE_INDEX for label in labels])
    selections += [mask for name in _TARGET_MASKS if (mask := _mask(row, name, len(ids))) is not None]
    kept = _unpadded(row, len(ids))
    if not selections:
        return TokenRow(tuple(ids[kept]))
    targets = [token if all(selected) else IGNORE_INDEX for token, *selected in zip(ids, *selections, strict=True)]
    return TokenRow(tuple(ids[kept]), tuple(targets[kept]))


def _whole_numbers(row: Fields, name: str) -> list[int]:
    values, location = row.get(name), row.named(name)
    if not isinstance(values, list) or not values:
        raise DataError(f"{location} must be a list of whole numbers, found {kind(values) if values != [] else 'none'}")
    # bool is a subclass of int, and no token id.
    if set(map(type, values)) != {int} or min(values) < 0:
        wrong = next(i for i, value in enumerate(values) if type(value) is not int or value < 0)
        raise DataError(f"{location}[{wrong}] must be a whole number from 0 on, found {shown(values[wrong])}")
    return values


def _column(row: Fields, name: str, length: int) -> list[Any] | None:
    values, location = row.get(name), row.named(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise DataError(f"{location} must be a list as long as {row.named('input_ids')}, found {kind(values)}")
    if len(values) != length:
        raise DataError(f"{location} has {len(values)} entries, {row.named('input_ids')} has {length}; they must agree")
    return values


def _mask(row: Fields, name: str, length: int) -> list[bool] | None:
    if (values := _column(row, name, length)) is None:
        return None
    for i, value in enumerate(values):
        if not isinstance(value, int) or value not in (0, 1):
            raise DataError(f"{row.named(name)}[{i}] must be 0 or 1, found {shown(value)}")
    return [bool(value) for value in values]


def _unpadded(row: Fields, length: int) -> slice:
    if (mask := _mask(row, "attention_mask", length)) is None:
        return slice(0, length)
    location = row.named("attention_mask")
    if True not in mask:
        raise DataError(f"{location} is 0 everywhere, so every token is padding")
    start, end = mask.index(True), length - mask[::-1].index(True)
    if False in mask[start:end]:
        hole = mask.index(False, start)
        raise DataError(f"{location}[{hole}] is 0 between tokens that are not padding; only the ends can be cut off")
    return slice(start, end)


def _refuse_packed(row: Fields, length: int) -> None:
    if _column(row, "position_ids", length) is not None:
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


FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(parse_messages, ("messages",), keys=KNOWN_KEYS),
    "sharegpt": RowFormat(
        lambda row, spelling: parse_messages(row, spelling, "conversations"),
        ("conversations",),
        aliases={"conversations": "conversation"} | _ALIASES,
        keys=KNOWN_KEYS,
    ),
    "prompt_completion": RowFormat(parse_prompt_completion, ("prompt", "completion"), keys=KNOWN_KEYS),
    PROMPT: RowFormat(parse_prompt, ("prompt",), keys=KNOWN_KEYS),
    "preference": RowFormat(parse_preference, SIDES, (*PROMPTS, "input", *_OPTIONAL), keys=KNOWN_KEYS),
    "alpaca": RowFormat(parse_alpaca, ("instruction", "output"), ("input", "history", *_OPTIONAL)),
    "text": RowFormat(parse_text, ("text",), (), {}),
    "tokens": RowFormat(parse_tokens, ("input_ids",), _TOKEN_COLUMNS, {}),
}


def require_mapped(mapped: Mapping[str, str], row: Mapping[str, Any], source: str = "") -> None:
    prefix = f"{source}: " if source else ""
    for ours, theirs in mapped.items():
        if theirs not in row:
            raise DataError(f"{prefix}a row lacks {theirs}, which columns maps to {ours}; its columns: {listed(row)}")


@dataclass(frozen=True)
class RowParser:
    """Parses the rows of one source. Picklable.

    format: a key of FORMATS; `rows` takes that of the batch.
    system: text of the system turn that is added to conversations without one.
    rules: for values that can be read in more than one way.
    file: with the rows; `rows` takes that of the batch.
    """

    source: SourceConfig
    format: str = "auto"
    system: str | None = None
    rules: RowRules = DEFAULT_RULES
    file: str = ""

    def parse(self, value: Any) -> Example:
        """Parse a decoded row.

        Raises: DataError that names the column and the message, but not the row's location.
        """
        if not isinstance(value, Mapping):
            raise DataError(f"a row must be an object, found {kind(value)}")
        require_mapped(self._columns, value)
        reading = self.reading(frozenset(map(str, value)))
        columns = {**(reading.columns if reading else {}), **self._columns, **self._file_column(value)}
        row = Fields.of(value, columns, self._format.aliases, "")
        if missing := [column for column in self._format.required if column not in row.values]:
            raise DataError(
                f"the row lacks {listed(missing)}, which {self.format} rows need; its columns: {listed(value)}"
            )
        if "chosen" not in self._format.columns and not is_empty(row.get("chosen")):
            raise DataError(PREFERENCE)
        match self._format.parse(row, self._spelling):
            case Conversation() as chat:
                return self._completed(chat)
            case Preference(chosen, rejected):
                return Preference(self._completed(chosen), self._completed(rejected))
            case example:
                return example

    def _completed(self, chat: Conversation) -> Conversation:
        """Return a conversation with absolute paths of its media, and a system turn."""
        chat = located(chat, self.file)
        return chat if self.system is None else add_system(chat, self.system)

    def rows(self, batch: RawBatch) -> Iterator[tuple[Row, Example | DataError]]:
        """Yield each row of a batch with its example or its error."""
        parser = replace(self, format=batch.format, file=batch.file)
        for row in batch.rows():
            try:
                yield row, row.value if isinstance(row.value, DataError) else parser.parse(row.value)
            except DataError as error:
                yield row, error

    def reading(self, columns: frozenset[str]) -> Reading | None:
        """Return what a row's columns mean, if they have other names than ours and the source maps none but media."""
        if self._columns.keys() - MEDIA_COLUMNS.keys() or self._format.is_in(columns):
            return None
        readings = [reading for reading in recognize(columns) if reading.format == self.format]
        return readings[0] if len(readings) == 1 else None

    def _file_column(self, value: Mapping[str, Any]) -> dict[str, str]:
        found = file_name_column(value, self.file)
        if found and not found.keys() <= self._format.columns:
            raise DataError(
                f"{self.format} rows hold no file; to train on the texts of files, map columns: {{prompt: …, "
                "completion: …}"
            )
        return found

    @property
    def _format(self) -> RowFormat:
        return FORMATS[self.format]

    @cached_property
    def _columns(self) -> dict[str, str]:
        return {ours: theirs for ours, theirs in self.source.columns.items() if ours in self._format.columns}

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling.of(self.source, self.rules)


def messages_row(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as a row in OpenAI's format; `parse_messages` gives the same conversation back."""
    turns = [
        m.as_dict() | ({"content": write_parts(m)} if m.media else {}) | ({} if m.weight == 1 else {"weight": m.weight})
        for m in conversation.messages
    ]
    tools = {"tools": [dict(tool) for tool in conversation.tools]} if conversation.tools else {}
    return {"messages": turns, **tools}
