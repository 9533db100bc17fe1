"""The recipes in configs/recipes, and the figures of each in figures.json beside them.

`python -m benchmarks.recipes` writes the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from finetune.system.arguments import nearest
from finetune.system.errors import InputError
from finetune.system.format import format_bytes, markdown_table
from finetune.system.resources import packaged

FIGURES = "figures.json"
_MODELINE = re.compile(r"^# yaml-language-server: .*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe.

    Attributes:
        purpose: the words before the colon of its first sentence.
        model: the option of the group `model`.
        predicted: figures of `finetune plan` for a card; empty if it has none.
        measured: figures of a run; empty if there was none.
    """

    name: str
    text: str
    purpose: str
    model: str
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any]

    def written_as(self, config: str) -> str:
        """Return its text with the launch command for the file `config`, and its figures as comments."""
        text = self.text.replace(f"config=recipes/{self.name}.yaml", f"config={config}", 1)
        return _MODELINE.sub(lambda _: "".join(f"# {line}\n" for line in self.figures()), text, count=1)

    def figures(self) -> list[str]:
        """Return a line about the prediction and one about the measurement, each with its command."""
        lines = []
        if found := self.predicted:
            speed = f", {found['tokens_per_second']:,} tokens/s" if found["tokens_per_second"] else ""
            memory = format_bytes(found["peak_bytes"])
            lines += [f"predicted: {memory} of {found['card']}{speed}", f"  {found['command']}"]
        if self.measured:
            lines += [f"measured: {self.measured_text()}", f"  {self.measured['command']}"]
        return lines

    def measured_text(self) -> str:
        """Return the score, the peak memory, the speed and the conditions of the measurement."""
        found, score = self.measured, _score(self.measured)
        parts = [f"exact match {score}"] * bool(score)
        parts += [format_bytes(found["peak_bytes"]), f"{found['tokens_per_second']:,} tokens/s"]
        return f"{', '.join(parts)} ({found['conditions']})"


def recipe_names() -> list[str]:
    """Return the names of the recipes."""
    return sorted(file.stem for file in packaged("configs").glob("recipes/*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe and its figures.

    Raises:
        InputError: no recipe has this name.
    """
    names = recipe_names()
    if name not in names:
        raise InputError(f"{name}: unknown recipe{nearest(name, names)}\nhelp: recipes: {', '.join(names)}")
    folder = packaged("configs") / "recipes"
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    figures = json.loads((folder / FIGURES).read_text(encoding="utf-8")).get(name, {})
    (model,) = (item["model"] for item in yaml.safe_load(text)["defaults"] if "model" in item)
    purpose = text.splitlines()[2].removeprefix("# ").partition(":")[0]
    return Recipe(name, text, purpose, model, figures.get("predicted", {}), figures.get("measured", {}))


def recipe_table() -> str:
    """Return the recipes as a markdown table: one line per recipe."""
    rows = [["recipe", "for", "model", "card", "memory", "tokens/s", "exact match"]]
    for recipe in map(read_recipe, recipe_names()):
        found = recipe.predicted or recipe.measured
        speed = f"{found['tokens_per_second']:,}" if found["tokens_per_second"] else "–"
        memory, score = format_bytes(found["peak_bytes"]), _score(recipe.measured) or "–"
        rows.append([recipe.name, recipe.purpose, recipe.model, found["card"], memory, speed, score])
    return markdown_table(rows)


def _score(measured: Mapping[str, Any]) -> str:
    if measured.get("exact_match_after") is None:
        return ""
    return f"{measured['exact_match_before']:.0%} → {measured['exact_match_after']:.0%}"
