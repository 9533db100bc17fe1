"""Read pairs of a chosen and a rejected answer, in the forms that other trainers use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune.data.formats.attachments import attach_media, refuse_media
from finetune.data.formats.conversations import Spelling, conversation, read_tools, read_turns
from finetune.data.formats.messages import Conversation, Message, Preference, Turn
from finetune.data.formats.values import Fields, is_empty, kind, listed, shown
from finetune.system.errors import DataError

SIDES = ("chosen", "rejected")
EQUAL_SIDES = "are equal; remove the row"  # ends the message about such a pair
# Columns that hold the prompt of both sides.
PROMPTS = ("prompt", "question", "instruction", "conversations", "messages")
_VERDICTS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def parse_preference(row: Fields, spelling: Spelling) -> Preference:
    """Parse a pair.

    `{"prompt": …, "chosen": …, "rejected": …}`, each a text or a list of messages; also with the prompt in
    `conversations` or `instruction`, and with whole conversations as sides, whose common beginning is the prompt.

    Raises: DataError naming the column and the message.
    """
    sides = {name: _side(row, name, spelling) for name in SIDES}
    whole = [name for name, turns in sides.items() if turns[0].message.role != "assistant"]
    if len(whole) == 1:
        other = next(name for name in SIDES if name not in whole)
        raise DataError(
            f"{row.named(whole[0])} holds a whole conversation, and {row.named(other)} only an answer; write both alike"
        )
    prompt = [] if whole else _prompt(row, spelling)
    if whole:
        common = _common_turns(sides["chosen"], sides["rejected"], row)
        prompt, sides = sides["chosen"][:common], {name: turns[common:] for name, turns in sides.items()}
    if not whole and prompt and prompt[-1].message.role == "assistant":
        raise DataError(f"{prompt[-1].location} is of the assistant, like the first turn of both sides; make them one")
    system = row.text("system", default="")
    if system and prompt[0].message.role == "system":
        raise DataError(f"{prompt[0].location} and {row.named('system')} are both system texts; keep one of them")
    first = [Turn(row.named("system"), Message("system", system))] if system else []
    for turns in sides.values():
        refuse_media(row, turns)
    asked = attach_media(row, [*first, *prompt])
    untrained = [replace(turn, message=replace(turn.message, weight=0.0)) for turn in asked]
    tools = read_tools(row)
    chosen, rejected = (conversation([*untrained, *sides[name]], tools, spelling.rules) for name in SIDES)
    if chosen != rejected and _without_outer_space(chosen) == _without_outer_space(rejected):
        names = f"{row.named('chosen')} and {row.named('rejected')}"
        raise DataError(f"{names}, but for white space at their ends, {EQUAL_SIDES}")
    return Preference(chosen, rejected)


def _without_outer_space(chat: Conversation) -> list[Message]:
    return [replace(message, content=message.content.strip()) for message in chat.messages]


def verdict_of(value: Any) -> bool:
    """Return what a row says of its answer: true or false, also written as 1, 0 or text.

    Raises: DataError for any other value.
    """
    known = value.lower() if isinstance(value, str) else value
    if not isinstance(known, bool | int | str) or known not in _VERDICTS:
        raise DataError(f"the label must be true (a good answer) or false, found {shown(value)}")
    return _VERDICTS[known]


def answer_alone(chat: Conversation) -> Conversation:
    """Return the conversation with only its last answer trained: the turns after the last one of the user."""
    last = max((i for i, message in enumerate(chat.messages) if message.role == "user"), default=-1)
    prompt = tuple(replace(message, weight=0.0) for message in chat.messages[: last + 1])
    return replace(chat, messages=(*prompt, *chat.messages[last + 1 :]))


def _side(row: Fields, name: str, spelling: Spelling) -> list[Turn]:
    value, location = row.get(name), row.named(name)
    if is_empty(value) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{location} is empty; a pair needs both answers")
    if isinstance(value, Mapping) and not {"role", "from", *spelling.keys.values()}.isdisjoint(value):
        value = [value]
    if spelling.are_turns(value):
        return read_turns(value, location, spelling)
    notes: list[str] = []
    return [Turn(location, Message("assistant", spelling.rules.text(value, location, notes), notes=tuple(notes)))]


def _prompt(row: Fields, spelling: Spelling) -> list[Turn]:
    given = [name for name in PROMPTS if not is_empty(row.get(name))]
    if not given:
        raise DataError(
            f"the row has no prompt ({', '.join(PROMPTS)}); its columns: {listed(row.values)}; map one, as "
            "columns: {prompt: query}"
        )
    if len(given) > 1:
        raise DataError(
            f"{listed(given)} are all prompts; keep one of them, or map it, as columns: {{prompt: {given[0]}}}"
        )
    name = given[0]
    value, location = row.get(name), row.named(name)
    if spelling.are_turns(value):
        return read_turns(value, location, spelling)
    if not isinstance(value, str):
        raise DataError(f"{location} must be a text or a list of messages, found {kind(value)}")
    notes: list[str] = []
    text = spelling.rules.text(value, location, notes)
    if name == "instruction" and not is_empty(row.get("input")):
        text += "\n" + spelling.rules.text(row.get("input"), row.named("input"), notes)
    return [Turn(location, Message("user", text, notes=tuple(notes)))]


def _common_turns(chosen: list[Turn], rejected: list[Turn], row: Fields) -> int:
    """Return how many turns both sides open with; the next one must be an answer on both sides."""
    pairs = list(zip(chosen, rejected, strict=False))
    common = next((i for i, (a, b) in enumerate(pairs) if a.message != b.message), len(pairs))
    if common == len(chosen) == len(rejected):
        raise DataError(f"{row.named('chosen')} and {row.named('rejected')} {EQUAL_SIDES}")
    for turns in (chosen, rejected):
        if common == len(turns):
            raise DataError(f"{turns[-1].location} ends where the other side goes on; end both sides with an answer")
        if turns[common].message.role != "assistant":
            raise DataError(
                f"{turns[common].location} differs from the other side before any answer; both need the same prompt"
            )
    return common


def add_system(chat: Conversation, system: str) -> Conversation:
    """Return the conversation with a system message before it, if it has none."""
    if chat.messages[0].role == "system":
        return chat
    return replace(chat, messages=(Message("system", system), *chat.messages))
