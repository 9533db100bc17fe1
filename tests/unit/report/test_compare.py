"""Comparisons: the settings that differ, the best results, and unique labels."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.report.compare import as_text, best_places, compare, labels_of, text_table, write_comparison
from finetune.report.facts import figure_named
from finetune.report.run import read_run
from tests.html_reader import Reader
from tests.run_folders import write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a long run and a short failed one with other settings."""
    place = tmp_path_factory.mktemp("runs")
    return [
        write_run(place / "a", steps=200),
        write_run(place / "b", "lora.rank=4", steps=7, status="failed", eval_loss=None, tokens_per_second=2000.0),
    ]


def test_the_table_has_differing_settings_and_stars_at_the_best(folders: list[Path]):
    comparison = compare([read_run(folder) for folder in folders])
    assert {row.label: row.cells for row in comparison.settings} == {"lora.rank": ("8", "4")}
    figures = {row.label: row for row in comparison.figures}
    assert figures["status"].cells == ("finished", "failed")
    assert figures["held-out loss"].cells[1] == "" and not figures["held-out loss"].best
    assert figures["training loss"].best == {0} and figures["tokens/s"].best == {1}
    assert not figures["steps"].best and not figures["peak memory"].best
    lines = as_text(comparison).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.search(r"\| tokens/s +\| 1,000 +\| 2,000 \* +\|", as_text(comparison))


def test_every_cell_is_the_runs_own_result(tmp_path: Path):
    results: list[dict[str, Any]] = [
        {"eval_loss": 0.123456, "exact_match_after": 0.25, "train_seconds": 3725.0, "peak_bytes": 5 * 2**29},
        {"eval_loss": 123.456, "exact_match_after": 1.0, "train_seconds": 59.6, "peak_bytes": 2**29},
    ]
    runs = [read_run(write_run(tmp_path / str(i), **result)) for i, result in enumerate(results)]
    cells = {row.label: row.cells for row in compare(runs).figures}
    assert cells["held-out loss"] == ("0.1235", "123.5") and cells["held-out exact match"] == ("25.0%", "100.0%")
    assert cells["training time"] == ("1 h 2 min", "1 min 0 s") and cells["peak memory"] == ("2.68 GB", "0.54 GB")


def test_settings_that_make_results_incomparable_are_noted(tmp_path: Path):
    base = write_run(tmp_path / "a")
    others = {
        "data.eval.0.limit=9": "data.eval.0.limit",
        "generation.num_examples=7": "generation.num_examples",
        "distill=recover": "distill.objective",
        "model.name=other": "model.name",
    }
    for i, (word, note) in enumerate(others.items()):
        notes = compare([read_run(base), read_run(write_run(tmp_path / str(i), word))]).notes
        assert len([text for text in notes if note in text]) == 1
    assert compare([read_run(base), read_run(write_run(tmp_path / "same", "lora.rank=3"))]).notes == ()


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("eval_loss", [2.0, 1.0, None], {1}),
        ("exact_match_after", [0.2, 0.9, 0.9], {1, 2}),
        ("eval/x/accuracy", [0.2, 0.9], {1}),
        ("eval/x/perplexity", [0.2, 0.9], {0}),
        ("eval/x/reward_margin", [0.2, 0.9], {1}),
        ("eval_loss", [1.0, 1.0], set()),
        ("eval_loss", [None, None], set()),
        ("steps", [1.0, 2.0], set()),
        ("peak_bytes", [500_100_000, 500_200_000, 500_300_000], set()),  # All are shown as 0.50 GB.
        ("peak_bytes", [500_100_000, 500_200_000, 600_000_000], {0, 1}),
    ],
)
def test_best_is_lowest_or_highest_by_figure(name: str, values: list[float | None], best: set[int]):
    assert best_places(figure_named(name), values) == best


def test_labels_are_the_shortest_ends_that_differ():
    assert labels_of([Path("/r/a"), Path("/r/b")]) == ("a", "b")
    assert labels_of([Path("/r/a/x"), Path("/r/b/x")]) == ("a/x", "b/x")


def test_a_cell_breaks_no_table():
    lines = text_table([["a", "b"], ["x|y", "line\nbreak \x1b[31m"], ["n" * 99, ""]]).splitlines()
    assert len(lines) == 4 and "x\\|y" in lines[2] and "line break ␛[31m" in lines[2] and "…" in lines[3]


def test_many_runs_are_rows(tmp_path: Path):
    runs = [read_run(write_run(tmp_path / f"r{i}", f"lora.rank={i}")) for i in range(1, 8)]
    lines = as_text(compare(runs)).splitlines()
    assert len(lines) == 9 and lines[2].startswith("| r1")


def test_the_page_draws_every_quantity_of_every_run(folders: list[Path], tmp_path: Path):
    write_comparison(tmp_path / "c.html", "<b>t</b>", compare([read_run(folder) for folder in folders]))
    text = (tmp_path / "c.html").read_text()
    read = Reader(text)
    assert read.texts("h1") == ["<b>t</b>"]
    titles = [attrs["aria-label"] for tag, attrs, _ in read.elements if tag == "figure"]
    assert titles == [
        "Loss, nats per target token, training",
        "Loss, nats per target token, held out",
        "Held-out token accuracy, heldout",
        "Learning rate",
        "Gradient norm before clipping",
        "Throughput, tokens/s",
        "Peak memory, GB",
    ]
    assert "://" not in text.replace("http://www.w3.org/", "") and "<script" not in text


def test_the_command_prints_the_table_and_writes_the_page(folders: list[Path], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    assert main(["compare", "a", "b", f"out={tmp_path}/c.html"]) == 0
    shown = capsys.readouterr()
    assert "| lora.rank" in shown.out and f"page: {tmp_path}/c.html" in shown.err
    assert (tmp_path / "c.html").stat().st_size > 10_000


def test_comparing_and_planning_a_sweep_import_no_torch(folders: list[Path], tmp_path: Path):
    sweep = ["sweep", "config=quickstart.yaml", "lora.rank=4,8", f"sweep.out={tmp_path}/s", "--dry-run"]
    code = (
        "import sys; from finetune.cli import main\n"
        f"codes = [main({['compare', *map(str, folders)]}), main({sweep})]\n"
        "sys.exit(codes != [0, 0] or any(name in sys.modules for name in ('torch', 'transformers', 'optuna')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a"], "finetune report a"),
        (["a", "a"], "finetune report a"),
        (["a", "nope", "neither"], "neither"),
        (["a", "b", "out=."], "is a folder"),
        (["a", "b", "outt=c.html"], "did you mean out?"),
        (["a", "b", "--fast"], "unknown flag"),
        (["a", "b", "out=missing/c.html"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_refused(folders: list[Path], words: list[str], found: str, capsys, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    assert main(["compare", *words]) == 2
    assert found in capsys.readouterr().err


def test_runs_with_rewards_are_compared_by_them_and_not_by_losses(tmp_path: Path):
    settings = ("reward.loss=grpo", "reward.functions={exact: 1}")
    runs = [
        read_run(write_run(tmp_path / name, *settings, *more, reward_after=reward, eval_loss=-reward))
        for name, reward, more in (("a", 0.25, ()), ("b", 0.75, ("reward.functions={number: 1}",)))
    ]
    comparison = compare(runs)
    rows = {row.label: row for row in comparison.figures}
    assert rows["held-out reward"].cells == ("0.2500", "0.7500") and rows["held-out reward"].best == {1}
    assert not any("loss" in label for label in rows)
    assert any(note.startswith("reward.functions: ") for note in comparison.notes)
    plain = read_run(write_run(tmp_path / "c", eval_loss=2.0))
    rows = {row.label: row.cells for row in compare([runs[0], plain]).figures}
    assert rows["held-out loss"] == ("", "2.0000") and rows["held-out reward"] == ("0.2500", "")
