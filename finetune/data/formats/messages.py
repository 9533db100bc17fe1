"""What every row format is parsed into: a conversation, a raw text, or tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.media.media import MediaKind

ROLES = ("system", "user", "assistant", "tool")
# Around the reasoning in a content.
THINK_TAGS = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant turn calls. arguments: the decoded JSON object, never its text."""

    name: str
    arguments: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A picture, a sound or a video in a turn.

    reference: an absolute path, a data URI, or the bytes of a file.
    offset: the character of the turn's content before which it stands.
    """

    kind: MediaKind
    reference: str | bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    role: one of ROLES.
    content: its text, without tags of media.
    media: in order.
    tool_calls: of an assistant turn, after its text.
    weight: factor of its loss if `data.train_on` selects the turn; 0 leaves it untrained.
    notes: what was read in another form than it is written; the log counts equal notes.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float = 1.0
    notes: tuple[str, ...] = field(default=(), compare=False)
    media: tuple[MediaPart, ...] = ()

    @property
    def parts(self) -> list[str | MediaPart]:
        """Return texts and media in order, without empty texts."""
        parts: list[str | MediaPart] = []
        at = 0
        for part in self.media:
            parts += [self.content[at : part.offset], part]
            at = part.offset
        return [part for part in (*parts, self.content[at:]) if part]

    @property
    def shown(self) -> str:
        """The content with a tag for each medium, for people to read."""
        return "".join(part if isinstance(part, str) else f"<{part.kind}>" for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the turn with OpenAI's keys, as chat templates take it; weight and files are left out."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.media:
            turn["content"] = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind} for part in self.parts
            ]
        return turn | {"tool_calls": [call.as_dict() for call in self.tool_calls]} if self.tool_calls else turn


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its location in its row."""

    location: str
    message: Message


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row of a chat format.

    tools: JSON schemas of the available functions, as in the row.
    verdict: what the row says of its last answer, as in the file: true or false; None if it says nothing.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    verdict: Any = field(default=None, compare=False)

    @property
    def has_answer(self) -> bool:
        """Whether the last turn is the assistant's."""
        return self.messages[-1].role == "assistant"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last turn, if that is the assistant's; else all of them."""
        return self.messages[:-1] if self.has_answer else self.messages


@dataclass(frozen=True, slots=True)
class Preference:
    """A pair of conversations with the same prompt: the answer that is preferred, and another one."""

    chosen: Conversation
    rejected: Conversation


def out_of_order(roles: Sequence[str]) -> tuple[int, str] | None:
    """Return the first turn out of the usual order and what is unusual about it; None if there is none.

    The usual order: at most one system turn, at the start; a user turn before the first assistant turn; a tool turn
    after an assistant turn or another tool turn. Several turns of one role in a row are usual.
    """
    before = None
    for i, role in enumerate(roles):
        if role == "system" and i > 0:
            return i, "is a system turn that is not the first turn"
        if role in ("assistant", "tool") and before in (None, "system"):
            return i, f"is of the {role}, with no user turn before it"
        if role == "tool" and before == "user":
            return i, "is a tool's answer without an assistant turn before it"
        before = role
    return None


@dataclass(frozen=True, slots=True)
class RawText:
    """A document for continued pretraining: all its tokens are targets, and so is the end token."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that is already tokenized. labels: not shifted, -100 where untrained; None trains every token."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None


Example = Conversation | Preference | RawText | TokenRow
