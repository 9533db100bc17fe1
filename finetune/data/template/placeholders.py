"""Put measured media in the place of a chat template's placeholder tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from finetune.data.encoded import Encoded
from finetune.data.formats.messages import Message
from finetune.data.media.media import Media
from finetune.data.media.processor import MediaProcessor
from finetune.data.positions import PlacedMedia
from finetune.system.errors import DataError


def place_media(
    encoded: Encoded, messages: Sequence[Message], processor: MediaProcessor | None, control_ids: Mapping[str, int]
) -> Encoded:
    """Repeat each placeholder token as often as its medium has embeddings; these tokens are no targets.

    The texts of a conversation never hold such a token: they are encoded without control tokens.

    Args:
        encoded: tokens of the template, with one placeholder for each of the messages' media.
        processor: of the model; None if it reads text only.
        control_ids: of the tokenizer.

    Raises: DataError naming the message, for media that cannot be read, and if the template writes other placeholders.
    """
    media = [medium for i, message in enumerate(messages) for medium in _measured(i, message, processor)]
    if not media or processor is None:
        return encoded
    ids = _placeholder_ids(processor, control_ids)
    found = np.flatnonzero(np.isin(encoded.ids, list(ids)))
    kinds = [ids[int(token)] for token in encoded.ids[found]]
    wanted, written = Counter(medium.kind for medium in media), Counter(kinds)
    if wrong := next((kind for kind in processor.kinds if wanted[kind] != written[kind]), None):
        raise DataError(
            f"the chat template writes {written[wrong]} placeholders for the {wanted[wrong]} {wrong} parts of the row; "
            "set data.chat_template to one that writes a placeholder for each part of a content"
        )
    # In the order of the template, which may write one kind before another.
    of_kind: dict[str, Iterator[Media]] = {
        kind: iter([medium for medium in media if medium.kind == kind]) for kind in wanted
    }
    items = tuple(next(of_kind[kind]) for kind in kinds)
    counts = np.ones(len(encoded.ids), dtype=np.int64)
    counts[found] = [item.tokens for item in items]
    weights = encoded.weights.copy()
    weights[found] = 0
    starts = (np.cumsum(counts) - counts)[found]
    placed = PlacedMedia(items, tuple(starts.tolist()), processor.positions)
    return replace(encoded, ids=encoded.ids.repeat(counts), weights=weights.repeat(counts), placed=placed)


def _measured(number: int, message: Message, processor: MediaProcessor | None) -> list[Media]:
    if message.media and processor is None:
        raise DataError(
            f"message {number} ({message.role}) holds {message.media[0].kind}, and the model reads text only; remove "
            "the row, or train a model that reads it, such as model=qwen2.5-omni-7b"
        )
    try:
        return [processor.measure(part.kind, part.reference) for part in message.media] if processor else []
    except DataError as error:
        raise DataError(f"message {number} ({message.role}): {error}") from error


def _placeholder_ids(processor: MediaProcessor, control_ids: Mapping[str, int]) -> dict[int, str]:
    if missing := [token for token in processor.placeholders.values() if token not in control_ids]:
        raise DataError(f"the tokenizer lacks the control token {missing[0]}, which stands for media of the model")
    return {control_ids[token]: kind for kind, token in processor.placeholders.items()}
