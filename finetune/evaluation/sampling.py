"""Answers drawn from a model's probabilities, each decided by numbers that its caller has drawn.

Shapes: B prompts of a batch, N of them still being answered; L tokens so far, with padding; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from finetune.evaluation.perplexity import evaluating
from finetune.losses.chunked import logits_of
from finetune.losses.cross_entropy import head_of
from finetune.losses.hidden import base_of

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
            batch = _Batch(model, [prompts[i] for i in rows], [draws[i] for i in rows])
            written = batch.write(frozenset(stop_ids), vocabulary, temperature)
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


class _Batch:
    """Prompts padded on the left, and the keys and values of what was read and written so far."""

    def __init__(self, model: nn.Module, prompts: Sequence[np.ndarray], draws: Sequence[np.ndarray]):
        base = base_of(model)
        self.head, self.backbone = head_of(model), getattr(base, base.base_model_prefix)
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=base.config)
        self.draws = draws
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.open = list(range(len(prompts)))  # answers that have not ended: the rows of all tensors
        longest = max(map(len, prompts))
        self.ids_NL = torch.tensor([[0] * (longest - len(p)) + p.tolist() for p in prompts], device=self.device)
        self.mask_NL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.positions_NL = (self.mask_NL.cumsum(1) - 1).clamp_(min=0)

    def write(self, stop_ids: frozenset[int], vocabulary: int, temperature: float) -> list[list[int]]:
        """The answers, one token of each at a time; those that have ended leave the batch."""
        while self.open:
            draws_N = torch.tensor([self.draws[i][len(self.answers[i])] for i in self.open], dtype=torch.float64)
            logits_NV = logits_of(self._read(), self.head, vocabulary)
            ids_N = draw_tokens(logits_NV, draws_N.to(self.device), temperature)
            stays = []
            for i, token in zip(self.open, ids_N.tolist(), strict=True):
                self.answers[i].append(token)
                stays.append(token not in stop_ids and len(self.answers[i]) < len(self.draws[i]))
            self._append(ids_N, stays)
        return self.answers

    def _read(self) -> Tensor:
        """The final hidden states [N, D] at the end of each row, after what has not been read yet."""
        outputs = self.backbone(
            input_ids=self.ids_NL, attention_mask=self.mask_NL, position_ids=self.positions_NL,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        return outputs.last_hidden_state[:, -1]

    def _append(self, ids_N: Tensor, stays: list[bool]) -> None:
        mask_NL, positions_N1 = self.mask_NL, self.positions_NL[:, -1:] + 1
        if not all(stays):
            kept = torch.tensor([k for k, stay in enumerate(stays) if stay], dtype=torch.long, device=self.device)
            self.open = [i for i, stay in zip(self.open, stays, strict=True) if stay]
            self.cache.batch_select_indices(kept)
            ids_N, mask_NL, positions_N1 = ids_N[kept], mask_NL[kept], positions_N1[kept]
        self.ids_NL, self.positions_NL = ids_N[:, None], positions_N1
        self.mask_NL = torch.cat([mask_NL, mask_NL.new_ones(len(ids_N), 1)], 1)


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
