"""What `finetune eval` found, as gap.json holds it: one row for each model, its figures on each set of rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from finetune.evaluation.intervals import Estimate
from finetune.models.digest import sha256_of
from finetune.system.atomic import write_text
from finetune.system.errors import IntegrityError

JSON, MARKDOWN, PICTURE = "gap.json", "gap.md", "gap.png"
SCHEMA_VERSION = 1

# What the models are, in the order of the table; see `ModelFigures.variant`.
Variant = Literal["base", "quantized", "trained", "merged"]


@dataclass(frozen=True)
class SetFigures:
    """A model on one set of held-out rows.

    tokens: targets among them. forgetting: whether the rows are none of the task's. answered: rows that it answered.
    figures: by name. loss in nats a target; perplexity; accuracy, share of targets that greedy decoding gives; kl,
    KL(reference || model) in nats a target, and kl_p99, below which 99 % of the targets are; top1, share of targets at
    which both prefer the same token; score, mean of the metric over the rows answered.
    differences: figures less those of the reference on the same rows; only loss, accuracy and score.
    Figures that were not measured are missing. All intervals are 95 %.
    """

    name: str
    rows: int
    tokens: int
    forgetting: bool
    answered: int
    figures: dict[str, Estimate]
    differences: dict[str, Estimate]


@dataclass(frozen=True)
class TaskFigures:
    """A metric of a task of lm-evaluation-harness, averaged over rows; where it is no average, its interval is the
    harness's own standard error, 0 where it gives none.
    """

    task: str
    metric: str
    rows: int
    estimate: Estimate


@dataclass(frozen=True)
class ModelFigures:
    """One model. name: as tables call it. stored_bytes: of its weights, an adapter included."""

    variant: Variant
    name: str
    stored_bytes: int
    sets: list[SetFigures]
    tasks: list[TaskFigures] = field(default_factory=list)


@dataclass(frozen=True)
class GapTable:
    """Everything that was measured.

    adapter: None where a model alone was. model: the base, or that model. reference: variant that kl, top1 and the
    differences are to; None where it was not among the models. metric: what `score` is; None without answers.
    made_with: versions, device, date. adapter_files: SHA-256 of what the adapter's weights were read from, by name.
    """

    adapter: str | None
    model: str
    reference: Variant | None
    metric: str | None
    resamples: int
    seed: int
    seconds: float
    made_with: dict[str, str]
    models: list[ModelFigures]
    adapter_files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def save_gap(table: GapTable, folder: Path) -> None:
    """Writes gap.json in one rename."""
    write_text(folder / JSON, to_json(table))


def to_json(table: GapTable) -> str:
    """The table as JSON text."""
    return json.dumps(asdict(table), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_gap(folder: Path | str) -> GapTable | None:
    """The table of a run's folder; None where none was measured, by a release that wrote it otherwise, or of another
    adapter than the folder now holds.

    Raises: IntegrityError if gap.json is no whole table.
    """
    file = Path(folder) / JSON
    try:
        text = file.read_text(encoding="utf-8")
        if json.loads(text)["schema_version"] != SCHEMA_VERSION:
            return None
        table = TypeAdapter(GapTable).validate_json(text)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{file} is no table of finetune eval ({error}); remove it and measure again") from error
    then = {file.with_name(name): digest for name, digest in table.adapter_files.items()}
    return None if any(part.is_file() and sha256_of(part) != digest for part, digest in then.items()) else table
