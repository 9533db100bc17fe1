"""Compute the figures of a table from the steps of runs: rates, peaks, shares of the ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.flops import attention_flops, step_flops

Figures = dict[str, Any]


def run_figures(run: Mapping[str, Any], warmup: int, shape: Mapping[str, Any]) -> Figures:
    """Compute rates and peaks of one run without its first `warmup` steps; return a failed run unchanged.

    tokens: without padding. flops_per_second: of the operations that the mathematics needs (benchmarks/flops.py).
    """
    if "failed" in run:
        return {"failed": run["failed"]}
    steps = run["steps"][warmup:]
    if not steps:
        return {"failed": f"only {len(run['steps'])} steps, of which {warmup} are warm-up"}
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    targets = sum(step["target_tokens"] for step in steps)
    computed = sum(step.get("computed_tokens", step["tokens"]) for step in steps)
    figures: Figures = {
        "tokens_per_second": tokens / seconds,
        "target_tokens_per_second": targets / seconds,
        "seconds_per_token": seconds / tokens,
        "tokens_per_step": tokens / len(steps),
        "computed_share": computed / tokens,
        "flops_per_second": step_flops(shape, tokens, targets, computed) / seconds,
        **{key: run[key] for key in ("peak_bytes", "load_peak_bytes", "train_peak_bytes", "start_seconds")},
    }
    if "square_mean_length" in run:
        attention = attention_flops(shape, tokens, run["square_mean_length"])
        figures["attention_flops_per_second"] = attention / seconds
    return figures


def medians(runs: Sequence[Figures]) -> Figures:
    """Return the median of each figure over the finished runs; `failed` if there is none."""
    done = [run for run in runs if "failed" not in run]
    if not done:
        return {"failed": runs[0]["failed"]} if runs else {"failed": "not run"}
    keys = [key for key in done[0] if all(run.get(key) is not None for run in done)]
    return {**{key: median(run[key] for run in done) for key in keys}, "runs": len(done)}


def ceiling_of(measured: Sequence[Mapping[str, float]]) -> Figures:
    """Return the best median of all products, over all measurements."""
    names = {name for rates in measured for name in rates}
    rates = {name: median(rates[name] for rates in measured if name in rates) for name in sorted(names)}
    if not rates:
        return {"flops_per_second": None, "product": None, "products": {}, "measurements": 0}
    best = max(rates, key=rates.__getitem__)
    return {"flops_per_second": rates[best], "product": best, "products": rates, "measurements": len(measured)}


def share_of_ceiling(figures: Figures, ceiling: Figures) -> float | None:
    if "failed" in figures or not ceiling["flops_per_second"]:
        return None
    return figures["flops_per_second"] / ceiling["flops_per_second"]


def compare(ours: Figures, stock: Mapping[str, Figures]) -> dict[str, float | None]:
    """Return ratio (our tokens/s over the best stock ones) and peak_ratio (our peak over the lowest stock peak)."""
    done = [figures for figures in stock.values() if "failed" not in figures]
    if "failed" in ours or not done:
        return {"ratio": None, "peak_ratio": None}
    return {
        "ratio": ours["tokens_per_second"] / max(figures["tokens_per_second"] for figures in done),
        "peak_ratio": ours["peak_bytes"] / min(figures["peak_bytes"] for figures in done),
    }
