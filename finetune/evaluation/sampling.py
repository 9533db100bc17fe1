"""Sampling with uniform random numbers supplied by the caller.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from finetune.evaluation.decoding import Decoding
from finetune.evaluation.scoring import evaluating

# Limits of a batch. The key-value cache of so many tokens takes 0.9 GB at 7B; larger batches are hardly faster.
_PROMPTS, _TOKENS = 64, 2**14
# Rows with distributions in float64 at once: 40 MB with Qwen2.5's vocabulary, times three copies.
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
    """Sample an answer to each prompt from the full softmax. No random generator is used.

    Args:
        prompts: ids, at least one each.
        draws: per prompt, float64 in [0, 1). The t-th number decides the t-th token, by inverting the cumulative
            probabilities. So an answer does not depend on the other prompts of its batch.
        stop_ids: an answer ends with one of these ids, or when its draws are used up.
        vocabulary: V, number of ids to choose from.

    Returns:
        Answers [int32], in the order of `prompts`.
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
    """Group prompts of similar length into batches within the limits."""
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
    """Return the tokens [N] int64 at which the cumulative softmax(logits / temperature) passes the draws (float64)."""
    blocks = zip(logits_NV.split(_DRAWN_AT_ONCE), draws_N.split(_DRAWN_AT_ONCE), strict=True)
    return torch.cat([_draw(logits.double() / temperature, draws) for logits, draws in blocks])


def _draw(logits_NV: Tensor, draws_N: Tensor) -> Tensor:
    cumulated_NV = logits_NV.softmax(-1).cumsum(-1)
    places_N1 = draws_N[:, None] * cumulated_NV[:, -1:]  # the sum is 1 up to rounding
    ids_N = torch.searchsorted(cumulated_NV, places_N1, right=True).squeeze(1)
    # NaN logits give an id beyond the last one. They show up in the loss of training on the answer.
    return ids_N.clamp_(max=logits_NV.shape[1] - 1)
