"""Tasks of lm-evaluation-harness on a model that is in memory, in 4 bit and with its adapter as they are.

A task's YAML file may name Python functions (`!function`), which the harness runs: it is as trusted as a program, and
only the command line can name one.
Source: lm-evaluation-harness 0.4, HFLM around a loaded model and simple_evaluate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune.errors import ConfigError, MissingExtra
from finetune.evaluation.gap_table import TaskFigures
from finetune.evaluation.intervals import Estimate

# Of a normal distribution, which the harness's standard errors are for.
_TWO_SIDED_95 = 1.959964


def load_tasks(words: Sequence[str]) -> list[Any]:
    """The tasks with their rows. words: YAML files, or names that the harness knows.

    Raises: MissingExtra without the harness; ConfigError for tasks that are none, or whose rows cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra('tasks= needs: pip install "finetune-qlora[eval]"') from error
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    if lost := [file for file in files if not Path(file).expanduser().is_file()]:
        raise ConfigError(f"tasks: there is no file {', '.join(lost)}")
    with _silent():
        # Its index of all names takes seconds.
        manager = TaskManager(include_defaults=len(files) < len(words))
        named = set(words) - set(files)
        if unknown := sorted(named - set(manager.all_tasks)):
            raise ConfigError(
                f"tasks: {', '.join(unknown)}: the harness has no such task; `lm-eval ls tasks` lists them, and a task "
                "of your own is its YAML file"
            )
        tasks = []
        for word in words:
            try:
                loaded = manager.load([str(Path(word).expanduser()) if word in files else word])
            except Exception as error:
                raise ConfigError(f"tasks: {word} cannot be loaded: {type(error).__name__}: {error}") from error
            tasks += loaded["tasks"].values()
    return tasks


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    limit: int | None,
    batch_size: int,
    as_chat: bool,
) -> list[TaskFigures]:
    """Every metric of every task. limit: rows of each. as_chat: ask through the tokenizer's template."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _silent():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=False,
            apply_chat_template=as_chat,
        )  # fmt: skip
    assert found is not None, "one process is rank 0"
    return [
        _figure(task, metric, float(value), figures, found["n-samples"][task]["effective"])
        for task, figures in found["results"].items()
        if task in found["n-samples"]
        for metric, value in figures.items()
        if "," in metric and "_stderr," not in metric and isinstance(value, int | float)
    ]


def _figure(task: str, metric: str, value: float, figures: dict[str, Any], rows: int) -> TaskFigures:
    name, _, filtered = metric.partition(",")
    error = figures.get(f"{name}_stderr,{filtered}")
    half = _TWO_SIDED_95 * error if isinstance(error, int | float) and math.isfinite(error) else 0.0
    label = name if filtered == "none" else f"{name} ({filtered})"
    return TaskFigures(task, label, int(rows), Estimate(value, value - half, value + half))


@contextmanager
def _silent() -> Iterator[None]:
    """Without the harness's log lines: what goes wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
