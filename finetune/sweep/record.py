"""sweep.json, the record of a sweep, from which it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from finetune.report.facts import figure_named
from finetune.report.settings import shown
from finetune.report.sweep import SweepResults
from finetune.sweep.limits import Prediction
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError, FinetuneError, IntegrityError, os_errors_as
from finetune.system.sealed import seal, unseal

RECORD = "sweep.json"
_FULL = "free space and repeat the command; finished runs are kept"


@dataclass
class Trial:
    """A run of a sweep.

    Attributes:
        number: counts from 1.
        values: override texts by key.
        metric: None until it is measured.
        error: why the run failed.
        same_as: number of an earlier run with the same values; this one is not repeated.
        until: step that it trains to, with space=auto.
        rungs: the metric at each step where it paused or ended.
        plan: what the planner predicts.
        over_limits: draws before this one that the limits rejected.
    """

    number: int
    values: dict[str, str]
    status: Literal["waiting", "running", "paused", "finished", "stopped", "failed"] = "waiting"
    metric: float | None = None
    error: str | None = None
    same_as: int | None = None
    until: int | None = None
    rungs: dict[int, float] = field(default_factory=dict)
    plan: Prediction | None = None
    over_limits: int = 0

    @property
    def folder_name(self) -> str:
        return f"trial-{self.same_as or self.number:03d}"

    @property
    def described(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass
class Record:
    """A sweep; it resumes only with an equal `spec`.

    Attributes:
        memory_bytes: with space=auto, the memory that was free when it began, which limits every run.
        exhausted: the space has no further candidate.
    """

    spec: dict[str, Any]
    metric: str
    minimize: bool
    trials: list[Trial] = field(default_factory=list)
    memory_bytes: float | None = None
    exhausted: bool = False

    def ranked(self) -> list[Trial]:
        """Return the runs, best first; those without a metric are last: the furthest first, then in their order."""
        sign = 1 if self.minimize else -1

        def place(trial: Trial) -> tuple[bool, float, float, int]:
            step, metric = max(trial.rungs.items(), default=(0, 0.0))
            measured = trial.metric if trial.metric is not None else metric
            return trial.metric is None, 0 if trial.metric is not None else -step, sign * measured, trial.number

        return sorted(self.trials, key=place)

    def results(self) -> SweepResults | None:
        """Return the settings and metrics of the measured runs, or None if there are none."""
        runs = [(t.values, t.metric) for t in self.trials if t.metric is not None and t.same_as is None]
        return SweepResults(figure_named(self.metric).label, self.minimize, runs) if runs else None

    def save(self, folder: Path) -> None:
        """Write sweep.json."""
        best = next((trial.number for trial in self.ranked() if trial.metric is not None), None)
        content = seal({**asdict(self), "best": best})
        with os_errors_as(FinetuneError, f"sweep.out={folder}: cannot be written", _FULL):
            write_text(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_record(folder: Path) -> Record | None:
    """Read the sweep of a folder; None for an empty or a new folder.

    Raises:
        ConfigError: the folder holds runs, but no sweep.
        IntegrityError: sweep.json is corrupt.
    """
    file = folder / RECORD
    if not file.exists():
        if any(folder.glob("trial-*")):
            raise ConfigError(f"sweep.out={folder}: holds runs but no {RECORD}\nhelp: choose another folder")
        return None
    try:
        return TypeAdapter(Record).validate_python(unseal(json.loads(file.read_bytes())))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{file}: corrupt ({error})\nhelp: the runs in the folder are valid; choose another sweep.out"
        ) from error


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ConfigError with every difference between a sweep and the one in the folder."""
    plain, lines = json.loads(json.dumps(new)), []
    for key in sorted(old.keys() | plain.keys()):
        there, here = old.get(key), plain.get(key)
        if there != here:
            texts = ("nothing" if value is None else shown(value) for value in (there, here))
            lines.append(f"  {key}: {' there, found '.join(texts)}")
    if lines:
        help_line = "help: repeat its command, or choose another sweep.out"
        raise ConfigError("\n".join([f"sweep.out={folder}: holds another sweep", *lines, help_line]))
