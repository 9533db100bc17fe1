"""Evaluate one model on all datasets: score it, let it answer, and compare it with the reference.

Shapes: N target tokens of a batch, D hidden width, R rows.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from finetune.config.command_options import EvalOptions
from finetune.data.batch import Batch
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.examples import RowSet
from finetune.evaluation.gap_table import SetFigures
from finetune.evaluation.generation import answer_rows
from finetune.evaluation.intervals import Bootstrap, Figure, difference_of_shares, share_of
from finetune.evaluation.metrics import Metric
from finetune.evaluation.scoring import TokenScores, score_tokens
from finetune.losses.cross_entropy import head_of
from finetune.losses.distillation import TeacherHidden
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.system.console import Log, Pace

PACE_SECONDS = 10.0
# exp() of more nats is more than JSON holds.
_MOST_NATS = 700.0


class ReferenceCache:
    """The reference's final hidden states at the targets of a dataset, stored on disk per batch."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device = folder, device
        self._files = (folder / f"{batch}.safetensors" for batch in itertools.count())
        self.head: nn.Module | None = None
        folder.mkdir()

    def keep(self, hidden_ND: Tensor) -> None:
        """Store the states of the next batch."""
        save_file({"hidden": hidden_ND.contiguous()}, next(self._files))

    def replay(self) -> ReferenceCache:
        """Return a teacher with these states, for the same batches in the same order."""
        again = copy.copy(self)
        again._files = (self._folder / f"{batch}.safetensors" for batch in itertools.count())
        return again

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        """Load the states of the next batches."""
        assert self.head is not None, "the reference was never evaluated"
        for _ in batches:
            yield TeacherHidden(load_file(next(self._files), device=str(self._device))["hidden"], self.head)


class Progress:
    """Log the progress of a model, at most once in `PACE_SECONDS`."""

    def __init__(self, name: str, log: Log):
        self._name, self._log, self._pace = name, log, Pace(PACE_SECONDS)

    def of(self, dataset: str, action: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) for one dataset. action: "scored" or "answered"."""

        def progress(done: int, total: int) -> None:
            if done < total and self._pace.is_due():
                self._log(f"{self._name}: {dataset}, {action} {done:,} of {total:,}")

        return progress


@dataclass
class Evaluator:
    """Evaluates one model after the other on the same datasets.

    vocabulary: number of token ids that all models have. scratch: a folder for temporary files.
    references, reference_figures, reference_scores_R: per dataset, of the reference; empty until it is evaluated.
    """

    options: EvalOptions
    sets: list[RowSet]
    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    metric: Metric
    vocabulary: int
    max_new_tokens: int
    scratch: Path
    references: list[ReferenceCache] = field(default_factory=list)
    reference_figures: list[dict[str, Figure]] = field(default_factory=list)
    reference_scores_R: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Per dataset, resamples of the rows, and of the answered rows.
        draw = functools.partial(Bootstrap, resamples=self.options.resamples, seed=self.options.seed)
        self.bootstraps = [(draw(rows.rows), draw(max(1, len(rows.conversations)))) for rows in self.sets]

    def evaluate(self, model: nn.Module, *, is_reference: bool, progress: Progress) -> list[SetFigures]:
        """Return a model's figures per dataset. is_reference: later models are compared with this one."""
        return [self._on_set(model, i, is_reference, progress) for i in range(len(self.sets))]

    def _on_set(self, model: nn.Module, i: int, is_reference: bool, progress: Progress) -> SetFigures:
        rows, (bootstrap, of_answers) = self.sets[i], self.bootstraps[i]
        scores = self._score_tokens(model, i, is_reference, progress.of(rows.name, "scored"))
        figures = token_figures(scores, bootstrap)
        estimates = {name: figure.estimate() for name, figure in figures.items()}
        scores_R = np.empty(0)
        if rows.conversations:
            answers = answer_rows(
                model,
                self.tokenizer,
                self.chat,
                rows.conversations,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.options.batch_size,
                progress=progress.of(rows.name, "answered"),
            )
            scores_R = self.metric.scores(answers)
            figures["score"] = of_answers.ratio(scores_R, np.ones(len(scores_R)))
            estimates["score"] = share_of(scores_R, figures["score"])
        reference = self.reference_figures[i] if i < len(self.reference_figures) else {}
        gaps = {name: figures[name] - reference[name] for name in ("loss", "accuracy", "score") if name in reference}
        differences = {name: gap.estimate() for name, gap in gaps.items() if name != "score"}
        if "score" in gaps:
            differences["score"] = difference_of_shares(scores_R, self.reference_scores_R[i], gaps["score"])
        if is_reference:
            self.reference_figures.append(figures)
            self.reference_scores_R.append(scores_R)
        return SetFigures(
            rows.name, rows.rows, len(scores.row_N), rows.forgetting, len(rows.conversations), estimates, differences
        )

    def _score_tokens(
        self, model: nn.Module, i: int, is_reference: bool, progress: Callable[[int, int], None]
    ) -> TokenScores:
        score = functools.partial(
            score_tokens, model, self.sets[i].documents, limit_tokens=EVALUATION_TOKENS, progress=progress
        )
        if is_reference:
            cache = ReferenceCache(self.scratch / str(i), next(model.parameters()).device)
            scores = score(keep=cache.keep)
            cache.head = head_of(model)
            self.references.append(cache)
            return scores
        teacher = self.references[i].replay() if i < len(self.references) else None
        return score(teacher=teacher, vocabulary=self.vocabulary)


def token_figures(scores: TokenScores, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Compute loss, perplexity and accuracy, and with a teacher kl, kl_p99 and top1."""

    def per_token(values_N: np.ndarray) -> Figure:
        sums_R = np.bincount(scores.row_N, weights=values_N.astype(np.float64), minlength=bootstrap.rows)
        return bootstrap.ratio(sums_R, np.bincount(scores.row_N, minlength=bootstrap.rows))

    loss = per_token(scores.nll_N)
    figures = {
        "loss": loss,
        "perplexity": loss.map(lambda nats: np.exp(np.minimum(nats, _MOST_NATS))),
        "accuracy": per_token(scores.correct_N),
    }
    if scores.kl_N is not None and scores.agree_N is not None:
        figures["kl"] = per_token(scores.kl_N)
        figures["kl_p99"] = bootstrap.quantile(scores.kl_N, scores.row_N, 0.99)
        figures["top1"] = per_token(scores.agree_N)
    return figures


def stored_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights in memory, with 4-bit scales and adapter, tied weights once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())
