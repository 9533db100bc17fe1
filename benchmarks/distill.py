"""Measure the cost of a teacher over plain fine-tuning on the same rows, and compare with stock GKDTrainer.

    python -m benchmarks.distill [size=0.5B] [rows=FILE] [tokenizer=FOLDER] [repeats=3] [steps=4] [length=512] [batch=4]
                                 [pack=1024] [variants=cached,resident,…] [ours=fast] [stock=gkd,…]

All alternate in fresh processes, with equal numbers of tokens per step. The teacher is the same model in bf16. Step k
of all our variants has the same rows in the same packs, so `plain` and `cached` differ only by the teacher. Peaks are
of whole processes. `finetune cache` writes the teacher outputs of `cached` before, with the same config. These runs
skip `distill.spot_check`, which reads the teacher once at the start; `cached+check` has it. No run evaluates or
generates. Answers are trained; stock also trains the newline after each (benchmarks/stock.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import report
from benchmarks.figures import Figures, compare, medians, run_figures
from benchmarks.flops import step_flops, teacher_flops
from benchmarks.processes import device, parse
from benchmarks.throughput import warmup_of
from benchmarks.workload import DEFAULTS, Workload, prepared

OPTIONS = {**DEFAULTS, "repeats": "3", "length": "512", "batch": "4", "pack": "1024", "variants": "all"}
PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """settings: of ours, in addition to the common ones. tier: kind of the cache that is read, if any.
    passes: part of a teacher's forward pass in a step: none, its head, all.
    """

    settings: str = ""
    tier: str | None = None
    passes: str = "none"


VARIANTS = {
    PLAIN: Variant(),
    "cached": Variant("distill.objective=recover;distill.spot_check=0", "sampled"),
    "cached-hidden": Variant("distill.objective=recover;distill.spot_check=0", "hidden", "head"),
    "cached+check": Variant("distill.objective=recover", "sampled"),
    "resident": Variant("distill.objective=recover;distill.teacher.placement=resident", passes="whole"),
    "streamed": Variant("distill.objective=recover;distill.teacher.placement=streamed", passes="whole"),
    "anchor": Variant("distill.objective=sft+anchor;distill.teacher.placement=resident", passes="whole"),
}
# Variant, figure, side, bound.
Bar = tuple[str, str, str, float]
BARS: tuple[Bar, ...] = (
    ("cached", "price", "at_most", 1.10),
    ("cached", "peak_price", "at_most", 1.05),
    ("cached-hidden", "price", "at_most", 1.10),
    ("cached-hidden", "peak_price", "at_most", 1.05),
    ("cached+check", "peak_price", "at_most", 1.05),
    ("resident", "ratio", "at_least", 2.5),
    ("resident", "peak_ratio", "at_most", 0.5),
)
COLUMNS = (
    ("tokens/s", "tokens_per_second", 1.0, ",.1f"),
    ("targets/s", "target_tokens_per_second", 1.0, ",.1f"),
    ("step s", "step_seconds", 1.0, ",.2f"),
    ("price", "price", 1.0, ".3f"),
    ("needed", "needed_price", 1.0, ".3f"),
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
    ("peak price", "peak_price", 1.0, ".3f"),
    ("start s", "start_seconds", 1.0, ".1f"),
)
SIGNAL_COLUMNS = (
    ("tokens/s", "tokens_per_second", 1.0, ",.1f"),
    ("seconds", "seconds", 1.0, ",.1f"),
    ("B/target", "bytes_per_target", 1.0, ",.1f"),
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
)
Runs = dict[str, list[dict[str, Any]]]


def chosen(options: Mapping[str, str]) -> list[str]:
    """Return our variants to run, `plain` first. Raises SystemExit with the known ones."""
    given = [*VARIANTS] if options["variants"] == "all" else options["variants"].split(",")
    if unknown := [name for name in given if name not in VARIANTS]:
        raise SystemExit(f"variants={','.join(unknown)}: unknown; choose from all, {', '.join(VARIANTS)}")
    return [*dict.fromkeys([PLAIN, *given])]


def run_ours(work: Workload, variant: Variant, module: str = "benchmarks.ours", **changes: Any) -> dict[str, Any]:
    """Run ours, or another `module` with its config; each pack is one forward pass."""
    options, settings = work.options, variant.settings
    if variant.tier is not None:
        folder = work.folder / f"teacher-{variant.tier}"
        settings += f";distill.teacher.placement=cached;distill.cache_kind={variant.tier};distill.cache={folder}"
    tokens = int(options["length"]) * int(options["batch"])
    pack = min(int(options["pack"]), tokens)
    return work.ours(options["ours"], pack, tokens // pack, settings, module, micro=1, **changes)


def write_signals(work: Workload, names: list[str]) -> dict[str, Figures]:
    """Write one cache for each kind that the variants read, and return its figures by kind."""
    written: dict[str, Figures] = {}
    for variant in map(VARIANTS.__getitem__, names):
        if variant.tier is not None and variant.tier not in written:
            written[variant.tier] = figures = run_ours(work, variant, "benchmarks.signals")
            report.log(report.table({f"cache {variant.tier}": figures}, SIGNAL_COLUMNS))
    return written


def alternate(work: Workload, names: list[str]) -> Runs:
    """Run all by name (`ours NAME`, `stock NAME`), alternating.

    An uncounted run first quantizes the base into the cache, for the times and peaks of all others.
    """
    options = work.options
    run_ours(work, VARIANTS[PLAIN], steps=1)
    turns = [*(("ours", name) for name in names), *(("stock", name) for name in work.stock_variants("gkd"))]
    runs: Runs = {f"{side} {name}": [] for side, name in turns}
    for _ in range(int(options["repeats"])):
        for side, name in turns:
            run = (
                run_ours(work, VARIANTS[name])
                if side == "ours"
                else work.stock(name, int(options["length"]), int(options["batch"]))
            )
            runs[f"{side} {name}"].append(run)
            report.log(report.table({f"{side} {name}": figures_of(work, side, run)}, COLUMNS))
    return runs


def figures_of(work: Workload, side: str, run: Mapping[str, Any]) -> Figures:
    """Return the figures of a run, without its rate of operations, which counts only the student."""
    figures = run_figures(run, warmup_of(side, work.options), work.shape)
    if "failed" in figures:
        return figures
    figures["step_seconds"] = figures["seconds_per_token"] * figures["tokens_per_step"]
    return {key: value for key, value in figures.items() if not key.endswith("flops_per_second")}


def needed_price(shape: Mapping[str, Any], run: Mapping[str, Any], passes: str) -> float:
    """Return operations of a run's steps with their part of a teacher's forward pass, over those without."""
    tokens, targets, computed = (
        sum(step[key] for step in run["steps"]) for key in ("tokens", "target_tokens", "computed_tokens")
    )
    teacher = {
        "none": 0.0,
        "head": teacher_flops(shape, 0, targets),
        "whole": teacher_flops(shape, computed, targets),
    }
    return 1 + teacher[passes] / step_flops(shape, tokens, targets, computed)


def prices(figures: Figures, plain: Figures) -> Figures:
    """Return price (seconds per step over plain fine-tuning) and peak_price (the same for peaks)."""
    if "failed" in figures or "failed" in plain:
        return {"price": None, "peak_price": None}
    return {
        "price": figures["step_seconds"] / plain["step_seconds"],
        "peak_price": figures["peak_bytes"] / plain["peak_bytes"],
    }


def judged(found: Mapping[str, Figures], bars: Sequence[Bar] = BARS) -> list[dict[str, Any]]:
    """Return the bounds of the variants that ran: the value, and whether it is met (None if unknown)."""
    verdicts: list[dict[str, Any]] = []
    for name, key, side, bound in bars:
        if name in found:
            value = found[name].get(key)
            met = None if value is None else value <= bound if side == "at_most" else value >= bound
            verdicts.append({"variant": name, "figure": key, side: bound, "found": value, "met": met})
    return verdicts


def summarize(work: Workload, runs: Runs, signals: Mapping[str, Figures]) -> dict[str, Any]:
    """Return the figures of table and JSON; ratios are of medians, `by_turn` has the single repetitions."""
    each = {name: [figures_of(work, name.partition(" ")[0], run) for run in done] for name, done in runs.items()}
    lines = {name: medians(turns) for name, turns in each.items()}
    ours = {name.removeprefix("ours "): line for name, line in lines.items() if name.startswith("ours ")}
    stock = {name.removeprefix("stock "): line for name, line in lines.items() if name.startswith("stock ")}
    for name, figures in ours.items():
        turns = zip(each[f"ours {name}"], each[f"ours {PLAIN}"], strict=True)
        figures |= {**prices(figures, ours[PLAIN]), "by_turn": [prices(turn, plain) for turn, plain in turns]}
        if "failed" not in figures:
            done = next(run for run in runs[f"ours {name}"] if "failed" not in run)
            figures["needed_price"] = needed_price(work.shape, done, VARIANTS[name].passes)
    resident = ours.get("resident", {"failed": "not run"})
    against = compare(resident, stock)
    check, unchecked = (ours.get(name, {}).get("start_seconds") for name in ("cached+check", "cached"))
    return {
        "variants": ours,
        "stock": stock,
        "signals": dict(signals),
        **against,
        "against": {name: compare(resident, {name: figures}) for name, figures in stock.items()},
        "spot_check_seconds": None if check is None or unchecked is None else check - unchecked,
        "bars": judged({**ours, "resident": {**resident, **against}} if "resident" in ours else ours),
        "runs": runs,
    }


def describe(summary: Mapping[str, Any]) -> str:
    lines = {f"ours {name}": figures for name, figures in summary["variants"].items()}
    lines |= {f"stock {name}": figures for name, figures in summary["stock"].items()}
    text = [report.table(lines, COLUMNS)]
    if summary["signals"]:
        caches = {f"cache {tier}": figures for tier, figures in summary["signals"].items()}
        text += ["distill.spot_check is 0 in cached and cached-hidden", "", report.table(caches, SIGNAL_COLUMNS), ""]
    return "\n".join([*text, *verdicts(summary["bars"])])


def verdicts(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per bound of `judged`."""
    lines = []
    for bar in bars:
        bound = f"at most {bar['at_most']:g}" if "at_most" in bar else f"at least {bar['at_least']:g}"
        found = "not measured" if bar["found"] is None else f"{bar['found']:.3f}: {'met' if bar['met'] else 'MISSED'}"
        lines.append(f"{bar['variant']} {bar['figure']} {bound}: {found}")
    return lines


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS, prefixes=("ours.",))
    names = chosen(options)
    machine = device()
    with prepared(options) as work:
        if len(work.ours_variants()) != 1:
            raise SystemExit(f"ours={options['ours']}: set exactly one; all variants share its settings")
        signals = write_signals(work, names)
        runs = alternate(work, names)
        summary = {**report.heading("distill", work.options, machine), **summarize(work, runs, signals)}
    report.log("\n" + describe(summary))
    report.write(report.results_file("distill", options, machine), summary)
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}))


if __name__ == "__main__":
    main(sys.argv[1:])
