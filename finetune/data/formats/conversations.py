"""Read lists of messages, as OpenAI and ShareGPT write them, into a conversation.

The two differ in names only: ShareGPT calls a role `from`, a content `value`, the assistant `gpt`, and writes function
calls as a separate turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.config.schema import SourceConfig
from finetune.data.formats.attachments import MEDIA_PARTS, read_parts
from finetune.data.formats.messages import ROLES, Conversation, MediaPart, Message, ToolCall, Turn, out_of_order
from finetune.data.formats.rules import REASONING_KEYS, RowRules, reasoning_of, with_reasoning
from finetune.data.formats.values import Fields, as_json, as_text, is_empty, kind, listed, printable_name, shown
from finetune.system.errors import DataError

# Keys of a message that have a meaning; `columns` can map each.
MESSAGE_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "function_call", "train", "weight", "reasoning"}
)
# Keys that only describe a message; they are ignored.
METADATA_KEYS = frozenset(
    "name id tool_call_id call_id message_id parent_id turn_id turn_identifier index idx timestamp created created_at "
    "date time author user_id model source url language lang country state hashed_ip header toxic redacted type".split()
)
KNOWN_KEYS = MESSAGE_KEYS | METADATA_KEYS
_READ_KEYS = KNOWN_KEYS | frozenset(REASONING_KEYS)
# Keys with content that a chat template leaves out.
_LOST_KEYS = frozenset("refusal image images audio audios video videos file files".split())
# Types of the parts of a content. Other lists of objects are data.
_PARTS = frozenset({"text", "file", "input_file", "refusal", *MEDIA_PARTS})
# Role of ShareGPT's turns of function calls: they become tool calls of the assistant.
_CALL = "function_call"
# Loss weights are summed in 32 bits.
_LARGEST_WEIGHT = 1_000_000
# OpenAI's name of a key to ShareGPT's.
ALIASES = {"role": "from", "content": "value"}
# And other trainers' names of the loss mask.
_ALL_ALIASES = ALIASES | {"train": "loss", "weight": "loss_weight"}
# In lower case; a role in a file matches without case, and with a space or hyphen for an underscore.
ROLE_NAMES = (
    dict.fromkeys(("system", "developer", "system_prompt", "system_message"), "system")
    | dict.fromkeys(("user", "human", "prompter", "customer", "user_message", "human_message"), "user")
    | dict.fromkeys(
        "assistant gpt chatgpt gpt4 gpt_4 bing bard claude gemini model ai bot chatbot llm assistant_message "
        "ai_message".split(),
        "assistant",
    )
    | dict.fromkeys(
        "tool function observation tool_response function_response tool_result tool_output tool_message "
        "function_result function_output".split(),
        "tool",
    )
    | dict.fromkeys(("function_call", "tool_call"), _CALL)
)


@dataclass(frozen=True, slots=True)
class Spelling:
    """A source's names, and the rules for its values.

    keys: our key of a message to the file's. roles: the file's role to ours.
    """

    keys: Mapping[str, str]
    roles: Mapping[str, str]
    rules: RowRules

    @classmethod
    def of(cls, source: SourceConfig, rules: RowRules) -> Spelling:
        """Build it from the source's `columns` and `roles`; common role names stay known."""
        ours_of = {theirs: ours for ours, theirs in ALIASES.items()}
        keys = {ours_of.get(ours, ours): theirs for ours, theirs in source.columns.items() if ours in KNOWN_KEYS}
        named = {
            theirs: role
            for role, names in source.roles.items()
            for theirs in ([names] if isinstance(names, str) else names)
        }
        return cls(keys, ROLE_NAMES | named, rules)

    def are_turns(self, value: Any) -> bool:
        """Return whether a value is to be read as messages: it is a list, and no object that becomes JSON text."""
        if not isinstance(value, list) or self.rules.on_object == "error":
            return isinstance(value, list)
        names = {"role", "from", self.keys.get("role", "role")}
        return bool(value) and all(isinstance(item, Mapping) and not names.isdisjoint(item) for item in value)


def read_turns(items: Any, column: str, spelling: Spelling, assistant_weight: float = 1.0) -> list[Turn]:
    """Read the messages of one list.

    ShareGPT's function calls become tool calls of the assistant turn directly before them, if it has the same weight:
    a model speaks and calls in one turn. Otherwise they become an assistant turn.

    assistant_weight: of assistant messages without `train` and `weight`.
    Raises: DataError naming the column and the message.
    """
    if not isinstance(items, list) or not items:
        raise DataError(f"{column} must be a list of at least one message, found {kind(items) if items else 'nothing'}")
    turns: list[Turn] = []
    for i, item in enumerate(items):
        location = f"{column}[{i}]"
        if not isinstance(item, Mapping):
            raise DataError(f"{location} must be an object with a role and a content, found {kind(item)}")
        fields = Fields.of(item, spelling.keys, _ALL_ALIASES, location)
        _refuse_what_would_be_lost(fields)
        role = _role(fields, spelling.roles)
        weight = _weight(fields, assistant_weight if role in ("assistant", _CALL) else 1.0)
        message = _message(fields, role, weight, spelling.rules)
        before = turns[-1].message if turns else None
        if role == _CALL and before and before.role == "assistant" and before.weight == weight:
            joined = replace(before, tool_calls=before.tool_calls + message.tool_calls)
            turns[-1] = replace(turns[-1], message=joined)
        else:
            turns.append(Turn(location, message))
    return turns


def conversation(turns: Sequence[Turn], tools: tuple[Mapping[str, Any], ...], rules: RowRules) -> Conversation:
    """Build a conversation; `data.turn_order` decides whether its turns may have an unusual order.

    Raises: DataError naming the turn.
    """
    messages = [turn.message for turn in turns]
    if (found := out_of_order([message.role for message in messages])) is not None:
        i, reason = found
        if rules.turn_order == "strict":
            raise DataError(f"{turns[i].location} {reason}; to keep this order, set data.turn_order=any")
        if max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1) == 0:
            raise DataError(f"{turns[0].location} is the only answer, and nothing comes before it; remove the row")
        messages[i] = replace(messages[i], notes=(*messages[i].notes, "rows with an unusual order of turns"))
    return Conversation(tuple(messages), tools)


def read_tools(row: Fields) -> tuple[Mapping[str, Any], ...]:
    """Return the `tools` of a row, a list or its JSON text: schemas of functions, unchanged."""
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
    for key in sorted(key for key, value in fields.values.items() if key not in _READ_KEYS and not is_empty(value)):
        name, found = printable_name(key), kind(fields.values[key])
        location = fields.named(name)
        if key in _LOST_KEYS:
            raise DataError(
                f"{location} ({found}) would be lost: chat templates write contents only; move or remove it"
            )
        # It may be a flag by which another trainer masks.
        raise DataError(
            f"{location} ({found}) is no known key of a message ({listed(MESSAGE_KEYS)}); map it or remove it. "
            f"If it only describes the message, ignore it: columns: {{id: {name}}}"
        )


def _role(fields: Fields, roles: Mapping[str, str]) -> str:
    role, location = fields.get("role"), fields.named("role")
    if role is None:
        raise DataError(_missing(fields, "role"))
    if isinstance(role, str):
        known = role if role in roles else re.sub(r"[\s-]+", "_", role.strip()).lower()
        if known in roles:
            return roles[known]
    example = printable_name(role) if isinstance(role, str) else "bot"
    raise DataError(
        f"{location} is {shown(role)}; it must be {', '.join(ROLES)} or a common name of one, or mapped to one, as "
        f"roles: {{assistant: {example}}}"
    )


def _message(fields: Fields, role: str, weight: float, rules: RowRules) -> Message:
    given = [key for key in ("tool_calls", "function_call") if not is_empty(fields.get(key))]
    if len(given) == 2:
        raise DataError(f"{fields.location} has both tool_calls and function_call; keep tool_calls")
    notes: list[str] = []
    calls = _calls(fields.get(given[0]), fields.named(given[0]), notes) if given else ()
    content, location = fields.get("content"), fields.named("content")
    reasoning = reasoning_of(fields, rules, notes)
    media: tuple[MediaPart, ...] = ()
    if role == _CALL:
        if calls:
            raise DataError(f"{fields.location} is a function call and has tool calls; keep one of them")
        role, content, calls = "assistant", None, _calls(content, location, notes)
    if calls and role != "assistant":
        raise DataError(f"{fields.location} is of the {role} and calls a tool; only the assistant can")
    if reasoning and role != "assistant":
        raise DataError(f"{fields.location} is of the {role} and holds reasoning; only the assistant can")
    if content is None and calls:
        text = ""
    elif content is None and role == "tool" and "content" in fields.values:
        text = ""
        notes.append("tools answered null, read as empty text")
    elif content is None and "content" not in fields.values:
        raise DataError(_missing(fields, "content"))
    elif isinstance(content, list) and (rules.on_object == "error" or _are_parts(content)):
        text, media = read_parts(content, location)
    else:
        text = rules.text(content, location, notes)
    return Message(role, with_reasoning(text, reasoning, location), calls, weight, tuple(notes), media)


def _missing(fields: Fields, key: str) -> str:
    keys = listed(fields.names.get(found, found) for found in fields.values)
    example = {"role": "speaker", "content": "text"}[key]
    return (
        f"{fields.named(key)} is missing; the message has the keys {keys}; if one of them is intended, map it, as "
        f"columns: {{{key}: {example}}}"
    )


def _are_parts(content: list[Any]) -> bool:
    types = [part.get("type") for part in content if isinstance(part, Mapping)]
    return not content or any(isinstance(kind, str) and kind in _PARTS for kind in types)


def _calls(value: Any, location: str, notes: list[str]) -> tuple[ToolCall, ...]:
    """One call or a list of calls, decoded or as JSON text: `{"name", "arguments"}`, or this under `function`."""
    decoded = as_json(value, location)
    if not isinstance(decoded, list):
        return (_call(decoded, location, notes),)
    if not decoded:
        raise DataError(f"{location} must hold at least one call, found an empty list")
    return tuple(_call(call, f"{location}[{i}]", notes) for i, call in enumerate(decoded))


def _call(call: Any, location: str, notes: list[str]) -> ToolCall:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call, location = call["function"], f"{location}.function"
    if not isinstance(call, Mapping):
        raise DataError(f"{location} must be an object with name and arguments, found {kind(call)}")
    if missing := [key for key in ("name", "arguments") if key not in call]:
        raise DataError(f"{location} lacks {listed(missing)}; it has the keys {listed(call)}")
    name = as_text(call["name"], f"{location}.name")
    # Templates write the name between quotes as it is.
    if not name or json.dumps(name, ensure_ascii=False) != f'"{name}"':
        raise DataError(f"{location}.name must be text without quotes, backslashes, newlines, found {shown(name)}")
    arguments = call["arguments"]
    # A call without arguments: null, or text without a character.
    empty = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    notes += ["calls with empty arguments, read as {}"] * empty
    arguments = {} if empty else as_json(arguments, f"{location}.arguments")
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
    if not number or not 0 <= weight <= _LARGEST_WEIGHT:
        name = fields.named("weight")
        raise DataError(f"{name} must be a number from 0 to {_LARGEST_WEIGHT:,}, found {shown(weight)}")
    if train is not None and train != (weight > 0):
        raise DataError(
            f"{fields.location} has train: {str(train).lower()} and weight: {shown(weight)}; keep one of them"
        )
    return float(weight)
