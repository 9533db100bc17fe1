"""Choose the next token of each running answer from its logits.

Shapes: N rows, S rows with settings beside the most probable token, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from finetune.serving.request import Finished, Request, Token

if TYPE_CHECKING:
    from finetune.serving.engine.grammar import GrammarCompiler


class RowState:
    """A running answer. Made by `BatchSampler.start`; keep it when the answer is preempted.

    request: as it came. ids: written so far; `choose` adds the next one.
    """

    def __init__(self, request: Request, matcher: Any = None):
        seed = request.sampling.seed
        self.request, self.matcher = request, matcher
        self.ids: list[int] = []
        self._random = np.random.default_rng(secrets.randbits(64) if seed is None else seed % 2**64)


class BatchSampler:
    """Chooses tokens by each request's own settings, for all rows of a batch at once.

    vocabulary: number of ids to choose from; logits beyond it are ignored.
    grammars: None: a request with a grammar is refused.
    """

    def __init__(self, vocabulary: int, grammars: GrammarCompiler | None = None):
        self.vocabulary, self.grammars = vocabulary, grammars

    def start(self, request: Request) -> RowState:
        """Return the state of a new answer. Any thread may call it; it compiles a grammar that is not cached.

        Raises:
            InputError: the grammar is refused, or there is none in this engine.
        """
        return RowState(request)

    def choose(self, logits_NV: Tensor, rows: Sequence[RowState]) -> list[Token | Finished]:
        """Return the next token of each row, and add it to the row's ids.

        Args:
            logits_NV: any float type, at least `vocabulary` wide; not changed.
            rows: one for each row of logits, in any order and number from call to call.

        Returns:
            A token, or Finished for a row that cannot go on: with the reason "error" if its logits are not finite,
            "stop" if its grammar allows no more text and the request has no stop ids.
        """
        ids = logits_NV[:, : self.vocabulary].argmax(1).tolist()
        for row, token in zip(rows, ids, strict=True):
            row.ids.append(token)
        return [Token(token) for token in ids]
