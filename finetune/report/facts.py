"""A run's figures in words: cards for the top, what was predicted beside what was measured, where it ran, what next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune.report.run import Run
from finetune.report.series import is_figure


class Card(NamedTuple):
    label: str
    value: str
    detail: str = ""


class Prediction(NamedTuple):
    """error: of the prediction, as a signed share."""

    what: str
    predicted: str
    measured: str
    error: str


class Command(NamedTuple):
    what: str
    line: str


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def share(value: float) -> str:
    return f"{value:.1%}"


def size(value_bytes: float) -> str:
    return f"{value_bytes / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """As 2 h 05 min, 4 min 10 s, or 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def whole(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Figure:
    """A number of result.json. lower_is_better: None where neither is."""

    name: str
    label: str
    form: Callable[[float], str]
    lower_is_better: bool | None


FIGURES = (
    Figure("eval_loss", "held-out loss", number, True),
    Figure("exact_match_after", "held-out exact match", share, False),
    Figure("teacher_kl_after", "nats from the teacher", number, True),
    Figure("recovered", "of that regained", share, False),
    Figure("final_loss", "training loss", number, True),
    Figure("steps", "steps", whole, None),
    Figure("target_tokens", "target tokens", whole, None),
    Figure("train_seconds", "training time", duration, True),
    Figure("tokens_per_second", "tokens a second", whole, False),
    Figure("peak_bytes", "peak memory", size, True),
)
_ACTIONS = {"warn": "a warning", "recover": "it learned from the teacher alone", "stop": "the run was ended"}
_BEFORE = {"exact_match_after": "exact_match_before", "teacher_kl_after": "teacher_kl_before"}


def figure_named(name: str) -> Figure:
    """One of FIGURES, or an evaluation set's own (`eval/NAME/accuracy`)."""
    known = {figure.name: figure for figure in FIGURES}
    last = name.rpartition("/")[2]
    more = last in ("accuracy", "teacher_agreement")
    return known.get(name) or Figure(name, name, share if more else number, not more)


def headline(run: Run) -> str:
    """The base, how it is stored, the adapter and the objective, as far as they are known."""
    base, storage, rank = run.setting("model.name"), run.setting("quant.type"), run.setting("lora.rank")
    objective = run.setting("distill.objective")
    parts = [
        f"{base} in {storage}" if base and storage else str(base or ""),
        f"adapters of rank {rank}" if rank else "",
        str(objective) if objective not in (None, "none") else "",
    ]
    return ", ".join(filter(None, parts))


def cards(run: Run) -> list[Card]:
    """What a user looks for first; only what was measured."""
    found = []
    for figure in FIGURES:
        value = run.figure(figure.name)
        if value is None or (value == 0 and figure.name == "peak_bytes"):
            continue
        before = run.figure(_BEFORE[figure.name]) if figure.name in _BEFORE else None
        found.append(Card(figure.label, figure.form(value), "" if before is None else f"{figure.form(before)} before"))
    return found or _from_metrics(run)


def _from_metrics(run: Run) -> list[Card]:
    """Of a run that has no result yet."""
    loss = run.metrics.get("loss")
    if loss is None:
        return []
    return [Card("steps so far", whole(loss.steps[-1])), Card("training loss", number(loss.values[-1]))]


def predictions(run: Run) -> list[Prediction]:
    """What the planner foretold beside what came of it, where both are known."""
    predicted, measured = run.figure("predicted_peak_bytes"), run.figure("peak_bytes")
    if not predicted or not measured:
        return []
    return [Prediction("peak memory", size(predicted), size(measured), f"{predicted / measured - 1:+.1%}")]


class Breach(NamedTuple):
    """A time that the guard's limit was passed. distance, after: nats a target from the teacher."""

    step: str
    distance: str
    action: str
    after: str


def breaches(run: Run) -> list[Breach]:
    """What the guard saw beyond its limit, in order."""
    found = run.result.get("breaches")
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    return [
        Breach(
            str(entry.get("step", "")),
            _distance(entry.get("teacher_kl")),
            _ACTIONS.get(str(entry.get("action")), ""),
            _distance(entry.get("after")),
        )
        for entry in entries
    ]


def _distance(value: Any) -> str:
    return number(value) if is_figure(value) else ""


def environment(run: Run) -> list[tuple[str, str]]:
    """run.json as a list of facts, nested ones by dotted name."""

    def walk(node: Any, key: str) -> list[tuple[str, str]]:
        if isinstance(node, Mapping):
            return [row for name, inner in node.items() for row in walk(inner, f"{key} {name}".strip())]
        return [(key.removeprefix("versions ").replace("_", " "), "none" if node is None else str(node))]

    return walk(run.facts, "")


def next_commands(run: Run) -> list[Command]:
    """What to type, with this run's folder in it."""
    folder = shlex.quote(str(run.folder))
    go_on = Command(
        "go on where it stopped", f"finetune train config={shlex.quote(f'{run.folder}/config.yaml')} train.resume=auto"
    )
    if not run.has_adapter:
        return [go_on]
    found = [
        Command("talk to it", f"finetune chat adapter={folder}"),
        Command("measure it beside its base", f"finetune eval adapter={folder}"),
        Command("put it into the base's weights", f"finetune merge adapter={folder} out=merged"),
        Command("write it for llama.cpp", f"finetune export adapter={folder} format=gguf out=gguf"),
        Command("see it beside another run", f"finetune compare {folder} OTHER_RUN out=compare.html"),
    ]
    return found if run.status == "finished" else [go_on, *found]
