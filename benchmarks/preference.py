"""Measure the cost of learning from preferences over plain fine-tuning on the same answers, and compare with TRL.

    python -m benchmarks.preference [size=0.5B] [layers=4] [pairs=2] [prompt=256] [answer=256] [objective=dpo]
                                    [repeats=3] [steps=4] [rows=FILE] [tokenizer=FOLDER] [ours=fast] [stock=dpo,…]

All alternate in fresh processes. Each step trains the same `pairs`, with prompts and answers of about so many tokens,
in one forward pass. `sft` trains the same answers as rows of their own, both sides of a pair: so it computes the same
tokens and has the same targets. `base` scores the reference in each step, `cached` reads what `finetune cache` wrote
before. TRL has DPO only, its reference is the base; all rows have the same length, so it computes no padding. Its
seconds are those of forward and backward; ours are those of whole steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report, rows
from benchmarks.distill import Bar, Runs, figures_of, judged, needed_price, prices, verdicts
from benchmarks.figures import Figures, compare, medians
from benchmarks.processes import device, parse
from benchmarks.workload import DEFAULTS, Workload, prepared
from finetune.config.preference_rules import NEEDS_REFERENCE

OPTIONS = {
    **{key: value for key, value in DEFAULTS.items() if key != "limit"},
    "pairs": "2",
    "prompt": "256",
    "answer": "256",
    "objective": "dpo",
    "repeats": "3",
}
SFT = "sft"
BARS: tuple[Bar, ...] = (
    ("base", "ratio", "at_least", 2.5),
    ("base", "peak_ratio", "at_most", 0.35),
    ("base", "price", "at_most", 1.6),
    ("cached", "price", "at_most", 1.1),
)
COLUMNS = (
    ("pairs/s", "pairs_per_second", 1.0, ",.3f"),
    ("tokens/s", "tokens_per_second", 1.0, ",.1f"),
    ("step s", "step_seconds", 1.0, ",.2f"),
    ("price", "price", 1.0, ".3f"),
    ("needed", "needed_price", 1.0, ".3f"),
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
    ("peak price", "peak_price", 1.0, ".3f"),
    ("start s", "start_seconds", 1.0, ".1f"),
)


@dataclass(frozen=True)
class Pairs:
    """The rows of all runs. answers: the same as messages, two rows per pair. length: tokens of the longest row."""

    count: int
    file: Path
    answers: Path
    length: int


def prepare_pairs(work: Workload) -> Pairs:
    """Write the rows, and measure them with the template."""
    from transformers import AutoTokenizer

    options, count = work.options, int(work.options["pairs"])
    lengths = int(options["prompt"]), int(options["answer"])
    tokenizer = Path(options["tokenizer"])
    file, answers = rows.write_pairs(Path(options["rows"]), work.folder, tokenizer, lengths, count)
    template = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template
    longest = max(len(template(row, return_dict=False)) for row in rows.read_messages(answers))
    return Pairs(count, file, answers, longest)


def references_of(objective: str) -> list[str]:
    """Return where an objective can take its reference from; `none` if it has no reference."""
    if objective not in NEEDS_REFERENCE:
        return ["none"]
    return ["base"] if objective == "kto" else ["base", "cached"]


def run_ours(work: Workload, pairs: Pairs, reference: str, module: str = "benchmarks.ours", **changes: Any) -> Any:
    """Run plain fine-tuning (`sft`) or a preference with that reference; all rows of a step are one forward pass."""
    settings, batch = "data.packing=false", 2 * pairs.count
    if reference != SFT:
        batch = pairs.count
        settings += f";data.truncation=error;preference.objective={work.options['objective']}"
    if reference in ("base", "cached"):
        settings += f";preference.reference={reference}"
    if reference == "cached":
        settings += f";preference.cache={work.folder / 'reference'}"
    # A row of a pair has both of its sides.
    length = pairs.length * 2 * pairs.count // batch
    file = pairs.answers if reference == SFT else pairs.file
    return work.ours(work.options["ours"], length, batch, settings, module, rows=file, **changes)


def alternate(work: Workload, pairs: Pairs) -> Runs:
    """Run all by name (`ours NAME`, `stock NAME`), alternating.

    An uncounted run first quantizes the base into the cache, for the times and peaks of all others.
    """
    references = references_of(work.options["objective"])
    run_ours(work, pairs, SFT, steps=1)
    turns = [("ours", name) for name in [SFT, *references]]
    turns += [("stock", name) for name in (work.stock_variants("dpo") if work.options["objective"] == "dpo" else [])]
    runs: Runs = {f"{side} {name}": [] for side, name in turns}
    for _ in range(int(work.options["repeats"])):
        for side, name in turns:
            run = (
                run_ours(work, pairs, name)
                if side == "ours"
                else work.stock(name, pairs.length, pairs.count, rows=pairs.file)
            )
            runs[f"{side} {name}"].append(run)
            report.log(report.table({f"{side} {name}": pair_figures(work, side, run)}, COLUMNS))
    return runs


def pair_figures(work: Workload, side: str, run: Mapping[str, Any]) -> Figures:
    """Return the figures of a run with its pairs/s; those of `sft` are pairs whose answers it trains."""
    figures = figures_of(work, side, run)
    if "failed" not in figures:
        figures["pairs_per_second"] = int(work.options["pairs"]) / figures["step_seconds"]
    return figures


def summarize(work: Workload, runs: Runs) -> dict[str, Any]:
    """Return the figures of table and JSON; ratios are of medians, `by_turn` has the single repetitions."""
    each = {name: [pair_figures(work, name.partition(" ")[0], run) for run in done] for name, done in runs.items()}
    lines = {name: medians(turns) for name, turns in each.items()}
    ours = {name.removeprefix("ours "): line for name, line in lines.items() if name.startswith("ours ")}
    stock = {name.removeprefix("stock "): line for name, line in lines.items() if name.startswith("stock ")}
    for name, figures in ours.items():
        turns = zip(each[f"ours {name}"], each[f"ours {SFT}"], strict=True)
        figures |= {**prices(figures, ours[SFT]), "by_turn": [prices(turn, plain) for turn, plain in turns]}
        if "failed" not in figures:
            done = next(run for run in runs[f"ours {name}"] if "failed" not in run)
            figures["needed_price"] = needed_price(work.shape, done, "whole" if name == "base" else "none")
        if name != SFT:
            figures |= compare(figures, stock)
    return {
        "variants": ours,
        "stock": stock,
        "against": {
            name: {variant: compare(figures, {variant: line}) for variant, line in stock.items()}
            for name, figures in ours.items()
            if name != SFT
        },
        "bars": judged(ours, BARS),
        "runs": runs,
    }


def describe(summary: Mapping[str, Any]) -> str:
    lines = {f"ours {name}": figures for name, figures in summary["variants"].items()}
    lines |= {f"stock {name}": figures for name, figures in summary["stock"].items()}
    return "\n".join([report.table(lines, COLUMNS), *verdicts(summary["bars"])])


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS, prefixes=("ours.",))
    machine = device()
    with prepared(options) as work:
        if len(work.ours_variants()) != 1:
            raise SystemExit(f"ours={options['ours']}: set exactly one; all runs share its settings")
        pairs = prepare_pairs(work)
        cached = "cached" in references_of(options["objective"])
        signals = run_ours(work, pairs, "cached", "benchmarks.signals") if cached else None
        runs = alternate(work, pairs)
        summary = {**report.heading("preference", work.options, machine), "reference": signals, **summarize(work, runs)}
    report.conclude("preference", options, machine, summary, describe(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
