"""What a trained model computes on a few rows, recorded when training ends, and its comparison with a server.

Prompts count as well as answers: a model that knows its task is sure of every token of an answer, whatever became of a
part of its adapter. On prompts its probabilities show every change.

Shapes: N scored tokens, D hidden width, V vocabulary rows, K recorded tokens for each.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.batch import build_batch, groups_of
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.evaluation.scoring import evaluating
from finetune.losses.chunked import chunked_logits
from finetune.losses.cross_entropy import head_of, vocabulary_rows
from finetune.losses.hidden_states import target_states
from finetune.models.adapters.folder import TENSOR_FILE
from finetune.models.digest import base_fingerprint
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.parallel.in_step import in_step
from finetune.system.atomic import write_text
from finetune.system.errors import IntegrityError
from finetune.system.manifest import check_files, sha256_of

FILE = "probe.json"
ROWS = 8
TOP = 20  # vLLM reports at most 20 by default
_ROW_TOKENS = 512
_ROW_TARGETS = 64
_ROW_SCORED = 96
_ROWS_AT_ONCE = 16
_MOST_DOCUMENTS = 1000  # read in search of rows without media
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
# Sums of rounded probabilities may reach 1: the rest keeps this much.
_LEAST_REST = 1e-6


@dataclass(frozen=True, slots=True)
class Row:
    """A text whose tokens `ids[first:]` are scored, each as predicted from those before it. first: 1 or more."""

    ids: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.first


@dataclass(frozen=True, slots=True)
class Scored:
    """Natural log-probabilities of a token.

    own: of the row's token; None if unknown. top: of the most probable ids.
    """

    own: float | None
    top: dict[int, float]


@dataclass(frozen=True)
class Probe:
    """Rows, and what the trained model computes at each of their scored tokens.

    source: the kind of rows, for messages. base: fingerprint of a local base. adapter: SHA-256 of its tensor file; None
    for a base alone. versions: of the packages that computed it.
    """

    rows: list[Row]
    scores: list[list[Scored]]
    source: str
    base: str | None = None
    adapter: str | None = None
    versions: Mapping[str, str] | None = None


# Rows -> per row the scores of its scored tokens; None where the server was not asked.
Scorer = Callable[[Sequence[Row]], list[list[Scored | None]]]


def text_rows(documents: Iterable[Document], count: int = ROWS) -> list[Row]:
    """Return the first documents without media as rows of at most 512 tokens, cut after 64 targets.

    The last 96 tokens are scored. A row with preferences is its desirable answer, or the undesirable one if it has no
    other.
    """
    rows: list[Row] = []
    for document in islice(documents, _MOST_DOCUMENTS):
        if len(rows) == count:
            break
        if document.chosen_tokens is not None:
            document = next(side for side in document.sides if side is not None)
        if not document.media and len(document) > 1:
            rows.append(_row(document))
    return rows


def row_of_ids(ids: Sequence[int]) -> Row:
    """Return the end of a text as a row."""
    kept = tuple(ids[-_ROW_TOKENS:])
    return Row(kept, max(1, len(kept) - _ROW_SCORED))


def _row(document: Document) -> Row:
    targets_N = np.flatnonzero(document.labels != IGNORE_INDEX)[:_ROW_TARGETS] + 1
    end = int(targets_N[-1]) + 1 if len(targets_N) else len(document)
    return row_of_ids(document.ids[:end].tolist())


@torch.no_grad()
def measure(model: nn.Module, rows: Sequence[Row], top: int = TOP) -> list[list[Scored]]:
    """Score rows as an evaluation in training does, with the `top` most probable tokens at each place."""
    found: list[Scored] = []
    with evaluating(model), in_step(model):
        for group in groups_of(map(_document, rows), EVALUATION_TOKENS):
            targets = target_states(model, build_batch(group))
            for logits_NV, part in chunked_logits(targets.hidden_ND, head_of(model), vocabulary_rows(model)):
                labels_N = targets.labels_N[part]
                # A few rows at a time: all in fp32 would take more memory than a training step.
                for rows_NV, own_N in zip(logits_NV.split(_ROWS_AT_ONCE), labels_N.split(_ROWS_AT_ONCE), strict=True):
                    found += _scored(rows_NV, own_N, top)
    scores = iter(found)
    return [list(islice(scores, row.scored)) for row in rows]


def _scored(logits_NV: Tensor, own_N: Tensor, top: int) -> Iterator[Scored]:
    log_probs_NV = logits_NV.float().log_softmax(-1)
    best_NK = log_probs_NV.topk(min(top, log_probs_NV.shape[-1]))
    own = log_probs_NV.gather(1, own_N[:, None])[:, 0]
    columns = (tensor.tolist() for tensor in (own, best_NK.indices, best_NK.values))
    for value, ids, values in zip(*columns, strict=True):
        yield Scored(value, dict(zip(ids, values, strict=True)))


def _document(row: Row) -> Document:
    ids = np.array(row.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    labels[row.first - 1 : -1] = ids[row.first :]
    return Document(ids, labels, "")


def write_probe(folder: Path, rows: Sequence[Row], measured: Sequence[list[Scored]], *, source: str, base: str) -> None:
    """Record in a run folder what its trained model computes on rows, as `measure` returns it.

    base: as the config names it.
    """
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    content = {
        "source": source,
        "base": base_fingerprint(base),
        "adapter": sha256_of(folder / TENSOR_FILE),
        "versions": versions,
        "rows": [
            {**asdict(row), "scores": [_as_json(scored) for scored in scores]}
            for row, scores in zip(rows, measured, strict=True)
        ],
    }
    write_text(folder / FILE, json.dumps(content) + "\n")


def _as_json(scored: Scored) -> list[Any]:
    own = None if scored.own is None else round(scored.own, 6)
    return [own, [[id, round(log_prob, 6)] for id, log_prob in scored.top.items()]]


def read_probe(folder: Path) -> Probe | None:
    """Read the probe of an adapter folder or of the run of a checkpoint; None unless it was of this very adapter.

    Raises:
        IntegrityError: the file is corrupt.
    """
    for place in (folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])):
        if (place / FILE).is_file():
            check_files(place, [FILE])
            probe = _parse(place / FILE)
            return probe if probe.adapter == sha256_of(folder / TENSOR_FILE) else None
    return None


def _parse(file: Path) -> Probe:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [Row(tuple(row["ids"]), row["first"]) for row in content["rows"]]
        scores = [
            [Scored(own, {int(id): float(value) for id, value in top}) for own, top in row["scores"]]
            for row in content["rows"]
        ]
        for row, scored in zip(rows, scores, strict=True):
            if row.first < 1 or len(scored) != row.scored or not all(one.top for one in scored):
                raise ValueError("tokens and scores differ")
        return Probe(rows, scores, *(content[key] for key in ("source", "base", "adapter", "versions")))
    except (ValueError, LookupError, TypeError) as error:
        help_line = "help: delete it, and another reference is computed"
        raise IntegrityError(f"{file}: corrupt, {error}\n{help_line}") from error


@dataclass(frozen=True)
class Comparison:
    """The distance of a served from a trained model.

    kl: lower bound of KL(trained || served), nats per token. top1: share of tokens with the same first choice.
    nats_trained, nats_served: mean negative log-likelihood per token; None if the server reports none.
    """

    source: str
    rows: int
    tokens: int
    kl: float
    top1: float
    nats_trained: float | None
    nats_served: float | None

    def describe(self) -> str:
        nats = ""
        if self.nats_trained is not None:
            nats = f", nats per token={self.nats_trained:.4f} trained and {self.nats_served:.4f} served"
        return (
            f"reference={self.source}, rows={self.rows}, tokens={self.tokens}, KL={self.kl:.2g}, "
            f"same first choices={self.top1:.1%}{nats}"
        )

    def details(self) -> dict[str, Any]:
        """Return the figures as JSON, for a list of models."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def compare(probe: Probe, scorer: Scorer) -> Comparison:
    """Compare a server with what the trained model computed."""
    pairs = [
        (trained, served)
        for trained_row, served_row in zip(probe.scores, scorer(probe.rows), strict=True)
        for trained, served in zip(trained_row, served_row, strict=True)
        if served is not None
    ]
    known = [(-a.own, -b.own) for a, b in pairs if a.own is not None and b.own is not None]
    nats = [sum(column) / len(known) for column in zip(*known, strict=True)] if known else [None, None]
    return Comparison(
        probe.source,
        rows=len(probe.rows),
        tokens=len(pairs),
        kl=sum(least_kl(trained.top, served.top) for trained, served in pairs) / len(pairs),
        top1=sum(_same_choice(trained.top, served.top) for trained, served in pairs) / len(pairs),
        nats_trained=nats[0],
        nats_served=nats[1],
    )


def least_kl(trained: Mapping[int, float], served: Mapping[int, float]) -> float:
    """Return a lower bound of KL(trained || served) in nats from log-probabilities of the most probable tokens.

    Tokens that both list count one by one, all others together: a coarser partition has at most the KL of a finer one.
    Tokens that `served` does not list have there at most the probability of its last one. They are given the most
    favorable one below that.
    """
    p, q = ({id: math.exp(value) for id, value in scores.items()} for scores in (trained, served))
    shared = p.keys() & q.keys()
    kl = sum(p[id] * (trained[id] - served[id]) for id in shared if p[id])
    p_unlisted = sum(p[id] for id in p.keys() - shared)
    p_rest = max(0.0, 1.0 - sum(p.values()))
    q_others = max(_LEAST_REST, 1.0 - sum(q[id] for id in shared))
    if p_unlisted:
        most = min(len(p.keys() - shared) * min(q.values()), max(_LEAST_REST, 1.0 - sum(q.values())))
        q_unlisted = min(most, q_others * p_unlisted / (p_unlisted + p_rest))
        kl += p_unlisted * math.log(p_unlisted / q_unlisted)
        q_others = max(_LEAST_REST, q_others - q_unlisted)
    if p_rest:
        kl += p_rest * math.log(p_rest / q_others)
    return 0.0 if kl < 0 else kl  # NaN stays


def _same_choice(trained: Mapping[int, float], served: Mapping[int, float]) -> bool:
    """Return whether the served first choice is one of the trained model: 16-bit logits are often equal."""
    return trained.get(max(served, key=served.__getitem__), -math.inf) == max(trained.values())


def require_close(found: Mapping[str, Comparison], max_kl: float) -> None:
    """Raise IntegrityError with the figures of every model that is further than `max_kl` from its trained one."""
    far = [f"{name}: {one.describe()}" for name, one in found.items() if not one.kl <= max_kl]
    if far:
        raise IntegrityError(
            "\n".join(
                [
                    f"serve.max_kl={max_kl:g}: the engine does not answer as the trained model does:",
                    *far,
                    "help: check that base, adapter and number types are those of the training run; quant.type of the "
                    "run serves what was trained; serve.max_kl=NUMBER accepts a distance",
                ]
            )
        )
