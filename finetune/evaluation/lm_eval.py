"""Run tasks of lm-evaluation-harness on a model in memory, quantized and with its adapter.

Security: a task's YAML file may name Python functions (`!function`), which the harness runs. Only the command line can
name such a file.
Source: lm-evaluation-harness 0.4, HFLM with a loaded model.
"""

from __future__ import annotations

import io
import logging
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune.config.command_options import EvalOptions
from finetune.evaluation.gap_table import TaskFigures
from finetune.evaluation.intervals import NORMAL_95, Bootstrap, Estimate, share_of
from finetune.system.errors import ConfigError, FinetuneError, MissingExtra

_RESAMPLES = 1000
_FEWSHOT_SEED = 1234  # the default of the harness's command line


def load_tasks(words: Sequence[str]) -> Any:
    """Load tasks with their rows. words: YAML files, or names of the harness's tasks.

    Raises:
        MissingExtra: the harness is not installed.
        ConfigError: a task does not exist, or its rows cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra('tasks= needs: pip install "finetune-qlora[eval]"') from error
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    if missing := [file for file in files if not Path(file).expanduser().is_file()]:
        raise ConfigError(f"tasks: no such file, found {', '.join(missing)}")
    with _silent():
        # The index of all names takes seconds.
        manager = TaskManager(include_defaults=len(files) < len(words))
        named = set(words) - set(files)
        if unknown := sorted(named - set(manager.all_tasks)):
            raise ConfigError(
                f"tasks: unknown to the harness, found {', '.join(unknown)}\n"
                "help: lm-eval ls tasks lists all names; pass the YAML file of your own task"
            )
        try:
            loaded = manager.load([str(Path(word).expanduser()) if word in files else word for word in words])
        except Exception as error:
            raise ConfigError(f"tasks: cannot be loaded: {type(error).__name__}: {error}") from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def run_tasks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Any, options: EvalOptions
) -> list[TaskFigures]:
    """Evaluate a model on tasks from `load_tasks`, and return every metric of every task.

    Raises:
        FinetuneError: the harness fails, for example at an unknown metric.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _silent():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)  # type: ignore[arg-type]
        settings = {"limit": options.limit, "apply_chat_template": options.tasks_as_chat, "bootstrap_iters": 0}
        try:
            # simple_evaluate also searches for a git repository and reseeds all random generators.
            found = evaluate(lm=wrapped, task_dict=tasks, log_samples=True, **settings)
        except (TypeError, LookupError, ValueError, AttributeError, AssertionError, ArithmeticError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise FinetuneError(
                f"tasks: lm-evaluation-harness fails on {', '.join(sorted(tasks['tasks']))}: {type(error).__name__}: "
                f"{error} ({Path(where.filename).name}:{where.lineno})\nhelp: check its metrics, filters and fields"
            ) from error
    assert found is not None, "one process is rank 0"
    return [
        _figure(task, metric, float(value), found["samples"][task], figures)
        for task, figures in found["results"].items()
        if task in found["samples"]
        for metric, value in figures.items()
        if "," in metric and "_stderr," not in metric and isinstance(value, int | float)
    ]


def _figure(
    task: str, metric: str, value: float, samples: Sequence[dict[str, Any]], figures: dict[str, Any]
) -> TaskFigures:
    name, _, filtered = metric.partition(",")
    label = name if filtered == "none" else f"{name} ({filtered})"
    of_rows = [sample.get(name) for sample in samples if sample.get("filter") == filtered]
    if of_rows and all(isinstance(one, int | float) for one in of_rows):
        values_R = np.array(of_rows, dtype=np.float64)
        if math.isclose(values_R.mean(), value):  # the metric is the mean of its rows
            figure = Bootstrap(len(values_R), _RESAMPLES, 0).ratio(values_R, np.ones(len(values_R)))
            return TaskFigures(task, label, len(values_R), share_of(values_R, figure))
    error = figures.get(f"{name}_stderr,{filtered}")
    half = NORMAL_95 * error if isinstance(error, int | float) and math.isfinite(error) else 0.0
    return TaskFigures(task, label, len(of_rows), Estimate(value, value - half, value + half))


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress log lines of the harness, and its progress bars outside a terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
