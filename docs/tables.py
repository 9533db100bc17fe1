"""Write the tables of README.md and the pages that the planner and the packaged configs decide.

    python docs/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; tests/unit/test_docs.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune import load_config
from finetune.config.command_options import PlanOptions
from finetune.config.recipes import read_recipe, recipe_names, recipe_table
from finetune.models.families import FAMILIES, ModelFamily, shape_of
from finetune.models.families.proven import PROVEN
from finetune.planning import cards
from finetune.planning.advice import BUDGETS_GB, LONGEST, length_table, packaged_models
from finetune.planning.auto_batch import estimate_memory
from finetune.planning.cards import CARDS
from finetune.planning.gpus import traits_of
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.timing import estimate_time

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("models", "planning", "recipes")))
_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)


def context_table() -> str:
    """Return the longest packed sequence per model size and memory of the GPU, for a small and a large adapter."""
    small, large = _lengths("lora.rank=8"), _lengths("lora.rank=16", "lora.target_modules=all-linear")
    lines = ["| model | " + " | ".join(f"{gb} GB" for gb in BUDGETS_GB) + " |", "|---" * (len(BUDGETS_GB) + 1) + "|"]
    for size, lengths in small.items():
        cells = [_cell(lengths[gb], large[size][gb]) for gb in BUDGETS_GB]
        lines.append(f"| Qwen2.5-{size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _lengths(*overrides: str) -> dict[str, dict[int, int]]:
    return length_table(plan_inputs(load_config("lora.yaml", overrides, needs_data=False), None, device_type="cuda"))


def _cell(small: int, large: int) -> str:
    first, second = _thousands(small), _thousands(large)
    return first if first == second else f"{first} · {second}"


def _thousands(tokens: int) -> str:
    if not tokens:
        return "–"
    return f"{tokens / 1000:.1f}k" if tokens < 10_000 else f"{tokens // 1000}k{'+' * (tokens >= LONGEST)}"


def cards_table() -> str:
    """Return the longest packed sequence and the predicted speed on 1 to 8 cards of a node."""
    lines = ["| model | cards | " + " | ".join(f"{gb} GB ({name})" for gb, name in CARDS.items()) + " |"]
    lines.append("|---" * (len(CARDS) + 2) + "|")
    counts = (1, 2, 4, 8)
    tables = {count: cards.cards_table(_inputs(ranks=count)) for count in counts}
    for size in cards.SIZES:
        for count in counts:
            cells = (
                f"{_thousands(cell.longest)} · {_rounded(cell.tokens_per_second)}/s" if cell else "–"
                for cell in tables[count][size].values()
            )
            lines.append(f"| Qwen2.5-{size} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sharded_table() -> str:
    """Return plans of 32B and 72B on cards of 24 GB that share the base."""
    head = ["model", "cards", "base", "gathered", "trained", "activations", "needed", "sent per step", "time per step"]
    lines = [f"| {' | '.join([*head, 'efficiency'])} |", "|---" * (len(head) + 1) + "|"]
    for size in ("32B", "72B"):
        for count in (2, 4, 8):
            inputs = replace(_inputs(f"model=qwen2.5-{size.lower()}-instruct", ranks=count), shard_ranks=count)
            found = estimate_memory(inputs, 24e9)
            timing = estimate_time(inputs, found, rates=None, options=PlanOptions(), gpu_name=CARDS[24])
            trained = {"adapter", "gradients", "optimizer", "gradients exchanged between ranks"}
            sums = dict.fromkeys(("base", "gathered", "trained", "activations"), 0.0)
            for name, part in found.parts.items():
                kind = "trained" if name in trained else "base" if name in found.static.parts else "activations"
                sums["gathered" if name.startswith("gathered") else kind] += part
            needed = f"{found.needed_bytes / 1e9:.1f}" if found.needed_bytes <= 24e9 else "does not fit"
            lines.append(
                f"| Qwen2.5-{size} | {count} | {' | '.join(f'{part / 1e9:.2f}' for part in sums.values())} | {needed} "
                f"| {sum(timing['sent_bytes'].values()) / 1e9:.0f} GB | {timing['step_seconds']:.0f} s "
                f"| {timing['efficiency']:.0%} |"
            )
    return "\n".join(lines)


def _inputs(*overrides: str, ranks: int) -> PlanInputs:
    cfg = load_config("lora.yaml", overrides, needs_data=False)
    return plan_inputs(cfg, shape_of(cfg.model.name), device_type="cuda", ranks=ranks, gpu=traits_of(CARDS[24]))


def _rounded(speed: float) -> str:
    return f"{float(f'{speed:.2g}'):,.0f}"


def models_table() -> str:
    """Return the supported families: sizes, the option of the smallest packaged model, and what is refused."""
    lines = ["| family | `model_type` | sizes | example |", "|---|---|---|---|"]
    for family in _families():
        options = packaged_models(family)
        sizes = ", ".join(family.sizes)
        lines.append(f"| {family.title} | `{family.model_type}` | {sizes} | `model={next(iter(options))}` |")
    return "\n".join([*lines, "| any other | | refused | |"])


def proven_table() -> str:
    """Return what the gate of tests/families proves of each family."""
    lines = ["| family | " + " | ".join(PROVEN) + " |", "|---" * (len(PROVEN) + 1) + "|"]
    for family in _families():
        types = {name for name, record in FAMILIES.items() if record.title == family.title}
        cells = ["yes" if types & set(names) else "–" for names in PROVEN.values()]
        lines.append(f"| {family.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _families() -> list[ModelFamily]:
    """Return a record of each family; a second one of the same title holds a part of its model."""
    return list({family.title: family for family in reversed(FAMILIES.values())}.values())[::-1]


def trainings_table() -> str:
    """Return the measured trainings of the recipes, with the command of each."""
    lines = ["| command | measured |", "|---|---|"]
    for recipe in map(read_recipe, recipe_names()):
        if recipe.measured:
            lines.append(f"| `{recipe.measured['command']}` | {recipe.measured_text()} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "cards": cards_table,
    "context": context_table,
    "models": models_table,
    "proven": proven_table,
    "recipes": recipe_table,
    "recipe-trainings": trainings_table,
    "sharded": sharded_table,
}


def with_tables(text: str) -> str:
    """Return a page with its tables written anew."""
    return _PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
