"""Recipes: each loads, fits its card and trains; list, page and files say the same; a copy is the same run."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from benchmarks.recipes import CARDS, FILE, TRAININGS, predicted
from finetune.config.compose import load_config
from finetune.config.recipes import read_recipe, recipe_names
from finetune.system.format import format_bytes
from tests.commands import run_here

FIGURES = json.loads(FILE.read_text())
EMBEDDED = [name for name, words in TRAININGS.items() if "model=tiny" in words.split()]


def test_every_recipe_has_figures_and_no_figure_lacks_its_recipe():
    assert set(FIGURES) == set(recipe_names())
    assert {name for name, found in FIGURES.items() if "predicted" in found} == set(CARDS)
    assert {name for name, found in FIGURES.items() if "measured" in found} == set(TRAININGS)


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_prediction_is_that_of_the_plan_today(name: str):
    assert FIGURES[name]["predicted"] == predicted(name), "run: python -m benchmarks.recipes"


@pytest.mark.parametrize("name", sorted(TRAININGS))
def test_a_measurement_names_its_command(name: str):
    found = FIGURES[name]["measured"]
    assert found["command"].endswith(f"finetune train config=recipes/{name} {TRAININGS[name]}")
    assert re.search(r", threads=\d+, load=\d+, \d{4}-\d\d-\d\d$", found["conditions"])
    assert found["peak_bytes"] > 0 and found["tokens_per_second"] > 0


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_recipe_trains_on_the_embedded_base(name: str, tmp_path: Path):
    short = ["train.max_steps=2", "generation.num_examples=2", "generation.max_new_tokens=2"]
    words = [word for word in TRAININGS[name].split() if not word.startswith("train.max_steps=")]
    done = run_here("train", f"config=recipes/{name}", *words, *short, "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("finished", 2)


def test_the_list_shows_the_figures_of_the_files(tmp_path: Path):
    done = run_here("recipes", cwd=tmp_path)
    head, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert done.returncode == 0 and [row[0].strip() for row in rows] == recipe_names()
    for name, *cells in rows:
        row = dict(zip(head[1:], cells, strict=True))
        row = {key.strip(): value.strip() for key, value in row.items()}
        figures = FIGURES[name.strip()]
        best = figures.get("predicted") or figures["measured"]
        assert row["card"] == best["card"] and row["memory"] == format_bytes(best["peak_bytes"])
        assert row["tokens/s"].replace(",", "") == str(best["tokens_per_second"] or "–")
        scored = figures.get("measured", {}).get("exact_match_after") is not None
        assert (row["exact match"] != "–") == scored


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_is_the_same_run(name: str, tmp_path: Path):
    """Only the name, and the folder named after it, differ; packaged files are found from any folder."""
    done = run_here("recipes", name, f"out={name}.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / f"{name}.yaml"
    first, *_ = copy.read_text().splitlines()
    assert f" config={name}.yaml" in first
    with contextlib.chdir(tmp_path):
        words = TRAININGS.get(name, "data.train=rows.jsonl").split()
        assert load_config(f"{name}.yaml", words) == load_config(f"recipes/{name}", words)
    assert all(FIGURES[name][part]["command"] in copy.read_text() for part in FIGURES[name])


def test_a_recipe_is_printed_as_it_is_copied(tmp_path: Path):
    printed = run_here("recipes", "classify", cwd=tmp_path).stdout
    assert printed == read_recipe("classify").written_as("recipes/classify.yaml")
    assert "$schema" not in printed, "the path of the schema is that of the package"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["clasify"], "classify"),
        (["classify", "math"], "classify math"),
        (["out=mine.yaml"], "none"),
        (["classify", "out=mine"], "mine"),
        (["classify", "out=taken.yaml"], "taken.yaml"),
        (["classify", "out=missing/mine.yaml"], "missing"),
    ],
)
def test_a_wrong_command_names_what_is_wrong_and_writes_nothing(words: list[str], named: str, tmp_path: Path):
    (tmp_path / "taken.yaml").write_text("mine")
    done = run_here("recipes", *words, cwd=tmp_path)
    assert done.returncode == 2 and named in done.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
