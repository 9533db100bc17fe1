"""Lists of messages, as OpenAI and ShareGPT write them, and what makes a conversation of them.

The two differ in names only, so one reader takes both: ShareGPT calls a role `from`, a content `value`, an assistant
`gpt`, and gives the calls of functions a turn of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.config.schema import SourceConfig
from finetune.data.formats.messages import Conversation, Message, ToolCall
from finetune.data.formats.values import Fields, as_json, as_text, is_empty, kind, listed, printable_name, shown
from finetune.system.errors import DataError

# What messages of a list may be trained by; a source can call each otherwise.
MESSAGE_KEYS = frozenset({"role", "content", "from", "value", "tool_calls", "function_call", "train", "weight"})
# Keys that describe a message and say nothing a model should learn.
METADATA_KEYS = frozenset(
    "name id tool_call_id call_id message_id parent_id turn_id turn_identifier index idx timestamp created created_at "
    "date time author user_id model source url language lang country state hashed_ip header toxic redacted type".split()
)
KNOWN_KEYS = MESSAGE_KEYS | METADATA_KEYS
# Keys whose content the chat template would leave out.
_LOST_KEYS = frozenset(
    "reasoning reasoning_content thinking thoughts refusal image images audio audios video videos file files".split()
)
_EXAMPLES = {"role": "speaker", "content": "text"}
# ShareGPT's turn that calls functions: no role of a message, its text becomes the assistant's tool calls.
_CALL = "function_call"
# Loss weights are summed in 32 bits.
_HEAVIEST = 1_000_000


# ShareGPT's names of what OpenAI calls role and content.
ALIASES = {"role": "from", "content": "value"}
ROLE_NAMES = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("user", "human"), "user")
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
    | dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool")
    | dict.fromkeys(("function_call", "tool_call"), _CALL)
)


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a source calls the keys of its messages (ours to theirs) and their roles (theirs to ours)."""

    keys: Mapping[str, str]
    roles: Mapping[str, str]

    @classmethod
    def of(cls, source: SourceConfig) -> Spelling:
        """What the source's `columns` and `roles` say; common names stay known."""
        ours_of = {theirs: ours for ours, theirs in ALIASES.items()}
        keys = {ours_of.get(ours, ours): theirs for ours, theirs in source.columns.items() if ours in KNOWN_KEYS}
        named = {
            theirs: role
            for role, names in source.roles.items()
            for theirs in ([names] if isinstance(names, str) else names)
        }
        return cls(keys, ROLE_NAMES | named)


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and where it stands in its row."""

    location: str
    message: Message


def read_turns(items: Any, column: str, spelling: Spelling, assistant_weight: float = 1.0) -> list[Turn]:
    """The messages of one list.

    ShareGPT's function calls become tool calls of an assistant turn: of the one directly before them, if there is one
    of the same weight, because a model speaks and calls in one turn (two turns in a row never happen when it serves).
    assistant_weight: of the assistant's messages that say nothing about `train` or `weight`.
    Raises: DataError naming the column and the message.
    """
    if not isinstance(items, list) or not items:
        raise DataError(f"{column} must be a list of at least one message, found {kind(items) if items else 'nothing'}")
    turns: list[Turn] = []
    for i, item in enumerate(items):
        location = f"{column}[{i}]"
        if not isinstance(item, Mapping):
            raise DataError(f"{location} must be an object with a role and a content, found {kind(item)}")
        fields = Fields.of(item, spelling.keys, ALIASES, location)
        _refuse_what_would_be_lost(fields)
        role = _role(fields, spelling.roles)
        weight = _weight(fields, assistant_weight if role in ("assistant", _CALL) else 1.0)
        message = _message(fields, role, weight)
        before = turns[-1].message if turns else None
        if role == _CALL and before and before.role == "assistant" and before.weight == weight:
            joined = replace(before, tool_calls=before.tool_calls + message.tool_calls)
            turns[-1] = replace(turns[-1], message=joined)
        else:
            turns.append(Turn(location, message))
    return turns


def conversation(turns: Sequence[Turn], tools: tuple[Mapping[str, Any], ...]) -> Conversation:
    """Turns in an order that makes sense to a chat template.

    One system turn at most, and at the start; the user speaks before the assistant; a tool answers an assistant turn
    or follows another tool. Whether that assistant turn called it in `tool_calls` or in its text is not asked: much
    data has calls in the text. Several turns of one role in a row stay as they are: Qwen's template writes each user's
    turn under a header of its own.
    Raises: DataError naming the turn.
    """
    before = None
    for i, turn in enumerate(turns):
        role = turn.message.role
        if role == "system" and i > 0:
            first = turns[0]
            found = f"the second, after {first.location}" if first.message.role == "system" else "not at the start"
            raise DataError(f"{turn.location} is a system turn, and {found}; a conversation has one, at the start")
        if role in ("assistant", "tool") and before in (None, "system"):
            raise DataError(f"{turn.location} is of the {role}, with no user turn before it; remove it")
        if role == "tool" and before == "user":
            raise DataError(f"{turn.location} is a tool's answer, but no assistant turn before it called one")
        before = role
    return Conversation(tuple(turn.message for turn in turns), tools)


def read_tools(row: Fields) -> tuple[Mapping[str, Any], ...]:
    """The `tools` of a row, given as a list or its JSON text: schemas of functions, kept as they are."""
    value, location = row.get("tools"), row.named("tools")
    if is_empty(value):
        return ()
    tools = as_json(value, location)
    if not isinstance(tools, list):
        raise DataError(f"{location} must be a list of objects or its JSON text, found {kind(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not tool:
            raise DataError(f"{location}[{i}] must be an object that describes a function, found {kind(tool)}")
    return tuple(tools)


def _refuse_what_would_be_lost(fields: Fields) -> None:
    if KNOWN_KEYS.issuperset(fields.values):
        return
    for key in sorted(key for key, value in fields.values.items() if key not in KNOWN_KEYS and not is_empty(value)):
        name, found = printable_name(key), kind(fields.values[key])
        location = fields.named(name)
        if key in _LOST_KEYS:
            raise DataError(
                f"{location} ({found}) would be lost, for chat templates write contents only; move or remove it"
            )
        # A flag that some other trainer masks by would be lost as silently as a text.
        raise DataError(
            f"{location} ({found}) is no known key of a message ({listed(MESSAGE_KEYS)}); map it or remove it. "
            f"If it only describes the message, ignore it: columns: {{id: {name}}}"
        )


def _role(fields: Fields, roles: Mapping[str, str]) -> str:
    role, location = fields.get("role"), fields.named("role")
    if role is None:
        raise DataError(_missing(fields, "role"))
    if not isinstance(role, str) or role not in roles:
        raise DataError(
            f"{location} is {shown(role)}; it must be one of {listed(roles)}, or mapped to one, as roles: "
            f"{{assistant: {printable_name(role) if isinstance(role, str) else 'bot'}}}"
        )
    return roles[role]


def _message(fields: Fields, role: str, weight: float) -> Message:
    calls = _tool_calls(fields)
    if role == _CALL:
        if calls:
            raise DataError(f"{fields.location} is a function call and has tool calls besides; keep one of them")
        return Message("assistant", "", _calls(fields.get("content"), fields.named("content")), weight)
    if calls and role != "assistant":
        raise DataError(f"{fields.location} is of the {role} and calls a tool; only the assistant can")
    content, location = fields.get("content"), fields.named("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{location}[{i}]") for i, part in enumerate(content))
    elif content is None and calls:
        content = ""
    elif content is None and "content" not in fields.values:
        raise DataError(_missing(fields, "content"))
    return Message(role, as_text(content, location), calls, weight)


def _missing(fields: Fields, key: str) -> str:
    return (
        f"{fields.named(key)} is missing; the message has the keys {listed(fields.keys())}; if one of them is meant, "
        f"map it, as columns: {{{key}: {_EXAMPLES[key]}}}"
    )


def _part(part: Any, location: str) -> str:
    if not isinstance(part, Mapping):
        raise DataError(f"{location} must be an object with type and text, found {kind(part)}")
    if part.get("type") != "text":
        raise DataError(f"{location}.type is {shown(part.get('type'))}; only parts of type 'text' can be trained on")
    return as_text(part.get("text"), f"{location}.text")


def _tool_calls(fields: Fields) -> tuple[ToolCall, ...]:
    given = [key for key in ("tool_calls", "function_call") if not is_empty(fields.get(key))]
    if len(given) == 2:
        raise DataError(f"{fields.location} has both tool_calls and function_call; keep tool_calls")
    return _calls(fields.get(given[0]), fields.named(given[0])) if given else ()


def _calls(value: Any, location: str) -> tuple[ToolCall, ...]:
    """One call or a list of them, decoded or as JSON text; each `{"name", "arguments"}`, or that as its `function`."""
    decoded = as_json(value, location)
    if not isinstance(decoded, list):
        return (_call(decoded, location),)
    if not decoded:
        raise DataError(f"{location} must hold at least one call, found an empty list")
    return tuple(_call(call, f"{location}[{i}]") for i, call in enumerate(decoded))


def _call(call: Any, location: str) -> ToolCall:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call, location = call["function"], f"{location}.function"
    if not isinstance(call, Mapping):
        raise DataError(f"{location} must be an object with name and arguments, found {kind(call)}")
    if missing := [key for key in ("name", "arguments") if call.get(key) is None]:
        raise DataError(f"{location} lacks {listed(missing)}; it has the keys {listed(call)}")
    name = as_text(call["name"], f"{location}.name")
    # Templates write the name between quotes as it is.
    if not name or json.dumps(name, ensure_ascii=False) != f'"{name}"':
        raise DataError(f"{location}.name is {shown(name)}; it must be text without quotes, backslashes or line breaks")
    arguments = as_json(call["arguments"], f"{location}.arguments")
    if not isinstance(arguments, Mapping):
        raise DataError(f"{location}.arguments must be an object or its JSON text, found {kind(arguments)}")
    return ToolCall(name, arguments)


def _weight(fields: Fields, default: float) -> float:
    train, weight = fields.get("train"), fields.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{fields.named('train')} must be true or false, found {kind(train)}")
    if weight is None:
        return default if train is None else float(train)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 <= weight <= _HEAVIEST:
        raise DataError(f"{fields.named('weight')} must be a number from 0 to {_HEAVIEST:,}, found {shown(weight)}")
    if train is not None and train != (weight > 0):
        raise DataError(
            f"{fields.location} says train: {str(train).lower()} and weight: {shown(weight)}; keep one of them"
        )
    return float(weight)
