"""The closing words of a run on the console."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.evaluation.generation import Answer
from finetune.training.run_folder import RunResult


def describe_result(result: RunResult, before: Sequence[Sequence[str]], after: Sequence[Answer]) -> str:
    """Figures, samples before and after, and where the adapter lies; plain text for stdout.

    before: [prompt, expected, given] of the untrained model, in the order of `after`.
    """
    lines = [
        "",
        f"finished: {result.steps} steps, {result.target_tokens:,} target tokens in {result.train_seconds:.0f} s",
    ]
    if result.final_loss is not None:
        lines.append(f"  training loss   {result.final_loss:.4f}")
    if result.eval_loss is not None:
        lines.append(f"  held-out loss   {result.eval_loss:.4f}")
    if result.exact_match_before is not None and result.exact_match_after is not None:
        lines.append(f"  exact match     {result.exact_match_before:.1%} before, {result.exact_match_after:.1%} after")
    if result.tokens_per_second is not None:
        lines.append(
            f"  speed           {result.tokens_per_second:,.0f} tokens/s, peak {result.peak_bytes / 2**30:.2f} GiB"
        )
    for (prompt, expected, given), answer in zip(before, after, strict=False):
        lines += [
            "",
            f"  asked     {prompt!r}",
            f"  expected  {expected!r}",
            f"  before    {given!r}",
            f"  after     {answer.given!r}",
        ]
    return "\n".join([*lines, "", f"adapter: {result.adapter}", f"next: finetune chat adapter={result.adapter}"])
