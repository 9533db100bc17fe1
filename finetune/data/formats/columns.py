"""Recognize the columns of widely used datasets, and write the `columns:` setting with the same meaning.

The table holds names, not datasets. It covers Dolly, GSM8K, MetaMathQA, MATH, OpenOrca, Magicoder, CodeFeedback,
GPTeacher, Firefly, FLAN, natural-instructions, coedit, SAMSum, CNN/DailyMail, CAMEL, OIG, TruthfulQA and others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

from finetune.data.formats.values import listed

# Names in lower case, with underscores. An instruction makes an Alpaca row, because it may have an input.
_INSTRUCTIONS = frozenset({"instruction", "instructions", "definition"})
_QUESTIONS = _INSTRUCTIONS | frozenset(
    "prompt prompts question questions query queries problem user human user_input user_message user_prompt "
    "human_message".split()
)
# What a question is about; the question itself in rows without another.
_INPUTS = frozenset({"input", "inputs", "context", "passage", "sql_context"})
_ANSWERS = frozenset(
    "completion response responses answer output outputs target targets solution reply assistant assistant_message "
    "assistant_response bot gpt best_answer generated_solution model_response".split()
)
# Pairs with a meaning only together: a column `source` or `document` alone is often metadata.
_PAIRS = (
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("document", "summary"),
    ("message_1", "message_2"),
    ("sql_prompt", "sql"),
    ("src", "tgt"),
    ("source", "target"),
    ("q", "a"),
)
_MESSAGES = ("messages", "dialog", "dialogue", "dialogs", "chat", "turns", "chat_messages", "message_list")
_CONVERSATIONS = ("conversations", "conversation")
_TEXTS = ("text", "raw_content", "page_content")
# Our name of an optional column to other names.
_OPTIONAL = {
    "system": ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt"),
    "tools": ("tools", "functions"),
    "history": ("history",),
}
_MOST_SHOWN = 6
_PLAIN = re.compile(r"[A-Za-z_][\w.-]*")
# Words that YAML reads as another type.
_YAML_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


@dataclass(frozen=True)
class Reading:
    """What the columns of a row mean. columns: our names to the file's, where they differ."""

    format: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        return columns_line(self.columns)


def columns_line(columns: Mapping[str, str]) -> str:
    """Return the setting of a source that maps these columns."""
    return f"columns: {{{', '.join(f'{ours}: {_quoted(theirs)}' for ours, theirs in columns.items())}}}"


@lru_cache(maxsize=4096)
def recognize(columns: frozenset[str]) -> tuple[Reading, ...]:
    """Return every meaning that the table has for a row with these columns; none for unknown names."""
    by_name: dict[str, list[str]] = {}
    for column in sorted(columns):
        by_name.setdefault(_normal(column), []).append(column)
    return tuple(_readings(by_name))


def meanings(columns: frozenset[str]) -> str:
    """Return the problem of columns with several meanings, and one setting for each."""
    readings = recognize(columns)
    lines = "\n      ".join(map(str, readings[:_MOST_SHOWN]))
    return f"the columns {listed(columns)} have {len(readings)} meanings\nhelp: set one of\n      {lines}"


def _readings(by_name: Mapping[str, list[str]]) -> list[Reading]:
    def found(names: frozenset[str] | tuple[str, ...]) -> list[str]:
        return [column for name, columns in by_name.items() if name in names for column in columns]

    answers = found(_ANSWERS)
    asked = _asked(found(_QUESTIONS), found(_INPUTS)) if answers else []
    readings = [_pair(*question, answer) for question, answer in product(asked, answers)]
    if not readings:
        pairs = [(found((one,)), found((other,))) for one, other in _PAIRS]
        readings = [_pair(q, None, a) for questions, replies in pairs for q in questions for a in replies]
    for name, names, key in (
        ("messages", _MESSAGES, "messages"),
        ("sharegpt", _CONVERSATIONS, "conversations"),
        ("text", _TEXTS, "text"),
    ):
        if not readings:
            readings = [Reading(name, {key: column}) for column in found(names)]
    optional = {ours: found(names) for ours, names in _OPTIONAL.items()}
    return [full for reading in readings for full in _with_optional(reading, optional)]


def _asked(questions: list[str], inputs: list[str]) -> list[tuple[str, str | None]]:
    """Return (question, its input) in every possible way."""
    if questions and inputs:
        return list(product(questions, inputs))
    if len(inputs) > 1:
        return list(permutations(inputs, 2))
    return [(column, None) for column in questions or inputs]


def _pair(question: str, about: str | None, answer: str) -> Reading:
    if about is not None:
        return Reading("alpaca", {"instruction": question, "input": about, "output": answer})
    if _normal(question) in _INSTRUCTIONS:
        return Reading("alpaca", {"instruction": question, "output": answer})
    return Reading("prompt_completion", {"prompt": question, "completion": answer})


def _with_optional(reading: Reading, optional: Mapping[str, list[str]]) -> list[Reading]:
    """Return the reading with each choice of optional columns; documents have none, and only Alpaca rows a history."""
    of_format = {"text": (), "alpaca": tuple(optional)}.get(reading.format, ("system", "tools"))
    used = {ours: optional[ours] for ours in of_format if optional[ours]}
    every = [{**reading.columns, **dict(zip(used, choice, strict=True))} for choice in product(*used.values())]
    return [Reading(reading.format, {o: t for o, t in columns.items() if o != t}) for columns in every]


def _normal(column: str) -> str:
    """Return a name in lower case with underscores: `System Prompt` and `systemPrompt` are system_prompt."""
    return re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip().strip("\ufeff"))).lower()


def _quoted(name: str) -> str:
    plain = _PLAIN.fullmatch(name) and name.lower() not in _YAML_WORDS
    return name if plain else json.dumps(name, ensure_ascii=not name.isprintable())
