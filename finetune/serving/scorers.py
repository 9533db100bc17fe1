"""Let engines and servers score rows, for the comparison with the trained model (evaluation/probe.py)."""

from __future__ import annotations

import queue
from collections.abc import Sequence

from finetune.evaluation.probe import TOP, Row, Scored, Scorer
from finetune.serving.request import Engine, Event, Finished, PromptScores, Request
from finetune.system.errors import FinetuneError

_SECONDS = 600.0


def engine_scorer(engine: Engine, adapter: str | None) -> Scorer:
    """Return a scorer that asks an engine for the log-probabilities of prompts.

    It raises FinetuneError if the engine fails, or gives no answer in 10 minutes.
    """

    def score(rows: Sequence[Row]) -> list[list[Scored | None]]:
        answers: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in rows]
        for row, events in zip(rows, answers, strict=True):
            engine.submit(Request(row.ids, 0, adapter=adapter, prompt_log_probs=TOP), events.put)
        return [_scores(row, events) for row, events in zip(rows, answers, strict=True)]

    return score


def _scores(row: Row, events: queue.SimpleQueue[Event]) -> list[Scored | None]:
    found: list[Scored | None] = []
    while True:
        try:
            event = events.get(timeout=_SECONDS)
        except queue.Empty:
            raise FinetuneError(f"check: the engine gave no scores in {_SECONDS:.0f} s") from None
        if isinstance(event, PromptScores):
            pairs = list(zip(event.tokens, event.top, strict=True))[row.first :]
            found = [Scored(None if own is None else own.log_prob, dict(top)) for own, top in pairs]
        elif isinstance(event, Finished):
            if len(found) != row.scored:
                raise FinetuneError(f"check: the engine scored {len(found)} of {row.scored} tokens; {event.error}")
            return found
