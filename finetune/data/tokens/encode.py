"""Encode rows as tokens and loss weights, in one process and without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.encoded import IGNORE_INDEX, Encoded
from finetune.data.formats.messages import Conversation, Example, RawText, TokenRow, ToolCall
from finetune.data.formats.parser import RowParser
from finetune.data.sources.readers import RawBatch, Row
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.store import BadRow, EncodedBatch
from finetune.system.errors import DataError

# Part of every cache's fingerprint: raise it when the same rows give other tokens, weights or hashes.
ENCODING_VERSION = 1


@dataclass(frozen=True)
class RowEncoder:
    """Decodes, parses and encodes rows. Picklable, for worker processes."""

    parser: RowParser
    chat: ChatTemplate
    train_on: str

    def examples(self, batch: RawBatch) -> Iterator[tuple[Row, Example | DataError]]:
        """Yield each row of the batch with its example or its error."""
        for row in batch.rows():
            yield row, self.parse(row.value)

    def parse(self, value: Any) -> Example | DataError:
        """Parse a decoded row; return an error unchanged."""
        if isinstance(value, DataError):
            return value
        try:
            return self.parser.parse(value)
        except DataError as error:
            return error

    def __call__(self, batch: RawBatch) -> EncodedBatch:
        """Encode a batch; rows that cannot be used are listed in it."""
        parsed = list(self.examples(batch))
        results = iter(self.encode([example for _, example in parsed if not isinstance(example, DataError)]))
        good: list[tuple[Row, Example, Encoded]] = []
        bad: list[BadRow] = []
        for row, example in parsed:
            result = example if isinstance(example, DataError) else next(results)
            if isinstance(example, DataError) or isinstance(result, DataError):
                bad.append(BadRow(row.index, str(row.location), str(result)))
            else:
                good.append((row, example, result))
        return self._collect(batch, good, bad)

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """Return the tokens and loss weights of each example, in order."""
        chats = [example for example in examples if isinstance(example, Conversation)]
        texts = [example for example in examples if isinstance(example, RawText)]
        tokens = [example for example in examples if isinstance(example, TokenRow)]
        encoded: dict[type, Iterator[Encoded | DataError]] = {
            Conversation: iter(self.chat.encode(chats, self.train_on)),
            RawText: iter(self._encode_texts(texts)),
            TokenRow: map(self._encode_tokens, tokens),
        }
        return [next(encoded[type(example)]) for example in examples]

    def _encode_texts(self, texts: Sequence[RawText]) -> list[Encoded | DataError]:
        """Every token is a target, and so is the end token after them."""
        if not texts:
            return []
        end = np.array([self.chat.end_of_text_id], dtype=np.int32)
        encoded = [np.concatenate([ids, end]) for ids in self.chat.encode_texts([text.text for text in texts])]
        return [
            Encoded(ids, np.ones(len(ids), dtype=np.float32)) if len(ids) > 1 else DataError("the text is empty")
            for ids in encoded
        ]

    def _encode_tokens(self, row: TokenRow) -> Encoded | DataError:
        if row.input_ids and max(row.input_ids) >= self.chat.vocabulary_size:
            return DataError(
                f"input_ids: the largest id of the tokenizer is {self.chat.vocabulary_size - 1}, found "
                f"{max(row.input_ids)}; was the row tokenized for another model?"
            )
        ids = np.asarray(row.input_ids, dtype=np.int32)
        trained = np.ones(len(ids), bool) if row.labels is None else np.asarray(row.labels) != IGNORE_INDEX
        if not trained[1:].any():
            return DataError("the row has no target: labels or masks leave out every token")
        return Encoded(ids, trained.astype(np.float32))

    def _collect(
        self, batch: RawBatch, good: list[tuple[Row, Example, Encoded]], bad: Sequence[BadRow]
    ) -> EncodedBatch:
        def column(values: list[int], dtype: type = np.int64) -> np.ndarray:
            return np.array(values, dtype=dtype)

        control_tokens = [sum(map(self.chat.control_tokens_in, texts_of(example))) for _, example, _ in good]
        none = [np.empty(0)]
        return EncodedBatch(
            file=batch.file,
            unit=batch.unit,
            lengths=column([len(encoded.ids) for _, _, encoded in good]),
            indices=column([row.index for row, _, _ in good]),
            numbers=column([row.location.number for row, _, _ in good]),
            hashes=column([content_hash(example, encoded.media_digest) for _, example, encoded in good], np.uint64),
            control_tokens=column(control_tokens, np.int32),
            ids=np.concatenate([encoded.ids for _, _, encoded in good] or none).astype(np.int32, copy=False),
            weights=np.concatenate([encoded.weights for _, _, encoded in good] or none).astype(np.float32, copy=False),
            media_digests=tuple(encoded.media_digest for _, _, encoded in good),
            bad=tuple(bad),
            bytes_read=batch.bytes_read,
        )


def texts_of(example: Example) -> Iterator[str]:
    """Yield every text of a row."""
    if isinstance(example, RawText):
        yield example.text
    if isinstance(example, Conversation):
        for message in example.messages:
            yield message.content
            for call in message.tool_calls:
                yield from _strings({call.name: call.arguments})
        yield from _strings(example.tools)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def content_hash(example: Example, media_digest: bytes = b"") -> int:
    """Return 64 bits of a hash of a row's texts and media; spelling in the file and loss weights do not count."""
    if isinstance(example, Conversation):
        turns = [(m.role, m.content, *map(ToolCall.as_dict, m.tool_calls)) for m in example.messages]
        content: Any = [turns, example.tools]
    else:
        content = example.text if isinstance(example, RawText) else example.input_ids
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=dict)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    digest.update(media_digest)
    return int.from_bytes(digest.digest(), "little")
