"""What a model makes of each target token of held-out rows: one pass for its loss, its choices and its distance.

Shapes: N target tokens, R rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Documents
from finetune.data.encoded import IGNORE_INDEX
from finetune.evaluation.perplexity import evaluating
from finetune.losses.chunked import chunked_logits
from finetune.losses.cross_entropy import head_of, target_rows
from finetune.losses.divergence import compare
from finetune.losses.hidden_states import base_of, hidden_states
from finetune.losses.teacher_targets import Teacher, TeacherTargets
from finetune.ops.cross_entropy import cross_entropy_
from finetune.system.errors import FinetuneError


@dataclass(frozen=True)
class TokenScores:
    """Of each target, in the documents' order. row_N: its row, counted from 0 within the documents; nll_N in nats;
    correct_N: whether greedy decoding would give it; kl_N, KL(teacher || model) in nats, and agree_N, whether both
    prefer the same token: None without a teacher.
    """

    row_N: np.ndarray
    nll_N: np.ndarray
    correct_N: np.ndarray
    kl_N: np.ndarray | None
    agree_N: np.ndarray | None


@torch.no_grad()
def score_tokens(
    model: nn.Module,
    documents: Documents,
    *,
    limit_tokens: int,
    teacher: Teacher | None = None,
    vocabulary: int = 0,
    keep: Callable[[Tensor], None] = lambda hidden_ND: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenScores:
    """Score documents in batches of at most `limit_tokens` tokens (a longer document goes alone).

    vocabulary: ids that teacher and model both know. keep: given the final hidden states [N, D] of each batch's
    targets, in order. progress: told after each how many documents are done, and of how many.
    Raises: FinetuneError if the model gives numbers that are none.
    """
    device = next(model.parameters()).device
    parts: list[list[np.ndarray]] = []
    rows_of_documents = np.unique(documents.rows + (documents.source << 40), return_inverse=True)[1]
    done = 0
    with evaluating(model):
        for group in groups_of(documents, limit_tokens):
            batch = build_batch(group, share_prefixes=True)
            row_N = _rows_of_targets(batch, rows_of_documents[done : done + len(group)])
            done += len(group)
            here = batch.to(device)
            hidden_ND, labels_N, _ = target_rows(hidden_states(model, here), here)
            keep(hidden_ND)
            teacher_targets = None if teacher is None else next(iter(teacher.targets_for([batch])))
            chunks = _chunks(model, hidden_ND, labels_N, teacher_targets, vocabulary)
            columns = [torch.cat(column).cpu().numpy() for column in zip(*chunks, strict=True)]
            parts.append([row_N, *columns])
            progress(done, len(documents))
    row_N, nll_N, correct_N, *rest = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not all(np.isfinite(column).all() for column in (nll_N, *rest)):
        raise FinetuneError("the model gives a loss that is no number; its weights, or the adapter's, are broken")
    return TokenScores(row_N, nll_N, correct_N, *(rest or (None, None)))


def _rows_of_targets(batch: Batch, rows: np.ndarray) -> np.ndarray:
    row_T = np.repeat(rows, batch.segment_lengths)
    return row_T[(batch.labels[0] != IGNORE_INDEX).numpy()]


def _chunks(
    model: nn.Module, hidden_ND: Tensor, labels_N: Tensor, teacher_targets: TeacherTargets | None, vocabulary: int
) -> list[list[Tensor]]:
    """Nats, correct, and with a signal KL and agreement, of chunk after chunk."""
    found = []
    for logits_NV, rows in chunked_logits(hidden_ND, head_of(model), base_of(model).config.vocab_size):
        correct_N = logits_NV.argmax(-1) == labels_N[rows]
        kept_NV = logits_NV[:, :vocabulary]
        against = [] if teacher_targets is None else compare(teacher_targets, kept_NV.clone(), rows, vocabulary)
        found.append([cross_entropy_(logits_NV, labels_N[rows]), correct_N, *against])
    return found
