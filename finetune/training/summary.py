"""The closing words of a run on the console."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.evaluation.generation import Answer
from finetune.training.run_folder import RunResult

_LONGEST_TEXT = 300
_MOST_BREACHES = 5


def describe_result(result: RunResult, before: Sequence[Sequence[str]], after: Sequence[Answer]) -> str:
    """Figures, samples before and after, and where the adapter lies; plain text for stdout.

    before: [prompt, expected, given] of the untrained model, in the order of `after`.
    """
    minutes, seconds = divmod(round(result.train_seconds), 60)
    lines = ["", f"Trained {result.steps} steps on {result.target_tokens:,} target tokens in {minutes}:{seconds:02d}"]
    figures = {
        "training loss": _number(result.final_loss),
        "held-out loss": _number(result.eval_loss),
        "held-out exact match": _from_to(result.exact_match_before, result.exact_match_after),
        "nats from the teacher": _recovery(result),
        "beyond guard.max": _breaches(result),
        "speed": f"{result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else None,
        "peak memory": _peak(result),
    }
    lines += [f"  {name:<22}{value}" for name, value in figures.items() if value is not None]
    for (prompt, expected, given), answer in zip(before, after, strict=False):
        texts = {"asked": prompt, "expected": expected, "before": given, "after": answer.given}
        lines += ["", *(f"  {name:<10}{_shown(text)}" for name, text in texts.items())]
    return "\n".join([*lines, "", f"adapter: {result.adapter}", f"next:    finetune chat adapter={result.adapter}"])


def _peak(result: RunResult) -> str:
    """Of the rank that says it."""
    measured = f"{result.peak_bytes / 2**30:.2f} GiB"
    if result.predicted_peak_bytes is None:
        return measured
    return f"{measured} measured, {result.predicted_peak_bytes / 2**30:.2f} GiB predicted"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _recovery(result: RunResult) -> str | None:
    before, after = result.teacher_kl_before, result.teacher_kl_after
    if before is None or after is None:
        return None
    regained = "" if result.recovered is None else f": {result.recovered:.1%} regained"
    return f"{before:.5f} before, {after:.5f} after{regained}"


def _breaches(result: RunResult) -> str | None:
    found = [f"step {breach['step']} ({breach['teacher_kl']:.4f}, {breach['action']})" for breach in result.breaches]
    return ", ".join(found[:_MOST_BREACHES]) + (" …" if len(found) > _MOST_BREACHES else "") if found else None


def _from_to(before: float | None, after: float | None) -> str | None:
    return None if before is None or after is None else f"{before:.1%} before, {after:.1%} after"


def _shown(text: str) -> str:
    """On one line, control characters escaped, cut where it is long."""
    return repr(text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)")
