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
from finetune.data.tokens.store import ROW, BadRow, EncodedBatch
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
            try:
                yield row, row.value if isinstance(row.value, DataError) else self.parser.parse(row.value)
            except DataError as error:
                yield row, error

    def __call__(self, batch: RawBatch) -> EncodedBatch:
        """Encode a batch; rows that cannot be used are listed in it."""
        parsed = list(self.examples(batch))
        conversations = [example for _, example in parsed if isinstance(example, Conversation)]
        chats = iter(self.chat.encode(conversations, self.train_on))
        texts = self._encode_texts([example.text for _, example in parsed if isinstance(example, RawText)])
        rows: list[tuple[int, ...]] = []
        good: list[Encoded] = []
        bad: list[BadRow] = []
        for row, example in parsed:
            match example:
                case Conversation():
                    encoded = next(chats)
                case RawText():
                    encoded = next(texts)
                case TokenRow():
                    encoded = self._encode_tokens(example)
                case DataError():
                    encoded = example
            if isinstance(encoded, DataError) or isinstance(example, DataError):
                bad.append(BadRow(row.index, str(row.location), str(encoded)))
                continue
            control_tokens = sum(map(self.chat.control_tokens_in, texts_of(example)))
            content = content_hash(example, encoded.media_digest)
            number = row.location.number
            rows.append((len(encoded.ids), encoded.targets, row.index, number, 0, control_tokens, content))
            good.append(encoded)
        none = [np.empty(0)]
        return EncodedBatch(
            file=batch.file,
            unit=batch.unit,
            rows=np.array(rows, ROW),
            ids=np.concatenate([encoded.ids for encoded in good] or none).astype(np.int32, copy=False),
            weights=np.concatenate([encoded.weights for encoded in good] or none).astype(np.float32, copy=False),
            media_digests=tuple(encoded.media_digest for encoded in good),
            bad=tuple(bad),
            bytes_read=batch.bytes_read,
        )

    def _encode_texts(self, texts: Sequence[str]) -> Iterator[Encoded | DataError]:
        """Every token is a target, and so is the end token after them."""
        for ids in self.chat.encode_texts(texts) if texts else ():
            ids = np.append(ids, np.int32(self.chat.end_of_text_id))
            weights = np.ones(len(ids), dtype=np.float32)
            yield Encoded(ids, weights) if len(ids) > 1 else DataError("the text is empty")

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


def texts_of(example: Example) -> Iterator[str]:
    """Yield every text of a row."""
    if isinstance(example, RawText):
        yield example.text
    if isinstance(example, Conversation):
        for message in example.messages:
            yield from _strings([message.content, *({call.name: call.arguments} for call in message.tool_calls)])
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
