"""Write the rows that both sides train on: one file of messages, from rows of several formats.

`rows` are used unchanged; `long` rows are conversations of many turns, joined until they have enough tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Message = dict[str, str]


def read_messages(file: Path) -> list[list[Message]]:
    """Read conversations from a JSONL of `messages`, or of rows whose first two columns are question and answer."""
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return [row["messages"] if "messages" in row else list(_turn(row)) for row in rows]


def _turn(row: Mapping[str, Any]) -> Iterator[Message]:
    question, answer = list(row.values())[:2]
    yield {"role": "user", "content": question}
    yield {"role": "assistant", "content": answer}


def write_rows(source: Path, target: Path, count: int) -> Path:
    """Write the first `count` rows as messages, and repeat the rows if there are fewer."""
    conversations = read_messages(source)
    return _write(target, itertools.islice(itertools.cycle(conversations), count))


def rows_holding(source: Path, tokenizer: Path, tokens: int) -> int:
    """Return how many rows, from the start and repeated if needed, contain `tokens` tokens."""
    lengths = map(_token_counter(tokenizer), itertools.cycle(read_messages(source)))
    return next(count for count, held in enumerate(itertools.accumulate(lengths), start=1) if held >= tokens)


def write_long_rows(source: Path, target: Path, tokenizer: Path, tokens: int, count: int) -> Path:
    """Write `count` conversations of consecutive rows with at least `tokens` tokens; training cuts them to `tokens`."""
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
    """Return the number of tokens in the contents of a conversation."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    return lambda messages: sum(len(encode(message["content"]).ids) for message in messages)


def _write(target: Path, conversations: Iterator[list[Message]]) -> Path:
    with target.open("w", encoding="utf-8") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return target
