"""What the config decides about values of a row that can be read in more than one way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.config.sections import OnObject, ReasoningRule, TurnOrder
from finetune.data.formats.messages import THINK_TAGS
from finetune.data.formats.values import Fields, as_json, as_text, is_empty, kind
from finetune.system.errors import DataError

# Keys of a message that hold reasoning, in the APIs and datasets of several labs.
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking", "thoughts")


@dataclass(frozen=True, slots=True)
class RowRules:
    """The settings of the data section that decide what a row means; see their descriptions."""

    reasoning: ReasoningRule = "error"
    on_object: OnObject = "error"
    turn_order: TurnOrder = "any"

    @classmethod
    def of(cls, cfg: Any) -> RowRules:
        """Take them from a section that has these settings."""
        return cls(cfg.reasoning, cfg.on_object, cfg.turn_order)

    def changed(self) -> dict[str, str]:
        """Return the settings that differ from their defaults."""
        return {key: value for key, value in asdict(self).items() if value != getattr(DEFAULT_RULES, key)}

    def text(self, value: Any, location: str, notes: list[str]) -> str:
        """Return a value as text. A number or a boolean becomes its JSON text; an object or list if the rules say so.

        notes: gets a line for a value that was no text.
        Raises: DataError naming the location.
        """
        if isinstance(value, Mapping | list):
            if self.on_object == "error":
                raise DataError(
                    f"{location} must be text, found {kind(value)}; to write it as JSON, set data.on_object=json"
                )
            notes.append("objects or lists, read as JSON text")
        elif isinstance(value, bool | int | float):
            notes.append("numbers or booleans, read as text")
        else:
            return as_text(value, location)
        # Refuses what JSON cannot hold, and integers that Python does not print.
        return json.dumps(as_json(value, location), ensure_ascii=False)


DEFAULT_RULES = RowRules()


def reasoning_of(fields: Fields, rules: RowRules, notes: list[str]) -> str:
    """Return the reasoning that a message holds in a field of its own; empty if there is none, or it is left out.

    notes: gets a line for reasoning that is read or left out.
    Raises: DataError if the rules refuse it, or if two fields differ.
    """
    found = [key for key in REASONING_KEYS if not is_empty(fields.get(key))]
    if not found or rules.reasoning == "drop":
        notes += ["reasoning left out"] * bool(found)
        return ""
    texts = {as_text(fields.get(key), fields.named(key)).strip(): fields.named(key) for key in found}
    if len(texts) > 1:
        raise DataError(f"{' and '.join(texts.values())} differ; keep one of them")
    [(text, location)] = texts.items()
    if text and rules.reasoning == "error":
        raise DataError(
            f"{location} holds reasoning; to train on it, or to leave it out, set data.reasoning=think or "
            "data.reasoning=drop"
        )
    if any(tag in text for tag in THINK_TAGS):
        raise DataError(f"{location} holds {' or '.join(THINK_TAGS)}, so its end would be a guess; remove the tags")
    notes += ["reasoning written in <think> tags"] * bool(text)
    return text


def with_reasoning(content: str, reasoning: str, location: str) -> str:
    """Put reasoning before a content, as Qwen3 and R1 write it.

    Raises: DataError if the content has other reasoning.
    """
    if not reasoning or (THINK_TAGS[1] in content and reasoning in content):
        return content
    if any(tag in content for tag in THINK_TAGS):
        raise DataError(f"{location} and the field of reasoning hold different reasoning; keep one of them")
    return f"{THINK_TAGS[0]}\n{reasoning}\n{THINK_TAGS[1]}\n\n{content.lstrip()}"
