"""Answers drawn from a model's probabilities, each decided by numbers that its caller has drawn.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from finetune.evaluation.decoding import Decoding
from finetune.evaluation.scoring import evaluating

# Of a batch. At 7B keys and values of so many tokens take 0.9 GB, and for longer the weights set the pace anyway.
_PROMPTS, _TOKENS = 64, 2**14
# Rows whose distribution is held in float64 at once: 40 MB with Qwen2.5's vocabulary, of which three copies live.
_DRAWN_AT_ONCE = 32


@torch.no_grad()
def sample_answers(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    draws: Sequence[np.ndarray],
    *,
    stop_ids: Collection[int],
    vocabulary: int,
    temperature: float,
) -> list[np.ndarray]:
    """Answers [int32] to prompts (ids, at least one each), in the order given, from the whole softmax.

    draws: of each prompt, from [0, 1), float64: the t-th decides the t-th token, by the inverse of the cumulated
    probabilities. So chance is the caller's, and the same whatever prompts are answered together; no generator is
    touched. An answer ends with one of `stop_ids`, or when its draws are used up. vocabulary: V, ids from 0 on that can
    be drawn.
    """
    answers: dict[int, np.ndarray] = {}
    with evaluating(model):
        for rows in _batches([len(p) for p in prompts], [len(d) for d in draws]):
            drawn = [draws[i] for i in rows]

            def choose(
                logits_NV: Tensor, prompts: list[int], written: list[int], drawn: list[np.ndarray] = drawn
            ) -> Tensor:
                next_draws = [drawn[i][t] for i, t in zip(prompts, written, strict=True)]
                draws_N = torch.tensor(next_draws, dtype=torch.float64, device=logits_NV.device)
                return draw_tokens(logits_NV, draws_N, temperature)

            batch = Decoding(model, [prompts[i] for i in rows], [len(d) for d in drawn])
            written = batch.write(choose, frozenset(stop_ids), vocabulary)
            answers.update(zip(rows, (np.array(answer, dtype=np.int32) for answer in written), strict=True))
    return [answers[i] for i in range(len(prompts))]


def _batches(prompt_tokens: list[int], answer_tokens: list[int]) -> Iterator[list[int]]:
    """Which prompts are answered together: those of like length, as many as the limits allow."""
    batch: list[int] = []
    longest_answer = 0
    for i in sorted(range(len(prompt_tokens)), key=lambda i: prompt_tokens[i]):
        longest_answer = max(longest_answer, answer_tokens[i])
        full = (len(batch) + 1) * (prompt_tokens[i] + longest_answer) > _TOKENS
        if batch and (full or len(batch) == _PROMPTS):
            yield batch
            batch, longest_answer = [], answer_tokens[i]
        batch.append(i)
    if batch:
        yield batch


def draw_tokens(logits_NV: Tensor, draws_N: Tensor, temperature: float) -> Tensor:
    """The token [N] int64 whose stretch of the cumulated softmax(logits / temperature) holds the draw, float64."""
    blocks = zip(logits_NV.split(_DRAWN_AT_ONCE), draws_N.split(_DRAWN_AT_ONCE), strict=True)
    return torch.cat([_draw(logits.double() / temperature, draws) for logits, draws in blocks])


def _draw(logits_NV: Tensor, draws_N: Tensor) -> Tensor:
    cumulated_NV = logits_NV.softmax(-1).cumsum(-1)
    places_N1 = draws_N[:, None] * cumulated_NV[:, -1:]  # the sum is 1 but for rounding
    ids_N = torch.searchsorted(cumulated_NV, places_N1, right=True).squeeze(1)
    # Logits that are no numbers give an id beyond the last; whoever trains on the answer sees them in its loss.
    return ids_N.clamp_(max=logits_NV.shape[1] - 1)
