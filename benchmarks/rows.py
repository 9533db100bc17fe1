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


def write_pairs(source: Path, folder: Path, tokenizer: Path, lengths: tuple[int, int], count: int) -> tuple[Path, Path]:
    """Write `count` pairs of answers from the texts of `source`, and the same answers as two rows of messages each.

    lengths: tokens of a prompt and of an answer, before the template, almost exact: a cut text may tokenize anew.
    """
    message = _message_maker(source, tokenizer)
    pairs = []
    for _ in range(count):
        prompt, chosen, rejected = (
            [message(role, tokens)]
            for role, tokens in (("user", lengths[0]), ("assistant", lengths[1]), ("assistant", lengths[1]))
        )
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    answers = (pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected"))
    return file, _write(folder / "answers.jsonl", answers)


def write_prompts(source: Path, target: Path, tokenizer: Path, tokens: int, count: int) -> Path:
    """Write `count` prompts from the texts of `source` of about so many tokens, each with a short answer."""
    message = _message_maker(source, tokenizer)
    return _write(target, ([message("user", tokens), message("assistant", 4)] for _ in range(count)))


def _message_maker(source: Path, tokenizer: Path) -> Callable[[str, int], Message]:
    """Return what makes a message of a role and a number of tokens, from consecutive texts of `source`."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = itertools.cycle(message["content"] for turns in read_messages(source) for message in turns)
    ids = itertools.chain.from_iterable(words.encode(f"{text} ").ids for text in texts)

    def message(role: str, tokens: int) -> Message:
        return {"role": role, "content": words.decode([*itertools.islice(ids, tokens)]).strip()}

    return message


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
