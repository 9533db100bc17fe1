"""Summaries of a finished run: the last lines on the console, and the adapter's model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import __version__
from finetune.config.compose import to_yaml
from finetune.config.schema import RunConfig
from finetune.data.sources.paths import is_on_hub
from finetune.evaluation.generation import Answer
from finetune.models.families import FAMILIES, QWEN25, ModelFamily, shape_of
from finetune.report.facts import with_interval
from finetune.system.format import format_bytes, format_duration, format_estimate
from finetune.training.run_folder import RunResult

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
_LONGEST_TEXT = 300
_MOST_BREACHES = 5
_LONGEST_QUESTION = 100


def describe_result(result: RunResult, before: Sequence[Answer], after: Sequence[Answer]) -> str:
    """Describe a run in plain text: figures, sample answers, and the folder of the adapter.

    before: of the untrained model, in the order of `after`.
    """
    duration = format_duration(result.train_seconds)
    lines = ["", f"Trained {result.steps} steps on {result.target_tokens:,} target tokens in {duration}"]
    peak = format_bytes(result.peak_bytes)
    if result.predicted_peak_bytes is not None:
        peak += f" measured, {format_bytes(result.predicted_peak_bytes)} predicted"
    breaches = [f"step {each['step']} ({each['teacher_kl']:.4f}, {each['action']})" for each in result.breaches]
    time = ""
    if result.predicted_train_seconds is not None:
        predicted = format_estimate(result.predicted_train_seconds)
        time = f"{duration} measured, {predicted} predicted ({result.predicted_time_source})"
    training_loss, held_out_loss = _losses(result, ".4f")
    figures = {
        "training loss": training_loss,
        "held-out loss": held_out_loss,
        **_rewards(result),
        "held-out exact match": _change(result.exact_match_before, result.exact_match_after, ".1%"),
        "KL from teacher": _change(result.teacher_kl_before, result.teacher_kl_after, ".5f")
        + ("" if result.recovered is None else f", recovered {result.recovered:.1%}"),
        "guard breaches": ", ".join(breaches[:_MOST_BREACHES]) + (" …" if len(breaches) > _MOST_BREACHES else ""),
        "micro-batch": ", ".join(f"{each['micro_batch']} from step {each['step']}" for each in result.halvings),
        "speed": _number(result.tokens_per_second, ",.0f", " tokens/s"),
        "training time": time,
        "peak memory": peak,
    }
    lines += [f"  {name:<22}{value}" for name, value in figures.items() if value]
    for first, answer in zip(before, after, strict=False):
        lines += ["", _shown("prompt", answer.prompt)]
        lines += [] if answer.reward is not None and not answer.expected else [_shown("expected", answer.expected)]
        lines += [_shown("before", first.given, first.reward), _shown("after", answer.given, answer.reward)]
    lines += ["", f"adapter: {result.adapter}", f"next:    finetune chat adapter={result.adapter}"]
    # A question that the adapter has learned to answer, to paste into the chat.
    if question := next((answer.prompt for answer in before if _fits_on_a_line(answer)), None):
        lines.append(f"ask it:  {question}")
    return "\n".join(lines)


def _shown(name: str, text: str, reward: float | None = None) -> str:
    """Format a text on one line, with control characters escaped."""
    cut = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"
    return f"  {name:<10}{cut!r}" + ("" if reward is None else f"  reward {reward:.4g}")


def _losses(result: RunResult, spec: str) -> tuple[str, str]:
    """Return the training and the held-out loss; empty with rewards: the one is about 0, the other their negative."""
    if result.reward_after is not None:
        return "", ""
    return _number(result.final_loss, spec), _number(result.eval_loss, spec)


def _rewards(result: RunResult) -> dict[str, str]:
    """Describe the reward on every held-out set before and after training; empty for a run without rewards."""
    names = [name for name in result.evaluations if name.startswith("eval/") and name.endswith("/reward")]
    described = {}
    for name in names:
        measured = {"before": result.evaluations_before, "after": result.evaluations}
        texts = {when: with_interval(figures, name) for when, figures in measured.items()}
        label = "held-out reward" + (f", {name[5:-7]}" if len(names) > 1 else "")
        described[label] = ", ".join(f"{text} {when}" for when, text in texts.items() if text)
    return described


def _fits_on_a_line(answer: Answer) -> bool:
    text = answer.prompt
    return not answer.media and 0 < len(text) <= _LONGEST_QUESTION and text.isprintable() and not text.startswith("/")


def model_card(cfg: RunConfig, result: RunResult) -> str:
    """Build the README.md of an adapter folder: hub metadata, loading, figures, settings."""
    training_loss, held_out_loss = _losses(result, ".4g")
    figures = {
        "steps": f"{result.steps:,}",
        "target tokens": f"{result.target_tokens:,}",
        "final training loss": training_loss,
        "held-out loss": held_out_loss,
        **{f"{name}, with its 95 % interval": text for name, text in _rewards(result).items()},
        "held-out exact match before": _number(result.exact_match_before, ".1%"),
        "held-out exact match after": _number(result.exact_match_after, ".1%"),
        "KL from the teacher before, nats per target": _number(result.teacher_kl_before, ".4g"),
        "KL from the teacher after, nats per target": _number(result.teacher_kl_after, ".4g"),
        "recovered": _number(result.recovered, ".1%"),
    }
    family = _family(cfg)
    # The names of an adapter are those of this class, which may be a part of the checkpoint.
    opener = family.model if family.towers else family.opened_by
    revision = f" at revision `{cfg.model.revision}`" if cfg.model.revision else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items() if value)
    return f"""---
{_card_data(cfg, result).to_yaml()}
---

# {cfg.name}

A LoRA adapter for `{cfg.model.name}`{revision}, trained with finetune {__version__} over the base in {cfg.quant.type}.

```python
from peft import PeftModel
from transformers import {opener}

model = PeftModel.from_pretrained({opener}.from_pretrained("{cfg.model.name}"), "<this folder>")
```

| | |
|---|---|
{rows}

## Settings that differ from the defaults

```yaml
{to_yaml(cfg, changed_only=True).strip()}
```
"""


def _family(cfg: RunConfig) -> ModelFamily:
    """Return the family of the base; that of Qwen2.5 for a hub id that no family knows."""
    shape = shape_of(cfg.model.name)
    return QWEN25 if shape is None else FAMILIES[shape["model_type"]]


def _card_data(cfg: RunConfig, result: RunResult) -> ModelCardData:
    """Return what the hub reads from a card. License and language are the owner's to add: no setting has them."""
    from huggingface_hub import EvalResult, ModelCardData

    base, sources = cfg.model.name, [source for source in cfg.data.train if is_on_hub(source)]
    on_hub = not Path(base).exists()
    return ModelCardData(
        library_name="peft",
        base_model=base if on_hub else None,
        pipeline_tag=_family(cfg).task if on_hub else None,
        tags=["lora", f"base_model:adapter:{base}"] if on_hub else ["lora"],
        datasets=list(dict.fromkeys(source.path for source in sources)) or None,
        model_name=cfg.name,
        eval_results=[
            EvalResult("text-generation", dataset, dataset, metric, value)
            for name, value in result.evaluations.items()
            if name.startswith("eval/")
            for dataset, metric in [name.removeprefix("eval/").rsplit("/", 1)]
        ]
        or None,
    )


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{spec}}{unit}"


def _change(before: float | None, after: float | None, spec: str) -> str:
    return "" if before is None or after is None else f"{before:{spec}} before, {after:{spec}} after"
