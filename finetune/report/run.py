"""Read the folder of a run, as far as its files can be read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from finetune.system.errors import InputError, IntegrityError
from finetune.system.manifest import differences

CONFIG, METRICS, RESULT, FACTS = "config.yaml", "metrics.jsonl", "result.json", "run.json"
SAMPLES, WORST, REWARDED, TEACHER = "samples.json", "worst_answers.json", "rewarded_answers.json", "teacher.md"
ADAPTER = "adapter_model.safetensors"
# The entry of run.json for the user's functions that judge answers: name -> word on the command line, digest.
REWARD_FUNCTIONS = "reward_functions"
Content = TypeVar("Content")


class Series(NamedTuple):
    """Finite values [N] of a metric by ascending steps [N]."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """The files of a run; a missing one is empty.

    Attributes:
        config: sections of config.yaml.
        result: content of result.json.
        facts: content of run.json.
        metrics: metrics.jsonl by name, and at step 0 the evaluation before training.
        samples: prompt, expected, before and after of each.
        worst: content of worst_answers.json: answered, wrong, rows.
        rewarded: content of rewarded_answers.json: answered, best, worst.
        teacher: rows of the table in teacher.md.
        problems: the files that cannot be read, and why.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Series] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    worst: Mapping[str, Any] = field(default_factory=dict)
    rewarded: Mapping[str, Any] = field(default_factory=dict)
    teacher: Sequence[Sequence[str]] = ()
    has_adapter: bool = False
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def status(self) -> str:
        """Return finished, stopped or failed; `unfinished` if the run has no result: it is running, or was killed."""
        return str(self.result.get("status") or "unfinished")

    @property
    def reward_words(self) -> list[str]:
        """Return the word on the command line of each function of the user that judges answers."""
        found = self.facts.get(REWARD_FUNCTIONS)
        functions = found.values() if isinstance(found, Mapping) else ()
        return [str(function["word"]) for function in functions if isinstance(function, Mapping) and "word" in function]

    def setting(self, key: str) -> Any:
        """Return a setting by its dotted key, or None."""
        here: Any = self.config
        for part in key.split("."):
            here = here.get(part) if isinstance(here, Mapping) else None
        return here

    def value(self, name: str) -> Any:
        """Return a value of result.json, or of an evaluation in it (`eval/NAME/loss`), or None."""
        evaluations = self.result.get("evaluations")
        value = self.result.get(name)
        return evaluations.get(name) if value is None and isinstance(evaluations, Mapping) else value

    def figure(self, name: str) -> float | None:
        """Return a value of result.json if it is a finite number, or None."""
        value = self.value(name)
        return float(value) if is_figure(value) else None


def read_run(folder: Path) -> Run:
    """Read a run. Raises InputError if the folder holds none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder\nhelp: give the folder of a run, as outputs/quickstart")
    if not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        raise InputError(f"{folder}: holds no run (neither {CONFIG} nor {METRICS})")
    problems = _altered(folder)

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
            problems.append(f"{name}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})")
            return empty

    result, metrics = read(RESULT, _json, {}), read(METRICS, read_metrics, {})
    return Run(
        folder,
        config=read(CONFIG, lambda file: yaml.safe_load(_text(file)), {}),
        config_text=read(CONFIG, _text, ""),
        result=result,
        facts=read(FACTS, _json, {}),
        metrics=_with_start(metrics, result.get("evaluations_before")),
        samples=[sample for sample in read(SAMPLES, _json, []) if isinstance(sample, Mapping)],
        worst=read(WORST, _json, {}),
        rewarded=read(REWARDED, _json, {}),
        teacher=read(TEACHER, _rows, []),
        has_adapter=(folder / ADAPTER).is_file(),
        problems=tuple(problems),
    )


def _altered(folder: Path) -> list[str]:
    """Return a line for each file that exists and differs from the manifest of the run."""
    shown = (CONFIG, METRICS, RESULT, FACTS, SAMPLES, WORST, REWARDED, TEACHER)
    try:
        problems = differences(folder, [name for name in shown if (folder / name).is_file()])
    except IntegrityError as error:
        return [str(error).splitlines()[0]]
    return [f"{problem} since the run wrote it" for problem in problems]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs. Raises InputError with every folder that holds none."""
    runs, wrong = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("\n".join(wrong))
    return runs


def read_metrics(file: Path) -> dict[str, Series]:
    """Read every metric of metrics.jsonl by name. Raises OSError.

    The last line of a step counts (a resumed run repeats steps). Incomplete lines and non-finite values are left out.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for text in _text(file).split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            for name, value in line.items():
                if name != "step" and is_figure(value):
                    found[name][line["step"]] = float(value)
    return {name: Series(*map(list, zip(*sorted(values.items()), strict=True))) for name, values in found.items()}


def _with_start(metrics: dict[str, Series], before: Any) -> dict[str, Series]:
    """Put an evaluation of the untrained model at step 0 of its metrics."""
    known = before if isinstance(before, Mapping) else {}
    return {
        name: Series([0, *series.steps], [float(known[name]), *series.values])
        if is_figure(known.get(name)) and series.steps[0] > 0
        else series
        for name, series in metrics.items()
    }


def is_figure(value: Any) -> bool:
    """Return whether a value is a number that can be drawn."""
    # False for nan; a Python integer can exceed every float.
    return type(value) in (int, float) and abs(value) < 1e300


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _json(file: Path) -> Any:
    return json.loads(_text(file))


def _rows(file: Path) -> list[list[str]]:
    """Return the rows of a markdown table, its head first."""
    lines = [line.strip() for line in _text(file).splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not all(set(cell) <= set("-: ") for cell in row)]
