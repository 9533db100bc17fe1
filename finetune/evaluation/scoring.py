"""Scores on the target tokens of held-out rows: loss, accuracy, and distance from a teacher.

Shapes: N target tokens, R rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.batch import build_batch, groups_of
from finetune.data.documents import Document, Documents
from finetune.distill.resident import ResidentTeacher
from finetune.losses.chunked import chunked_logits, logits_of
from finetune.losses.cross_entropy import head_of, score, vocabulary_rows
from finetune.losses.distillation import Teacher, TeacherTargets, compare, whole_head
from finetune.losses.hidden_states import device_of, target_states
from finetune.ops.cross_entropy import cross_entropy_
from finetune.ops.divergence import divergence_
from finetune.ops.limits import TEACHER_BATCHES
from finetune.parallel.in_step import in_step
from finetune.parallel.sharding import is_sharded
from finetune.system.errors import FinetuneError
from finetune.system.out_of_memory import in_halves

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Perplexity:
    """loss: nats per target token. accuracy: share of targets that greedy decoding predicts. tokens: targets."""

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Return exp(loss); infinity if a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode in the block, and restore the mode of every module after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_groups(
    model: nn.Module, documents: Sequence[Document], limit_tokens: int, work: Callable[[Sequence[Document]], R]
) -> Iterator[tuple[Sequence[Document], R]]:
    """Yield groups of documents, in order, with the result of `work`, which runs the model on each.

    A group has at most `limit_tokens`, or one document. It is split where memory runs out.
    Raises: ResourceError if one document does not fit.
    """
    for group in groups_of(documents, limit_tokens):
        yield from in_halves(group, work, "lower data.max_length", splits=not is_sharded(model))


def evaluate(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    limit_tokens: int,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Perplexity:
    """Measure loss and accuracy on documents.

    Args:
        limit_tokens: the most tokens per batch; a longer document is a batch by itself.
        sum_over_ranks: sums a tensor over all ranks, of which each has a part of the documents.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(model), in_step(model):
        for _, result in in_groups(model, documents, limit_tokens, lambda group: score(model, build_batch(group))):
            sums += torch.tensor([float(result.nll), float(result.correct), result.tokens], dtype=torch.float64)
    nll, correct, tokens = sum_over_ranks(sums).tolist()
    return Perplexity(nll / tokens, correct / tokens, int(tokens))


@dataclass(frozen=True, slots=True)
class Agreement:
    """kl: KL(teacher || model), nats per target. top1: share of targets with the same first choice. tokens: targets."""

    kl: float
    top1: float
    tokens: int


@torch.no_grad()
def agreement(
    model: nn.Module,
    teacher: Teacher,
    documents: Sequence[Document],
    vocabulary: int,
    *,
    limit_tokens: int,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Agreement:
    """Compare a model with a teacher on documents. vocabulary: number of ids that both have; else as `evaluate`."""
    sums, count = torch.zeros(2, dtype=torch.float64, device=device_of(model)), 0
    models = (model, teacher.model) if isinstance(teacher, ResidentTeacher) else (model,)
    batches = [build_batch(group, share_prefixes=True) for group in groups_of(documents, limit_tokens)]
    with evaluating(model), in_step(*models):
        for start in range(0, len(batches), TEACHER_BATCHES):
            some = batches[start : start + TEACHER_BATCHES]
            for batch, teacher_targets in zip(some, teacher.targets_for(some), strict=True):
                hidden_ND = target_states(model, batch).hidden_ND
                with whole_head(teacher_targets):
                    for logits_NV, rows in chunked_logits(hidden_ND, head_of(model), vocabulary):
                        kl_N, agree_N = compare(teacher_targets, logits_NV, rows, vocabulary)
                        sums += torch.stack([kl_N.sum(), agree_N.sum()]).double()
                        count += len(kl_N)
    kl, top1, tokens = sum_over_ranks(torch.tensor([*sums.tolist(), count], dtype=torch.float64)).tolist()
    return Agreement(kl / tokens, top1 / tokens, int(tokens))


@torch.no_grad()
def reference_kl(
    model: nn.Module,
    reference: Callable[[], AbstractContextManager[None]],
    documents: Sequence[Document],
    *,
    limit_tokens: int,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> float:
    """Return KL(model || reference) of the next token in nats, exact over the vocabulary, as the mean over all targets.

    Args:
        reference: a context in which the model is its reference policy.

    The others are as for `evaluate`.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    head, vocabulary = head_of(model), vocabulary_rows(model)
    with evaluating(model), in_step(model):
        for group in groups_of(documents, limit_tokens):
            batch = build_batch(group, share_prefixes=True)
            hidden_ND = target_states(model, batch).hidden_ND
            with reference():
                reference_ND = target_states(model, batch).hidden_ND
            reference_NV: Tensor | None = None
            for logits_NV, rows in chunked_logits(hidden_ND, head, vocabulary):
                with reference():  # a trained head has other weights there
                    reference_NV = logits_of(reference_ND[rows], head, vocabulary, reference_NV)
                ones_N = torch.ones(len(logits_NV), device=logits_NV.device)
                kl_N = divergence_(logits_NV, reference_NV, ones_N, "reverse_kl", mix=0.0, temperature=1.0)
                sums += torch.tensor([kl_N.double().sum().item(), len(kl_N)], dtype=torch.float64)
    kl, tokens = sum_over_ranks(sums).tolist()
    return kl / tokens


@dataclass(frozen=True)
class TokenScores:
    """Scores per target, in the order of the documents.

    row_N: its row, from 0 within the documents. nll_N: nats. correct_N: greedy decoding predicts it.
    kl_N: KL(teacher || model) in nats. agree_N: both have the same first choice. None without a teacher.
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
    """Score each target of documents.

    Args:
        limit_tokens: as for `evaluate`.
        vocabulary: number of token ids that teacher and model both have.
        keep: called with the final hidden states [N, D] of each batch's targets, in order.
        progress: called after each batch with the numbers of scored and of all documents.

    Raises:
        FinetuneError: a loss is NaN or infinite.
    """
    parts: list[list[np.ndarray]] = []
    rows_of_documents = np.unique(documents.rows + (documents.source << 40), return_inverse=True)[1]
    done = 0
    with evaluating(model):
        for group in groups_of(documents, limit_tokens):
            batch = build_batch(group, share_prefixes=True)
            row_T = np.repeat(rows_of_documents[done : done + len(group)], batch.segment_lengths)
            row_N = row_T[batch.targets.numpy()]
            done += len(group)
            targets = target_states(model, batch)
            hidden_ND, labels_N = targets.hidden_ND, targets.labels_N
            keep(hidden_ND)
            teacher_targets = None if teacher is None else next(iter(teacher.targets_for([batch])))
            chunks = _chunks(model, hidden_ND, labels_N, teacher_targets, vocabulary)
            columns = [torch.cat(column).cpu().numpy() for column in zip(*chunks, strict=True)]
            parts.append([row_N, *columns])
            progress(done, len(documents))
    row_N, nll_N, correct_N, *rest = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not all(np.isfinite(column).all() for column in (nll_N, *rest)):
        raise FinetuneError("the loss is NaN or infinite: the weights of the model or the adapter are corrupt")
    return TokenScores(row_N, nll_N, correct_N, *(rest or (None, None)))


def _chunks(
    model: nn.Module, hidden_ND: Tensor, labels_N: Tensor, teacher_targets: TeacherTargets | None, vocabulary: int
) -> list[list[Tensor]]:
    """Per chunk of logits: nats, correct, and with teacher targets KL and agreement."""
    found = []
    for logits_NV, rows in chunked_logits(hidden_ND, head_of(model), vocabulary_rows(model)):
        correct_N = logits_NV.argmax(-1) == labels_N[rows]
        kept_NV = logits_NV[:, :vocabulary]
        against = [] if teacher_targets is None else compare(teacher_targets, kept_NV.clone(), rows, vocabulary)
        found.append([cross_entropy_(logits_NV, labels_N[rows]), correct_N, *against])
    return found
