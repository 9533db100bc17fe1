"""One model on all sets of rows: scored, answered, compared with what the reference said, and weighed.

Shapes: N target tokens of a batch, D hidden width, R rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from finetune.data.batch import Batch
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.examples import RowSet
from finetune.evaluation.gap_table import SetFigures
from finetune.evaluation.generation import answer_rows
from finetune.evaluation.intervals import Bootstrap, Figure, difference_of_shares, share_of
from finetune.evaluation.metrics import Metric
from finetune.evaluation.scoring import TokenScores, score_tokens
from finetune.losses.cross_entropy import head_of
from finetune.losses.teacher_targets import TeacherHidden
from finetune.system.console import Log

LIMIT_TOKENS = 4096
PACE_SECONDS = 10.0
# Beyond it exp() is more than JSON holds.
_MOST_NATS = 700.0


class ReferenceCache:
    """What the reference said of a set: the final hidden states of its targets, on the disk until asked for."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device = folder, device
        self._batches = 0
        self.head: nn.Module | None = None
        folder.mkdir()

    def keep(self, hidden_ND: Tensor) -> None:
        """The next batch's."""
        save_file({"hidden": hidden_ND.contiguous()}, self._folder / f"{self._batches}.safetensors")
        self._batches += 1

    def replay(self) -> _Replay:
        """A teacher that says it again, about the same batches in the same order."""
        return _Replay(self)

    def batch(self, i: int) -> TeacherHidden:
        assert self.head is not None, "the reference was never asked"
        hidden = load_file(self._folder / f"{i}.safetensors", device=str(self._device))["hidden"]
        return TeacherHidden(hidden, self.head)


class _Replay:
    def __init__(self, cache: ReferenceCache):
        self._cache, self._next = cache, 0

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        for _ in batches:
            self._next += 1
            yield self._cache.batch(self._next - 1)


class Progress:
    """Says how far a model has come, where that takes longer than a few seconds."""

    def __init__(self, name: str, log: Log):
        self._name, self._say = name, log
        self._next = time.monotonic() + PACE_SECONDS

    def of(self, rows: str, what: str) -> Callable[[int, int], None]:
        """What to tell how many of a set are scored or answered, and of how many."""

        def progress(done: int, total: int) -> None:
            if done < total and (now := time.monotonic()) >= self._next:
                self._next = now + PACE_SECONDS
                self._say(f"{self._name}: {rows}, {what} {done:,} of {total:,}")

        return progress


@dataclass
class Evaluator:
    """What measuring needs besides a model. vocabulary: ids that reference and models know. scratch: a folder.

    said, baseline, right: of each set, what the reference said, its figures, and its score of each row answered; empty
    until it was measured.
    """

    sets: list[RowSet]
    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    metric: Metric
    vocabulary: int
    max_new_tokens: int
    batch_size: int
    bootstraps: list[Bootstrap]
    answered: list[Bootstrap]
    scratch: Path
    said: list[ReferenceCache] = field(default_factory=list)
    baseline: list[dict[str, Figure]] = field(default_factory=list)
    right: list[np.ndarray] = field(default_factory=list)

    def measure(self, model: nn.Module, reference: bool, far: Progress) -> list[SetFigures]:
        """A model's figures on every set. reference: whether it is what the models after it are compared with."""
        return [self._on_set(model, i, reference, far) for i in range(len(self.sets))]

    def _on_set(self, model: nn.Module, i: int, reference: bool, far: Progress) -> SetFigures:
        rows = self.sets[i]
        said = self.said[i] if i < len(self.said) else None
        if reference:
            said = ReferenceCache(self.scratch / str(i), next(model.parameters()).device)
            scores = score_tokens(
                model, rows.documents, limit_tokens=LIMIT_TOKENS, keep=said.keep, progress=far.of(rows.name, "scored")
            )
            said.head = head_of(model)
            self.said.append(said)
        else:
            teacher = None if said is None else said.replay()
            scores = score_tokens(
                model,
                rows.documents,
                limit_tokens=LIMIT_TOKENS,
                teacher=teacher,
                vocabulary=self.vocabulary,
                progress=far.of(rows.name, "scored"),
            )
        figures = token_figures(scores, self.bootstraps[i])
        estimates = {name: figure.estimate() for name, figure in figures.items()}
        values_R = self._score_answers(model, rows, far) if rows.conversations else np.empty(0)
        if len(values_R):
            figures["score"] = self.answered[i].ratio(values_R, np.ones(len(values_R)))
            estimates["score"] = share_of(values_R, figures["score"])
        baseline = self.baseline[i] if i < len(self.baseline) else {}
        compared = [name for name in ("loss", "accuracy", "score") if name in baseline]
        differences = {name: (figures[name] - baseline[name]).estimate() for name in compared}
        if "score" in differences:
            less = figures["score"] - baseline["score"]
            differences["score"] = difference_of_shares(values_R, self.right[i], less)
        if reference:
            self.baseline.append(figures)
            self.right.append(values_R)
        return SetFigures(
            rows.name, rows.rows, len(scores.row_N), rows.forgetting, len(rows.conversations), estimates, differences
        )

    def _score_answers(self, model: nn.Module, rows: RowSet, far: Progress) -> np.ndarray:
        answers = answer_rows(
            model,
            self.tokenizer,
            self.chat,
            rows.conversations,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=far.of(rows.name, "answered"),
        )
        self.metric.check(answers)
        return self.metric.scores(answers)


def token_figures(scores: TokenScores, bootstrap: Bootstrap) -> dict[str, Figure]:
    """loss, perplexity and accuracy; with a teacher kl, kl_p99 and top1 as well."""

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
    """Bytes of a model's weights as they are stored: 4-bit ones with their scales, tied ones once, an adapter too."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())
