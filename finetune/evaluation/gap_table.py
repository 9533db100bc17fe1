"""The gap table, as stored in gap.json: per model, its figures on each dataset."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from finetune.evaluation.intervals import Estimate
from finetune.system.errors import IntegrityError
from finetune.system.manifest import sha256_of
from finetune.system.sealed import seal, unseal

JSON, MARKDOWN, PICTURE = "gap.json", "gap.md", "gap.png"
SCHEMA_VERSION = 1

# In the order of the table.
Variant = Literal["base", "quantized", "trained", "merged"]


@dataclass(frozen=True)
class SetFigures:
    """Figures of a model on one dataset, with 95 % intervals. Figures that were not measured are missing.

    tokens: targets. forgetting: the rows are not of the task. answered: number of answered rows.
    figures: by name. loss: nats per target. perplexity. accuracy: share of targets that greedy decoding predicts.
    kl: KL(reference || model) in nats per target. kl_p99: its 99th percentile. top1: share of targets with the same
    first choice. score: mean of the metric over answered rows.
    differences: loss, accuracy and score minus those of the reference on the same rows.
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
    """A metric of a task of lm-evaluation-harness.

    The interval of a metric that is not a mean over rows comes from the harness's standard error; 0 without one.
    """

    task: str
    metric: str
    rows: int
    estimate: Estimate


@dataclass(frozen=True)
class ModelFigures:
    """Figures of one model. name: as in tables. stored_bytes: of its weights and adapter."""

    variant: Variant
    name: str
    stored_bytes: int
    sets: list[SetFigures]
    tasks: list[TaskFigures] = field(default_factory=list)


@dataclass(frozen=True)
class GapTable:
    """All results of `finetune eval`.

    adapter: None for a model alone. model: the base, or the model alone.
    reference: variant that the others are compared with; None if it was not evaluated.
    metric: name of the metric behind `score`; None without answers. made_with: versions, device, date.
    adapter_files: SHA-256 of the adapter's weight files, by name.
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


def to_json(table: GapTable) -> str:
    """Return the table as JSON text."""
    return json.dumps(seal(asdict(table)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_gap(folder: Path | str) -> GapTable | None:
    """Read the table of a run's folder.

    Returns: None if there is none, or it has another schema version, or the adapter has changed since.
    Raises: IntegrityError if gap.json is corrupt.
    """
    file = Path(folder) / JSON
    try:
        content = unseal(json.loads(file.read_text(encoding="utf-8")))
        if content["schema_version"] != SCHEMA_VERSION:
            return None
        table = TypeAdapter(GapTable).validate_python(content)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{file}: not a table of finetune eval ({error})\nhelp: remove it, then rerun") from error
    then = {file.with_name(name): digest for name, digest in table.adapter_files.items()}
    return None if any(part.is_file() and sha256_of(part) != digest for part, digest in then.items()) else table
