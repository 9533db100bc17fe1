"""Write the tables of README.md and the pages that the planner and the packaged configs decide.

    python docs/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; tests/unit/test_docs.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from finetune import load_config
from finetune.config.recipes import read_recipe, recipe_names, recipe_table
from finetune.planning.advice import BUDGETS_GB, LONGEST, length_table
from finetune.planning.inputs import plan_inputs
from finetune.system.resources import packaged

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "support.md", ROOT / "docs" / "recipes.md")
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


def models_table() -> str:
    """Return the packaged models: one line per series, with its sizes."""
    series: dict[str, list[str]] = {}
    for file in packaged("configs").glob("model/qwen2.5-*.yaml"):
        name = file.stem.removesuffix("-instruct")
        kind, size = name.rsplit("-", 1)
        series.setdefault(kind, []).append(size)
    titles = {"qwen2.5": "Qwen2.5", "qwen2.5-coder": "Qwen2.5-Coder", "qwen2.5-math": "Qwen2.5-Math"}
    lines = ["| series | sizes, base and instruct | example |", "|---|---|---|"]
    for kind, title in titles.items():
        sizes = sorted(set(series[kind]), key=lambda size: float(size.removesuffix("b")))
        shown = ", ".join(size.upper() for size in sizes)
        lines.append(f"| {title} | {shown} | `model={kind}-{sizes[-1]}-instruct` |")
    return "\n".join(lines)


def trainings_table() -> str:
    """Return the measured trainings of the recipes, with the command of each."""
    lines = ["| command | measured |", "|---|---|"]
    for recipe in map(read_recipe, recipe_names()):
        if recipe.measured:
            lines.append(f"| `{recipe.measured['command']}` | {recipe.measured_text()} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "context": context_table,
    "models": models_table,
    "recipes": recipe_table,
    "recipe-trainings": trainings_table,
}


def with_tables(text: str) -> str:
    """Return a page with its tables written anew."""
    return _PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
