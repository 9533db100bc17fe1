"""Learning from preferences: the loss module of a run, its reference policy, and its figures on held-out rows.

Shapes: A answers, E rows with preferences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from finetune.config.preference_rules import NEEDS_REFERENCE
from finetune.config.schema import PreferenceConfig, RunConfig
from finetune.data.batch import Batch, build_batch
from finetune.data.documents import Document
from finetune.data.loader import LoadedData
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.scoring import evaluating, in_groups, reference_kl
from finetune.losses.preference import (
    PAIR_LOSSES,
    Answers,
    answer_log_probs,
    kto,
    rewards,
    sft_weight_of,
)
from finetune.objectives.policies import ReferencePolicy, base_policy, initial_policy
from finetune.objectives.reference_cache import ReferenceCache, reference_adapter, reference_folder, reference_origin
from finetune.parallel.in_step import in_step
from finetune.system.console import Log
from finetune.system.errors import DataError

SumOverRanks = Callable[[Tensor], Tensor]
# Sums over rows, in this order; the first is their number. Those of one side count the rows that have it.
FIGURES = ("pairs", "reward_accuracy", "reward_margin")
SIDE_FIGURES = ("answers", "reward", "log_prob", "tokens")
_VALUES = len(FIGURES) + 2 * len(SIDE_FIGURES)


@dataclass(frozen=True)
class PreferenceSetup:
    """What a run needs to learn from preferences. reference: None where the loss has none."""

    cfg: PreferenceConfig
    loss: PreferenceLoss
    reference: ReferencePolicy | None

    def count(self, documents: Sequence[Document]) -> int:
        """Return what a summed loss is divided by: the pairs; under kto, the answers."""
        if self.cfg.objective != "kto":
            return len(documents)
        return len(answers_of(documents))

    def take_sums(self) -> Tensor:
        """Return this rank's sums since the last call."""
        return self.loss.take_sums()

    def figures_of(self, of_ranks: Tensor) -> dict[str, float]:
        """Return means by name from the sums of each rank; those of kinds of rows that did not occur are left out."""
        figures = figures_of(of_ranks.sum(0))
        return figures | {"divergence": self.loss.divergence} if self.cfg.objective == "kto" else figures

    @torch.no_grad()
    def estimate_divergence(
        self, documents: Sequence[Document], part: slice, *, limit_tokens: int, sum_over_ranks: SumOverRanks
    ) -> None:
        """Estimate KL(policy || reference) for kto, which subtracts it from every log ratio of these rows.

        Args:
            documents: the rows of all ranks.
            part: of the answers, for this rank.
        """
        if self.cfg.objective != "kto" or self.reference is None:
            return
        model, reference = self.loss.model, self.reference

        def log_ratios(group: Sequence[Document]) -> float:
            batch = build_batch(group, share_prefixes=True)
            log_probs_A = answer_log_probs(model, batch)[0]
            with reference():
                return (log_probs_A - answer_log_probs(model, batch)[0]).double().sum().item()

        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(model), in_step(model):
            for group, ratios in in_groups(model, mismatched(documents)[part], limit_tokens, log_ratios):
                sums += torch.tensor([ratios, len(group)], dtype=torch.float64)
        total, answers = sum_over_ranks(sums).tolist()
        self.loss.divergence = max(0.0, total / answers)

    @torch.no_grad()
    def evaluate(
        self, documents: Sequence[Document], part: slice, *, limit_tokens: int, sum_over_ranks: SumOverRanks
    ) -> dict[str, float]:
        """Return the loss and the figures of held-out rows, of which this rank scores a part.

        With a live reference, `reference_kl` is KL(policy || reference) in nats per token of the chosen answers. A row
        with a rejected answer alone counts with that one.
        """
        options: Any = {"limit_tokens": limit_tokens, "sum_over_ranks": sum_over_ranks}
        self.estimate_divergence(documents, part, **options)
        documents = documents[part]
        total = torch.zeros(2, dtype=torch.float64)
        self.loss.take_sums()
        with evaluating(self.loss.model), in_step(self.loss.model):
            for group, loss in in_groups(self.loss.model, documents, limit_tokens, self._loss_of):
                total += torch.tensor([loss, self.count(group)], dtype=torch.float64)
        sums = sum_over_ranks(torch.cat([total, self.take_sums()]))
        figures = {"loss": (sums[0] / sums[1]).item(), **self.figures_of(sums[None, 2:])}
        if self.reference is not None:
            answers = [next(side for side in document.sides if side is not None) for document in documents]
            figures["reference_kl"] = reference_kl(self.loss.model, self.reference, answers, **options)
        return figures

    def _loss_of(self, documents: Sequence[Document]) -> float:
        return float(self.loss(build_batch(documents, share_prefixes=True)))


class PreferenceLoss(nn.Module):
    """The training loss as a module that contains the model.

    forward(batch) returns the sum of the losses of the batch's rows, fp32; the caller divides by their global count.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: PreferenceConfig,
        reference_log_probs: Callable[[Batch], Tensor] | None,
        neftune_alpha: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.neftune_alpha = neftune_alpha
        self.divergence = 0.0  # of the step, for kto
        self._reference = reference_log_probs
        self._sums = torch.zeros(_VALUES, dtype=torch.float64)

    def forward(self, batch: Batch) -> Tensor:
        # Also without rows: all ranks make the same passes.
        reference_A = None if self._reference is None else self._reference(batch)
        log_probs_A, tokens_A = answer_log_probs(self.model, batch, self.neftune_alpha)
        if not batch.sides:  # a rank without rows
            return log_probs_A.sum() * 0
        reference_A = torch.zeros_like(log_probs_A) if reference_A is None else reference_A.to(log_probs_A.device)
        answers = Answers(log_probs_A, reference_A, tokens_A)
        chosen_E, rejected_E = torch.tensor(batch.sides).T
        self._count(answers, chosen_E, rejected_E)
        if self.cfg.objective == "kto":
            desirable = torch.zeros(len(tokens_A), dtype=torch.bool)
            desirable[chosen_E[chosen_E >= 0]] = True
            divergence = torch.tensor(self.divergence, device=log_probs_A.device)
            losses = kto(answers, desirable.to(log_probs_A.device), divergence, self.cfg)
        else:
            losses = PAIR_LOSSES[self.cfg.objective](answers.select(chosen_E), answers.select(rejected_E), self.cfg)
        total = losses.sum()
        if weight := sft_weight_of(self.cfg):
            total = total - weight * answers.select(chosen_E[chosen_E >= 0]).means_A.sum()
        return total

    def take_sums(self) -> Tensor:
        """Return the sums [FIGURES, SIDE_FIGURES of chosen and of rejected] since the last call, fp64 on the CPU."""
        sums, self._sums = self._sums, torch.zeros(_VALUES, dtype=torch.float64)
        return sums

    @torch.no_grad()
    def _count(self, answers: Answers, chosen_E: Tensor, rejected_E: Tensor) -> None:
        rewards_A = rewards(answers, self.cfg)
        columns = torch.stack([rewards_A, answers.log_probs_A, answers.tokens_A]).double().cpu()
        both = (chosen_E >= 0) & (rejected_E >= 0)
        margins = columns[0, chosen_E[both]] - columns[0, rejected_E[both]]
        # Equal rewards are right by half.
        correct = (margins > 0).sum() + 0.5 * (margins == 0).sum()
        sums = [torch.stack([both.sum(), correct, margins.sum()]).double()]
        for side_E in (chosen_E, rejected_E):
            of_side = columns[:, side_E[side_E >= 0]]
            sums += [torch.tensor([of_side.shape[1]], dtype=torch.float64), of_side.sum(1)]
        self._sums += torch.cat(sums)


def figures_of(sums: Tensor) -> dict[str, float]:
    """Return means by name from the sums of `PreferenceLoss.take_sums`."""
    pairs, *of_pairs = sums[: len(FIGURES)].tolist()
    figures = {name: value / pairs for name, value in zip(FIGURES[1:], of_pairs, strict=True)} if pairs else {}
    for side, values in zip(("chosen", "rejected"), sums[len(FIGURES) :].split(len(SIDE_FIGURES)), strict=True):
        answers, *of_answers = values.tolist()
        if answers:
            named = zip(SIDE_FIGURES[1:], of_answers, strict=True)
            figures |= {f"{side}_{name}": value / answers for name, value in named}
    return figures


def mismatched(documents: Sequence[Document]) -> list[Document]:
    """Return each answer of the rows with the prompt of the next answer: pairs that no one wrote.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1: the estimate of the divergence.
    """
    answers = answers_of(documents)
    return [_with_answer(prompt, answer) for prompt, answer in zip(answers, [answers[-1], *answers[:-1]], strict=True)]


def _with_answer(document: Document, other: Document) -> Document:
    """Return the prompt of a document with the answer of another one."""
    start, other_start = (part.first_target for part in (document, other))
    # Position t predicts token t + 1, so the label of the prompt's last token is the answer's first token.
    ids = np.concatenate([document.ids[: start + 1], other.ids[other_start + 1 :]])
    labels = np.concatenate([document.labels[:start], other.labels[other_start:]])
    return replace(document, ids=ids, labels=labels)


def check_preference(cfg: RunConfig, data: LoadedData) -> None:
    """Raise DataError if kto has only good or only bad answers to learn from, before any weight is loaded."""
    if cfg.preference.objective != "kto":
        return
    found: set[int] = set()
    for document in data.documents:
        found |= {number for number, side in enumerate(document.sides) if side is not None}
        if len(found) == 2:
            return
    given, missing = ("good", "bad") if 0 in found else ("bad", "good")
    raise DataError(
        f"data.train: every answer is {given}, and kto learns from the difference\nhelp: add {missing} answers"
        + ("; to learn from good answers alone, use a config such as lora.yaml" if given == "good" else "")
    )


def build_preference(
    cfg: RunConfig, model: PeftModel, chat: ChatTemplate, data: LoadedData, log: Log
) -> PreferenceSetup | None:
    """Build the loss and the reference policy of a run; None for a run that learns from answers alone.

    Args:
        model: with the adapter that training starts from.
        data: all rows of the run, which a cache must hold.

    Raises: as `ReferenceCache`; DataError if it lacks answers.
    """
    preference = cfg.preference
    if preference.objective == "none":
        return None
    alpha = cfg.train.neftune_alpha
    if preference.objective not in NEEDS_REFERENCE:
        log(f"preference: objective={preference.objective}, reference=none")
        return PreferenceSetup(preference, PreferenceLoss(model, preference, None, alpha), None)
    name = reference_adapter(cfg)
    policy_name = cfg.model.name if name is None else f"{cfg.model.name} with {name}"
    if preference.reference == "cached":
        cache = ReferenceCache(reference_folder(cfg), reference_origin(cfg, chat))
        cache.check_holds(answers_of(data.every_document))
        log(
            f"preference: objective={preference.objective}, reference={policy_name}, cached in {cache.file}; "
            "it holds no distributions, so evaluations leave out reference_kl"
        )
        return PreferenceSetup(preference, PreferenceLoss(model, preference, cache.log_probs, alpha), None)
    policy = base_policy(model) if name is None else initial_policy(model)
    log(f"preference: objective={preference.objective}, reference={policy_name}")

    def log_probs(batch: Batch) -> Tensor:
        with torch.no_grad(), policy():
            return answer_log_probs(model, batch)[0]

    return PreferenceSetup(preference, PreferenceLoss(model, preference, log_probs, alpha), policy)


def answers_of(documents: Sequence[Document]) -> list[Document]:
    """Return every answer of rows with preferences, with its prompt."""
    return [side for document in documents for side in document.sides if side is not None]
