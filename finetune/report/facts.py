"""A run's results as text: cards, predictions beside measurements, the environment, and commands to continue with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.report.run import Run, is_figure
from finetune.system.format import format_bytes, format_duration


def number(value: float) -> str:
    """Format a number with four significant digits."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


share, whole = "{:.1%}".format, "{:,.0f}".format


@dataclass(frozen=True)
class Figure:
    """A number of result.json; `lower_is_better` is None if no direction is better."""

    name: str
    label: str
    form: Callable[[float], str]
    lower_is_better: bool | None


FIGURES = (
    Figure("eval_loss", "held-out loss", number, True),
    Figure("exact_match_after", "held-out exact match", share, False),
    Figure("teacher_kl_after", "KL to the teacher, nats", number, True),
    Figure("recovered", "KL recovered", share, False),
    Figure("final_loss", "training loss", number, True),
    Figure("steps", "steps", whole, None),
    Figure("target_tokens", "target tokens", whole, None),
    Figure("train_seconds", "training time", format_duration, True),
    Figure("tokens_per_second", "tokens/s", whole, False),
    Figure("peak_bytes", "peak memory", format_bytes, True),
)
_ACTIONS = {"warn": "warning", "recover": "trained on the teacher alone", "stop": "run stopped"}
_BEFORE = {"exact_match_after": "exact_match_before", "teacher_kl_after": "teacher_kl_before"}


def figure_named(name: str) -> Figure:
    """Return one of FIGURES, or the figure of an evaluation set (`eval/NAME/accuracy`)."""
    known = {figure.name: figure for figure in FIGURES}
    higher_is_better = name.rpartition("/")[2] in ("accuracy", "teacher_agreement")
    return known.get(name) or Figure(name, name, share if higher_is_better else number, not higher_is_better)


def headline(run: Run) -> str:
    """Return the base, its storage, the adapter and the objective, as far as they are known."""
    base, storage, rank = run.setting("model.name"), run.setting("quant.type"), run.setting("lora.rank")
    objective = run.setting("distill.objective")
    parts = [
        f"{base} in {storage}" if base and storage else str(base or ""),
        f"adapters of rank {rank}" if rank else "",
        str(objective) if objective not in (None, "none") else "",
    ]
    return ", ".join(filter(None, parts))


def cards(run: Run) -> list[tuple[str, str, str]]:
    """Return label, value and detail of each measured result; for a run without a result, its last step and loss."""
    found = []
    for figure in FIGURES:
        value = run.figure(figure.name)
        if value is None or (value == 0 and figure.name == "peak_bytes"):
            continue
        before = run.figure(_BEFORE[figure.name]) if figure.name in _BEFORE else None
        found.append((figure.label, figure.form(value), "" if before is None else f"{figure.form(before)} before"))
    loss = run.metrics.get("loss")
    if found or loss is None:
        return found
    return [("steps so far", whole(loss.steps[-1]), ""), ("training loss", number(loss.values[-1]), "")]


def predictions(run: Run) -> list[tuple[str, ...]]:
    """Return the planner's predictions that were measured: quantity, prediction, measurement, relative error."""
    predicted, measured = run.figure("predicted_peak_bytes"), run.figure("peak_bytes")
    if not predicted or not measured:
        return []
    error = f"{predicted / measured - 1:+.1%}"
    return [("peak memory", format_bytes(predicted), format_bytes(measured), error)]


def breaches(run: Run) -> list[tuple[str, ...]]:
    """Return the breaches of the guard's limit: step, nats from the teacher, action, nats after it."""
    found = run.result.get("breaches")
    rows: list[tuple[str, ...]] = []
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, Mapping):
            nats: list[Any] = [entry.get(key) for key in ("teacher_kl", "after")]
            before, after = (number(value) if is_figure(value) else "" for value in nats)
            rows.append((str(entry.get("step", "")), before, _ACTIONS.get(str(entry.get("action")), ""), after))
    return rows


def environment(run: Run) -> list[tuple[str, str]]:
    """Return the entries of run.json, nested ones with both names."""

    def walk(node: Any, key: str) -> list[tuple[str, str]]:
        if isinstance(node, Mapping):
            return [row for name, inner in node.items() for row in walk(inner, f"{key} {name}".strip())]
        return [(key.removeprefix("versions ").replace("_", " "), "none" if node is None else str(node))]

    return walk(run.facts, "")


def resume_command(folder: Path) -> str:
    """Return the line that continues the run of a folder."""
    return f"finetune train config={shlex.quote(str(folder / 'config.yaml'))} train.resume=auto"


def next_commands(run: Run) -> list[tuple[str, str]]:
    """Return the purpose and the line of each command that continues from this run."""
    folder = shlex.quote(str(run.folder))
    resume = ("resume", resume_command(run.folder))
    if not run.has_adapter:
        return [resume]
    found = [
        ("chat", f"finetune chat adapter={folder}"),
        ("compare with the base", f"finetune eval adapter={folder}"),
        ("merge into the base", f"finetune merge adapter={folder} out=merged"),
        ("export for llama.cpp", f"finetune export adapter={folder} format=gguf out=gguf"),
        ("compare with another run", f"finetune compare {folder} OTHER_RUN out=compare.html"),
    ]
    return found if run.status == "finished" else [resume, *found]
