"""sweep.json: what a sweep is, and what has become of each of its runs; it is what a continued sweep goes on from."""

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
    """One run. number: from 1. values: override texts by key. metric: what is judged, None until it is known.

    error: why it failed. same_as: number of an earlier run with the same values, which was not repeated.
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
    """spec: what must stay the same for a sweep to go on, by name. metric, minimize: how runs are judged."""

    spec: dict[str, Any]
    metric: str
    minimize: bool
    trials: list[Trial] = field(default_factory=list)

    def ranked(self) -> list[Trial]:
        """The best first; those without a figure last, in their order."""
        judged = [trial for trial in self.trials if trial.metric is not None]
        rest = [trial for trial in self.trials if trial.metric is None]
        sign = 1 if self.minimize else -1
        return [*sorted(judged, key=lambda trial: (sign * (trial.metric or 0.0), trial.number)), *rest]

    def save(self, folder: Path) -> None:
        ranked = self.ranked()
        best = ranked[0].number if ranked and ranked[0].metric is not None else None
        write_text(folder / RECORD, json.dumps({**asdict(self), "best": best}, indent=1, ensure_ascii=False) + "\n")


def load_record(folder: Path) -> Record | None:
    """The sweep that a folder holds; None for an empty or a new one.

    Raises: IntegrityError if sweep.json is torn; ConfigError if the folder holds runs that belong to no sweep.
    """
    file = folder / RECORD
    if not file.exists():
        if any(folder.glob("trial-*")):
            raise ConfigError(f"sweep.out: {folder} holds runs but no {RECORD}; name another folder")
        return None
    try:
        return TypeAdapter(Record).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{file} cannot be read ({error}); the runs beside it are whole, name another sweep.out"
        ) from error


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises: ConfigError naming everything in which a sweep differs from the one that the folder holds."""
    plain = json.loads(json.dumps(new))
    keys: Sequence[str] = sorted(old.keys() | plain.keys())
    lines = [
        f"{key}: {_shown(old.get(key))} there, {_shown(plain.get(key))} now"
        for key in keys
        if old.get(key) != plain.get(key)
    ]
    if lines:
        advice = "go on with the same words, or name another sweep.out"
        raise ConfigError("\n  ".join([f"{folder} holds another sweep ({advice}):", *lines]))


def _shown(value: Any) -> str:
    return "nothing" if value is None else shown(value)
