"""The rows that both sides train on: one file of messages, from rows of any of the usual shapes.

`rows` are taken as they are; `long` rows are conversations of many turns, joined until they have enough tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Message = dict[str, str]


def read_messages(file: Path) -> list[list[Message]]:
    """Conversations of a JSONL of `messages`, or of rows whose first two columns are a question and its answer."""
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return [row["messages"] if "messages" in row else list(_turn(row)) for row in rows]


def _turn(row: Mapping[str, Any]) -> Iterator[Message]:
    question, answer = list(row.values())[:2]
    yield {"role": "user", "content": question}
    yield {"role": "assistant", "content": answer}


def write_rows(source: Path, target: Path, count: int) -> Path:
    """The first `count` rows as messages; when there are fewer, all of them again until there are enough."""
    conversations = read_messages(source)
    return _write(target, itertools.islice(itertools.cycle(conversations), count))


def rows_holding(source: Path, tokenizer: Path, tokens: int) -> int:
    """How many rows it takes, from the first on and beginning again after the last, until contents hold `tokens`."""
    lengths = map(_token_counter(tokenizer), itertools.cycle(read_messages(source)))
    return next(count for count, held in enumerate(itertools.accumulate(lengths), start=1) if held >= tokens)


def write_long_rows(source: Path, target: Path, tokenizer: Path, tokens: int, count: int) -> Path:
    """`count` conversations of at least `tokens` tokens each, made of consecutive rows; trained cut off at `tokens`."""
    count_tokens = _token_counter(tokenizer)
    turns = itertools.cycle(read_messages(source))

    def joined() -> Iterator[list[Message]]:
        for _ in range(count):
            messages: list[Message] = []
            length = 0
            while length < tokens:
                turn = next(turns)
                messages += turn
                length += count_tokens(turn)
            yield messages

    return _write(target, joined())


def _token_counter(tokenizer: Path) -> Callable[[list[Message]], int]:
    """Tokens of the contents of a conversation."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    return lambda messages: sum(len(encode(message["content"]).ids) for message in messages)


def _write(target: Path, conversations: Iterator[list[Message]]) -> Path:
    with target.open("w", encoding="utf-8") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return target
