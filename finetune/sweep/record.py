"""sweep.json: the settings of a sweep and the state of its runs, from which it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from finetune.report.settings import shown
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError, IntegrityError

RECORD = "sweep.json"
Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """A run of a sweep.

    Attributes:
        number: counts from 1.
        values: override texts by key.
        metric: None until it is measured.
        error: why the run failed.
        same_as: number of an earlier run with the same values; this one is not repeated.
    """

    number: int
    values: dict[str, str]
    status: Status = "waiting"
    metric: float | None = None
    error: str | None = None
    same_as: int | None = None

    @property
    def folder_name(self) -> str:
        return f"trial-{self.number if self.same_as is None else self.same_as:03d}"

    @property
    def described(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass
class Record:
    """A sweep; it resumes only with an equal `spec`."""

    spec: dict[str, Any]
    metric: str
    minimize: bool
    trials: list[Trial] = field(default_factory=list)

    def ranked(self) -> list[Trial]:
        """Return the runs, best first; those without a metric are last, in their order."""
        judged = [trial for trial in self.trials if trial.metric is not None]
        rest = [trial for trial in self.trials if trial.metric is None]
        sign = 1 if self.minimize else -1
        return [*sorted(judged, key=lambda trial: (sign * (trial.metric or 0.0), trial.number)), *rest]

    def save(self, folder: Path) -> None:
        ranked = self.ranked()
        best = ranked[0].number if ranked and ranked[0].metric is not None else None
        write_text(folder / RECORD, json.dumps({**asdict(self), "best": best}, indent=1, ensure_ascii=False) + "\n")


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
        return TypeAdapter(Record).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{file}: corrupt ({error})\nhelp: the runs in the folder are valid; choose another sweep.out"
        ) from error


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ConfigError with every difference between a sweep and the one in the folder."""
    plain = json.loads(json.dumps(new))
    keys: Sequence[str] = sorted(old.keys() | plain.keys())
    lines = [
        f"  {key}: {_shown(old.get(key))} there, found {_shown(plain.get(key))}"
        for key in keys
        if old.get(key) != plain.get(key)
    ]
    if lines:
        head, advice = (
            f"sweep.out={folder}: holds another sweep",
            "help: repeat its command, or choose another sweep.out",
        )
        raise ConfigError("\n".join([head, *lines, advice]))


def _shown(value: Any) -> str:
    return "nothing" if value is None else shown(value)
