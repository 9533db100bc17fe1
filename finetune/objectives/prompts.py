"""The prompts of a run that learns from rewards: the rows' messages, read from their files again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.documents import Document
from finetune.data.formats.messages import Conversation
from finetune.data.loader import Source
from finetune.data.tokens.prepare import Preparation
from finetune.distill.fingerprint import key_of


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a row says beside its tokens.

    messages: before the answer, with OpenAI's keys.
    expected: the row's last assistant turn; empty for a row without one.
    columns: of the row, as in its file.
    location: `file:line`, for messages to the user.
    question: the last message, with a tag for each of its media.
    """

    messages: list[dict[str, Any]]
    expected: str
    columns: dict[str, Any]
    location: str
    question: str = ""


class Prompts:
    """The prompts of documents."""

    def __init__(self, found: dict[tuple[str, bytes | None], Prompt]):
        self._found = found

    def of(self, document: Document) -> Prompt:
        """Return the prompt of a document of the sources."""
        return self._found[document.location, key_of(document)]

    def __iter__(self):
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)


def read_prompts(sources: Sequence[Source], preparation: Preparation) -> Prompts:
    """Read the rows of documents from their files again.

    Args:
        sources: of `load_data` with this preparation, for training or evaluation.
    """
    found: dict[tuple[str, bytes | None], Prompt] = {}
    for source in sources:
        rows = _read_source(source, preparation)
        for document in source.documents:
            found[document.location, key_of(document)] = rows[document.row]
    return Prompts(found)


def _read_source(source: Source, preparation: Preparation) -> dict[int, Prompt]:
    """Return the prompts of the rows with a document, by their index in the source."""
    parser, chat = preparation.encoder(source.config).parser, preparation.chat
    wanted = set(source.store.indices[source.rows].tolist())
    found: dict[int, Prompt] = {}
    for batch in preparation.batches(source.config):
        for row, example in parser.rows(batch):
            if row.index in wanted and isinstance(example, Conversation) and isinstance(row.value, dict):
                found[row.index] = Prompt(
                    [message.as_dict() for message in example.prompt],
                    chat.answer_text(example) if example.has_answer else "",
                    row.value,
                    row.location,
                    example.prompt[-1].shown if example.prompt else "",
                )
    return found
