"""Compute statistics of prompts, whose answers a run samples and judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.config.schema import RunConfig
from finetune.data.documents import Documents, leave_room
from finetune.data.loader import Source
from finetune.data.template.chat import ChatTemplate

# An answer without text has its end token, and what a template may put before it.
_EMPTY_ANSWER_TOKENS = 4


@dataclass(frozen=True)
class PromptFigures:
    """Statistics of prompts and of the answers that rewards may expect.

    Attributes:
        rows: documents, each with one prompt.
        unanswered: rows without an expected answer.
        median, most, longest: tokens of prompts; `most` is the 95th percentile.
        no_room: prompts that leave no room for an answer, so training leaves them out.
    """

    rows: int
    unanswered: int
    median: int
    most: int
    longest: int
    no_room: int


def prompt_figures(sources: Sequence[Source], cfg: RunConfig, chat: ChatTemplate) -> PromptFigures | None:
    """Compute the statistics of all documents of some sources; None in a run without rewards, or without rows."""
    documents = Documents.join(source.documents for source in sources)
    if cfg.reward.loss == "none" or not len(documents):
        return None
    lengths = documents.prompt_lengths
    median, most = np.percentile(lengths, [50, 95], method="inverted_cdf")
    short = np.flatnonzero(documents.targets <= _EMPTY_ANSWER_TOKENS)
    return PromptFigures(
        rows=len(documents),
        unanswered=sum(not _answer(documents, int(i), chat) for i in short),
        median=int(median),
        most=int(most),
        longest=int(lengths.max()),
        no_room=int((~leave_room(documents, cfg)).sum()),
    )


def _answer(documents: Documents, i: int, chat: ChatTemplate) -> str:
    _, _, piece = documents.piece(i)
    return chat.decode(piece.ids[piece.trained]).strip()


def describe_prompts(figures: PromptFigures) -> dict[str, str]:
    """Describe prompts and expected answers, by subject."""
    lengths = f"half have at most {figures.median:,} tokens, 95 % at most {figures.most:,}, all {figures.longest:,}"
    expected = f"in {figures.rows - figures.unanswered:,} of {figures.rows:,} rows"
    return {"prompts": lengths, "expected": expected}
