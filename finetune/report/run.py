"""A run's folder as it lies on the disk: everything that can be read of it, and what could not be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.report.series import Series, is_figure, read_metrics
from finetune.system.errors import InputError

CONFIG, METRICS, RESULT, FACTS = "config.yaml", "metrics.jsonl", "result.json", "run.json"
SAMPLES, TEACHER, ADAPTER = "samples.json", "teacher.md", "adapter_model.safetensors"
Content = TypeVar("Content")


@dataclass(frozen=True)
class Run:
    """What a folder holds; a part that is missing is empty.

    config: sections of config.yaml. result: of result.json. facts: of run.json. metrics: figures by name. samples:
    prompt, expected, before, after of each. teacher: its table, rows of cells. has_adapter: whether a trained adapter
    lies there. problems: files that could not be read, and why.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Series] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    teacher: Sequence[Sequence[str]] = ()
    has_adapter: bool = False
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def status(self) -> str:
        """finished | stopped | failed, as the run said; `unfinished` if it goes on, or was killed."""
        return str(self.result.get("status") or "unfinished")

    def setting(self, key: str) -> Any:
        """A setting by its dotted key; None where there is none."""
        here: Any = self.config
        for part in key.split("."):
            here = here.get(part) if isinstance(here, Mapping) else None
        return here

    def value(self, name: str) -> Any:
        """What result.json, or an evaluation in it (`eval/NAME/loss`), holds by that name; None where nothing."""
        evaluations = self.result.get("evaluations")
        value = self.result.get(name)
        return evaluations.get(name) if value is None and isinstance(evaluations, Mapping) else value

    def figure(self, name: str) -> float | None:
        """The same as a finite number; None where it is none."""
        value = self.value(name)
        return float(value) if is_figure(value) else None


def read_run(folder: Path) -> Run:
    """Raises: InputError if the folder is none of a run."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the folder of a run, as outputs/quickstart")
    if not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        raise InputError(f"{folder}: holds no run (neither {CONFIG} nor {METRICS})")
    problems: list[str] = []

    def read(name: str, parse: Callable[[Path], Content], empty: Content) -> Content:
        file = folder / name
        if not file.exists():
            return empty
        try:
            content = parse(file)
            if not isinstance(content, type(empty)):
                raise ValueError(f"holds a {type(content).__name__}")
            return content
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            problems.append(f"{name} cannot be read: {_first_line(error)}")
            return empty

    samples = [sample for sample in read(SAMPLES, _json, []) if isinstance(sample, Mapping)]
    return Run(
        folder,
        config=read(CONFIG, _yaml, {}),
        config_text=read(CONFIG, _text, ""),
        result=read(RESULT, _json, {}),
        facts=read(FACTS, _json, {}),
        metrics=read(METRICS, read_metrics, {}),
        samples=samples,
        teacher=read(TEACHER, _table, []),
        has_adapter=(folder / ADAPTER).is_file(),
        problems=tuple(problems),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises: InputError naming every folder that is none of a run."""
    runs, wrong = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(wrong[0] if len(wrong) == 1 else "\n  ".join([f"{len(wrong)} runs cannot be read:", *wrong]))
    return runs


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _json(file: Path) -> Any:
    return json.loads(_text(file))


def _yaml(file: Path) -> Any:
    return yaml.safe_load(_text(file))


def _table(file: Path) -> list[list[str]]:
    return table_rows(_text(file))


def table_rows(markdown: str) -> list[list[str]]:
    """Rows of cells of a markdown table, its head first."""
    lines = [line.strip() for line in markdown.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not all(set(cell) <= set("-: ") for cell in row)]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
