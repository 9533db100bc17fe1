"""A run's results as text: cards, predictions beside measurements, the environment, and commands to continue with."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.data.media.media import Media
from finetune.data.media.preview import Preview, preview
from finetune.evaluation.metric_names import ANSWER_METRICS
from finetune.report.run import Run, is_figure
from finetune.system.format import format_bytes, format_duration


def number(value: float) -> str:
    """Format a number with four significant digits."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def with_interval(figures: Mapping[str, Any], name: str) -> str:
    """Format a figure with the ends of its 95 % interval, which are called `NAME_low` and `NAME_high` if there are any.

    Returns: an empty text without the figure.
    """
    value, *ends = (figures.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if not is_figure(value):
        return ""
    return f"{value:.4g}" + (f" [{ends[0]:.4g}, {ends[1]:.4g}]" if all(map(is_figure, ends)) else "")


share, whole = "{:.1%}".format, "{:,.0f}".format


@dataclass(frozen=True)
class Figure:
    """A number of result.json; `lower_is_better` is None if no direction is better."""

    name: str
    label: str
    form: Callable[[float], str]
    lower_is_better: bool | None


FIGURES = (
    Figure("reward_after", "held-out reward", number, False),
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
_LARGEST_LOSS = 700.0  # exp() of more is no number
# With rewards the one is about 0, and the other the negative reward.
_LOSSES = ("eval_loss", "final_loss")
_LONGEST_TEXT = 1000
_ACTIONS = {"warn": "warning", "recover": "trained on the teacher alone", "stop": "run stopped"}
_BEFORE = {
    "reward_after": "reward_before",
    "eval_loss": "eval_loss_before",
    "exact_match_after": "exact_match_before",
    "teacher_kl_after": "teacher_kl_before",
}


def figure_named(name: str) -> Figure:
    """Return one of FIGURES, or the figure of an evaluation set (`eval/NAME/accuracy`)."""
    known = {figure.name: figure for figure in FIGURES}
    metric = name.rpartition("/")[2]
    is_share = metric in ("accuracy", "teacher_agreement", "reward_accuracy", *ANSWER_METRICS)
    higher_is_better = is_share or metric in ("reward", "reward_margin")
    return known.get(name) or Figure(name, name, share if is_share else number, not higher_is_better)


def headline(run: Run) -> str:
    """Return the base, its storage, the adapter and the objective, as far as they are known."""
    base, storage, rank = run.setting("model.name"), run.setting("quant.type"), run.setting("lora.rank")
    objectives = [run.setting(key) for key in ("distill.objective", "preference.objective", "reward.loss")]
    rewards = run.setting("reward.functions")
    parts = [
        f"{base} in {storage}" if base and storage else str(base or ""),
        f"adapters of rank {rank}" if rank else "",
        *(str(objective) for objective in objectives if objective not in (None, "none")),
        f"rewards: {', '.join(map(str, rewards))}" if rewards and isinstance(rewards, Mapping) else "",
    ]
    return ", ".join(filter(None, parts))


def cards(run: Run) -> list[tuple[str, str, str]]:
    """Return label, value and detail of each measured result; of a run without a result, those of its last step."""
    found = []
    for figure in FIGURES:
        value = figure_of(run, figure)
        if value is None or (value == 0 and figure.name == "peak_bytes"):
            continue
        before = run.figure(_BEFORE[figure.name]) if figure.name in _BEFORE else None
        detail = "" if before is None else f"{figure.form(before)} before"
        if figure.name == "reward_after":
            detail = "; ".join(filter(None, (detail, _interval(run))))
        if figure.name == "final_loss" and (first := run.metrics.get("loss")) and first.steps[0] == 1:
            detail = f"{number(first.values[0])} at step 1"
        found.append((figure.label, figure.form(value), detail))
        if figure.name == "eval_loss":
            found += _of_held_out(run)
    name, label = ("train/reward", "reward") if learns_from_rewards(run) else ("loss", "loss")
    last = run.metrics.get(name)
    if found or last is None:
        return found
    return [("steps so far", whole(last.steps[-1]), ""), (f"training {label}", number(last.values[-1]), "")]


def figure_of(run: Run, figure: Figure) -> float | None:
    """Return the value of a figure; None for a loss that says nothing of its run."""
    return None if figure.name in _LOSSES and learns_from_rewards(run) else run.figure(figure.name)


def learns_preferences(run: Run) -> bool:
    """Return whether the loss of a run is one of preferences, not of tokens."""
    return run.setting("preference.objective") not in (None, "none")


def learns_from_rewards(run: Run) -> bool:
    """Return whether rewards judge the answers of a run: what it lowers is no loss to look at."""
    return run.setting("reward.loss") not in (None, "none")


def _interval(run: Run) -> str:
    """Return the 95 % interval of the reward on the only held-out set, or an empty text."""
    found = run.result.get("evaluations")
    evaluations: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    names = [name for name in evaluations if name.endswith("/reward")]
    ends = with_interval(evaluations, names[0]).partition(" ")[2] if len(names) == 1 else ""
    return f"95 % interval {ends}" if ends else ""


def _of_held_out(run: Run) -> list[tuple[str, str, str]]:
    """Return the cards beside the held-out loss: what preferences changed, or the perplexity at the mean loss."""
    if learns_preferences(run):
        shown = (
            ("reward_accuracy", "held-out pairs ranked right", share),
            ("reference_kl", "KL from the reference, nats per token", number),
        )
        return [(label, form(mean), "") for metric, label, form in shown for mean in _means(run, metric)]
    losses = [loss for loss in _means(run, "loss") if abs(loss) < _LARGEST_LOSS]
    return [("held-out perplexity", number(math.exp(losses[0])), "")] if losses else []


def _means(run: Run, metric: str) -> list[float]:
    """Return the mean of a metric over the held-out sets, in a list that is empty without one."""
    evaluations = run.result.get("evaluations")
    names = map(str, evaluations) if isinstance(evaluations, Mapping) else ()
    found = [run.figure(name) for name in names if name.startswith("eval/") and name.endswith(f"/{metric}")]
    known = [value for value in found if value is not None]
    return [fmean(known)] if known else []


def origin(run: Run) -> str:
    """Return start, duration and hardware of a run, as far as they are known."""
    found, started, duration = run.facts.get("hardware"), run.facts.get("started"), run.figure("duration_seconds")
    try:
        start = f"started {datetime.fromisoformat(str(started)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        start = ""
    machine: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    counts = [f"{name}={machine[name]}" for name in ("cores", "threads") if name in machine and "gpu" not in machine]
    name = [str(machine[kind]) for kind in ("gpu", "cpu") if machine.get(kind)][:1]
    parts = [start, "" if duration is None else f"took {format_duration(duration)}", ", ".join([*name, *counts])]
    return " · ".join(filter(None, parts))


def rewarded_answers(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return headings, and the held-out answers with the best and the worst rewards."""
    found = []
    for key, heading in (("best", "Highest rewards"), ("worst", "Lowest rewards")):
        rows = run.rewarded.get(key)
        shown = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
        cut = [{name: _cut(text) if isinstance(text, str) else text for name, text in row.items()} for row in shown]
        found.append((heading, cut))
    return [(heading, rows) for heading, rows in found if rows]


def worst_answers(run: Run) -> tuple[str, list[dict[str, Any]]]:
    """Return a sentence about the wrong answers, and the worst of them: prompt, expected, after, media."""
    rows, answered, wrong = (run.worst.get(name) for name in ("rows", "answered", "wrong"))
    shown = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    if not (shown and is_figure(answered) and is_figure(wrong)):
        return "", []
    which = "All wrong answers" if len(shown) == wrong else f"The {len(shown)} least like the expected answers"
    text = f"{wrong:,} of {answered:,} held-out answers differ from the expected ones. {which}, worst first."
    texts = ("prompt", "expected", "after")
    return text, [
        {key: _cut(str(row.get(key, ""))) for key in texts} | {"media": row.get("media", [])} for row in shown
    ]


def with_previews(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return answers with a preview of each file in place of its record; a damaged record is left out."""
    return [{**answer, "media": _previews(answer.get("media"))} for answer in answers]


def _previews(records: Any) -> list[Preview]:
    found = []
    for record in records if isinstance(records, list) else ():
        with suppress(TypeError, ValueError, LookupError, AttributeError):
            found.append(preview(Media.from_dict(record)))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def predictions(run: Run) -> list[tuple[str, ...]]:
    """Return the predictions that were measured: quantity, prediction, measurement, relative error, source of rates."""
    source = str(run.value("predicted_time_source") or "").partition(",")[0]
    rows: list[tuple[str, ...]] = []
    for label, name, form, note in (
        ("peak memory", "peak_bytes", format_bytes, "computed"),
        ("training time", "train_seconds", format_duration, source),
    ):
        predicted, measured = run.figure(f"predicted_{name}"), run.figure(name)
        if predicted and measured:
            rows.append((label, form(predicted), form(measured), f"{predicted / measured - 1:+.1%}", note))
    return rows


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


def halvings(run: Run) -> list[tuple[str, str]]:
    """Return the steps that were repeated because memory ran out, each with its new micro-batch."""
    found = run.result.get("halvings")
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    return [(str(entry.get("step", "")), str(entry.get("micro_batch", ""))) for entry in entries]


def environment(run: Run) -> list[tuple[str, str]]:
    """Return the entries of run.json, nested ones with both names."""

    def walk(node: Any, key: str) -> list[tuple[str, str]]:
        if isinstance(node, Mapping):
            return [row for name, inner in node.items() for row in walk(inner, f"{key} {name}".strip())]
        return [(re.sub("^(versions|hardware) ", "", key).replace("_", " "), "none" if node is None else str(node))]

    return walk(run.facts, "")


def resume_command(folder: Path, reward_words: Sequence[str] = ()) -> str:
    """Return the line that continues the run of a folder.

    reward_words: of the user's functions that judge its answers, which no config holds.
    """
    words = ["finetune", "train", f"config={folder / 'config.yaml'}", "train.resume=auto"]
    if reward_words:
        listed = reward_words[0] if len(reward_words) == 1 else f"[{', '.join(reward_words)}]"
        words.append(f"reward_function={listed}")
    return shlex.join(words)


def next_commands(run: Run) -> list[tuple[str, str]]:
    """Return the purpose and the line of each command that continues from this run."""
    folder = shlex.quote(str(run.folder))
    resume = ("resume", resume_command(run.folder, run.reward_words))
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
