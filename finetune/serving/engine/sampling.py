"""Choose the next token of each running answer from its logits.

Greedy and sampled rows stand in one batch. The settings apply in the order of transformers and vLLM: grammar,
penalties, temperature, top_k, top_p.

Shapes: N rows, S rows with settings, L rows with log-probabilities, G rows with a grammar; W width of the logits,
V vocabulary, K most probable tokens, P pairs of a row and a token in its text.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from itertools import chain, islice, starmap
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.ops.limits import ROWS_DRAWN
from finetune.serving.engine.drawing import Draw, draw_ids, largest, most_probable, rows_of
from finetune.serving.request import Finished, Request, Token, TokenScore
from finetune.system.errors import InputError

if TYPE_CHECKING:
    from finetune.serving.engine.grammar import AnswerGrammar, GrammarCompiler

# The bits of each byte, lowest first.
_BITS = torch.arange(256)[:, None] >> torch.arange(8) & 1 == 1


class RowState:
    """A running answer, made by `BatchSampler.start`. An engine keeps it when it preempts the answer.

    request: as it came. ids: of the answer so far; `choose` appends to them.
    """

    def __init__(self, request: Request, grammar: AnswerGrammar | None = None):
        of = request.sampling
        self.request, self.grammar, self.ids = request, grammar, list[int]()
        self.penalized = (of.repetition_penalty, of.frequency_penalty, of.presence_penalty) != (1, 0, 0)
        self.plain = of.temperature == 0 and not self.penalized and grammar is None
        # How often the answer has each id; 0 for ids of the prompt alone, which only repetition_penalty lowers.
        self.counts = dict.fromkeys(request.ids, 0) if of.repetition_penalty != 1 else {}
        self._random = np.random.default_rng(secrets.randbits(64) if of.seed is None else of.seed % 2**64)

    def draw(self) -> Draw:
        """Return how the next token is drawn. The t-th number of a seed decides the t-th token, in every batch."""
        of = self.request.sampling
        return Draw(self._random.random(), of.temperature, of.top_k, of.top_p)

    def append(self, token: int) -> None:
        """Add the next token of the answer."""
        self.ids.append(token)
        if self.penalized:
            self.counts[token] = self.counts.get(token, 0) + 1
        if self.grammar:
            self.grammar.advance(token)


class BatchSampler:
    """Chooses tokens by each request's own settings, for all rows of a batch at once.

    vocabulary: V, number of ids to choose from. Wider logits count in log-probabilities only.
    grammars: None: a request with a grammar is refused.
    """

    def __init__(self, vocabulary: int, grammars: GrammarCompiler | None = None):
        self.vocabulary, self.grammars = vocabulary, grammars

    def start(self, request: Request) -> RowState:
        """Return the state of a new answer. Any thread may call it; it compiles a grammar that is not kept.

        Raises:
            InputError: the grammar is refused, or this engine takes none.
        """
        schema = request.sampling.grammar
        if schema is None:
            return RowState(request)
        if self.grammars is None:
            raise InputError("this engine writes free text only, found a JSON schema for the answer")
        return RowState(request, self.grammars.start(schema, request.stop_ids))

    def choose(self, logits_NW: Tensor, rows: Sequence[RowState]) -> list[Token | Finished]:
        """Return the next token of each row, and append it to the row's ids. A stop id is a token like others.

        Args:
            logits_NW: of any float type; not changed.
            rows: one for each row of logits; any rows in any order, from call to call.

        Returns:
            A token for each row, or Finished for one that cannot go on: "error" if its logits are not finite or its
            grammar failed; "stop" if its grammar is complete and it has no stop ids.
        """
        logits_NV = logits_NW[:, : self.vocabulary]
        best_N, ids_N = most_probable(logits_NV)
        ends: dict[int, Finished] = {}
        for chunk in _chunks([n for n, row in enumerate(rows) if not row.plain]):
            some = [rows[n] for n in chunk]
            logits_SV = logits_NV.index_select(0, torch.tensor(chunk, device=logits_NV.device)).float()
            ends |= {chunk[s]: end for s, end in _obey_grammars(logits_SV, some).items()}
            _penalize(logits_SV, some)
            ids_N[chunk] = _choose_by_settings(logits_SV, some)
        scored = [n for n, row in enumerate(rows) if row.request.log_probs is not None]
        most = min(max((rows[n].request.log_probs or 0 for n in scored), default=0), self.vocabulary)
        scores = [
            _scores(rows_of(logits_NW, chunk).float(), ids_N[chunk], self.vocabulary, most) for chunk in _chunks(scored)
        ]
        # Read in one copy: each one waits for the GPU.
        numbers = iter(torch.cat([ids_N.double(), best_N.double(), *(each.flatten() for each in scores)]).tolist())
        ids, best = list(islice(numbers, len(rows))), list(islice(numbers, len(rows)))
        scores_of = {n: list(islice(numbers, 1 + 2 * most)) for n in scored}
        return [ends.get(n) or _token_of(row, int(ids[n]), best[n], scores_of.get(n)) for n, row in enumerate(rows)]


def _chunks(numbers: list[int]) -> Iterator[list[int]]:
    """Split numbers of rows: whole distributions are copied for one part at a time."""
    return (numbers[i : i + ROWS_DRAWN] for i in range(0, len(numbers), ROWS_DRAWN))


def _token_of(row: RowState, token: int, best: float, scores: list[float] | None) -> Token | Finished:
    """Append a token to its row. best: the largest logit. scores: as `_scores` returns them."""
    if not math.isfinite(best) or (scores and math.isnan(scores[0])):
        return Finished("error", error="the model's logits are not finite numbers")
    row.append(token)
    if scores is None:
        return Token(token)
    log_prob, *top = scores
    found = zip(map(int, top[::2]), top[1::2], strict=True)
    return Token(token, log_prob, tuple(islice(starmap(TokenScore, found), row.request.log_probs)))


def _scores(logits_LW: Tensor, ids_L: Tensor, vocabulary: int, most: int) -> Tensor:
    """Return the log-probability of each id, then ids and log-probabilities of the most probable tokens in turn.

    Returns: [L, 1 + 2 K] float64.
    """
    log_probs_LW = logits_LW.log_softmax(1)
    top_LK, tokens_LK = largest(log_probs_LW[:, :vocabulary], most)
    pairs = torch.stack([tokens_LK.double(), top_LK.double()], 2).flatten(1)
    return torch.cat([log_probs_LW.gather(1, ids_L[:, None]).double(), pairs], 1)


def _obey_grammars(logits_SV: Tensor, rows: Sequence[RowState]) -> dict[int, Finished]:
    """Set the logits of tokens that a row's grammar forbids to minus infinity; return the ends of rows without any."""
    ends: dict[int, Finished] = {}
    bytes_by_row: dict[int, np.ndarray] = {}
    for s, row in enumerate(rows):
        if row.grammar:
            allowed = row.grammar.allowed()
            if isinstance(allowed, Finished):
                ends[s] = allowed
            else:
                bytes_by_row[s] = allowed
    if bytes_by_row:
        chosen, vocabulary = list(bytes_by_row), logits_SV.shape[1]
        bytes_GB = torch.from_numpy(np.stack(list(bytes_by_row.values()))).to(logits_SV.device)
        allowed_GV = _BITS.to(logits_SV.device)[bytes_GB.int()].flatten(1)[:, :vocabulary]
        logits_SV[chosen] = logits_SV[chosen].masked_fill_(~allowed_GV, -torch.inf)
    return ends


def _penalize(logits_SV: Tensor, rows: Sequence[RowState]) -> None:
    """Lower the logits of tokens that prompt and answer contain, in place."""
    penalized = [(s, row) for s, row in enumerate(rows) if row.counts]
    if not penalized:
        return
    sizes = [len(row.counts) for _, row in penalized]
    seen = [
        np.repeat([s for s, _ in penalized], sizes),
        np.fromiter(chain.from_iterable(row.counts for _, row in penalized), np.int64, sum(sizes)),
        np.fromiter(chain.from_iterable(row.counts.values() for _, row in penalized), np.int64, sum(sizes)),
    ]
    of = [row.request.sampling for row in rows]
    settings = [[each.repetition_penalty, each.frequency_penalty, each.presence_penalty] for each in of]
    rows_P, ids_P, counts_P = torch.from_numpy(np.stack(seen)).to(logits_SV.device)
    repetition_P, frequency_P, presence_P = torch.tensor(settings, device=logits_SV.device)[rows_P].T
    found_P = logits_SV[rows_P, ids_P]
    found_P = torch.where(found_P > 0, found_P / repetition_P, found_P * repetition_P)
    logits_SV[rows_P, ids_P] = found_P - frequency_P * counts_P - presence_P * (counts_P > 0)


def _choose_by_settings(logits_SV: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Return the ids [S] of the most probable or the drawn tokens. The logits are overwritten."""
    drawn = {s: row.draw() for s, row in enumerate(rows) if row.request.sampling.temperature > 0}
    if len(drawn) == len(rows):
        return draw_ids(logits_SV, list(drawn.values()))
    _, ids_S = most_probable(logits_SV)
    if drawn:
        ids_S[list(drawn)] = draw_ids(logits_SV[list(drawn)], list(drawn.values()))
    return ids_S
