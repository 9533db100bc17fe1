"""What readers see of a gap table: every figure at its model and its name, as text and as a picture."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from finetune.evaluation.gap_table import GapTable, ModelFigures, SetFigures, TaskFigures, load_gap, to_json
from finetune.evaluation.gap_text import gap_figure, gap_markdown
from finetune.evaluation.intervals import Estimate
from finetune.system.manifest import sha256_of

NAMES = {"base": "bf16 base", "quantized": "NF4 base", "trained": "NF4 + adapter", "merged": "merged"}


def around(value: float) -> Estimate:
    return Estimate(value, value * 0.9, value * 1.1)


def model(number: int, variant: str, forgetting: bool = True) -> ModelFigures:
    """Every figure of every model is another number."""
    task = {"loss": 1, "perplexity": 2, "accuracy": 0.3, "score": 0.4}
    if number:
        task |= {"kl": 0.5, "kl_p99": 6, "top1": 0.7}
    figures = {name: around(value + number / 100) for name, value in task.items()}
    differences = {"loss": around(-0.1 - number / 100), "score": around(0.2 + number / 100)} if number else {}
    sets = [SetFigures("heldout", 24, 700, False, 20, figures, differences)]
    if forgetting:
        sets.append(SetFigures("general", 30, 900, True, 0, {"loss": around(3 + number / 100)}, {}))
    tasks = [TaskFigures("gsm8k", "exact_match", 16, around(0.11 + number / 100))]
    return ModelFigures(variant, NAMES[variant], 1_500_000 * (number + 1), sets, tasks)  # type: ignore[arg-type]


@pytest.fixture
def table() -> GapTable:
    made_with = {"finetune": "1.2", "torch": "3.4", "device": "CPU", "date": "2026-01-02T03:04:05"}
    models = [model(number, variant) for number, variant in enumerate(NAMES)]
    return GapTable("runs/a", "tiny", "base", "exact match", 1000, 0, 12.3, made_with, models)


def grids(markdown: str) -> list[dict[str, dict[str, str]]]:
    """Each table of a text: label of a row -> head of a column -> cell."""
    found = []
    for part in markdown.split("\n\n"):
        if part.startswith("|"):
            head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            found.append({label: dict(zip(head[1:], cells, strict=True)) for label, *cells in body})
    return found


def test_each_figure_stands_at_its_model_with_its_interval(table):
    heldout, differences, general, tasks = grids(gap_markdown(table))
    assert list(heldout["loss, nats"]) == list(NAMES.values())
    assert heldout["loss, nats"]["NF4 base"] == "1.0100 [0.9090, 1.1110]"
    assert heldout["exact match, %"]["merged"] == "43.0 [38.7, 47.3]"
    assert heldout["KL from bf16 base, nats"] == {
        "bf16 base": "",
        "NF4 base": "0.5100 [0.4590, 0.5610]",
        "NF4 + adapter": "0.5200 [0.4680, 0.5720]",
        "merged": "0.5300 [0.4770, 0.5830]",
    }
    assert heldout["bytes"]["NF4 + adapter"] == "4.5 MB"
    assert list(differences["loss, nats"]) == ["NF4 base", "NF4 + adapter", "merged"]
    assert differences["exact match, %"]["NF4 base"] == "+21.0 [+18.9, +23.1]"
    assert general["loss, nats"]["merged"] == "3.0300 [2.7270, 3.3330]" and "exact match, %" not in general
    assert tasks["gsm8k"] == {"metric": "exact_match", "rows": "16"} | {
        name: f"{value:.4f} [{0.9 * value:.4f}, {1.1 * value:.4f}]"
        for name, value in zip(NAMES.values(), (0.11, 0.12, 0.13, 0.14), strict=True)
    }


def test_columns_stand_below_each_other(table):
    for part in gap_markdown(table).split("\n\n"):
        if part.startswith("|"):
            bars = {tuple(found.start() for found in re.finditer(r"\|", line)) for line in part.splitlines()}
            assert len(bars) == 1


def test_the_text_names_models_rows_and_versions(table):
    text = gap_markdown(table)
    assert text.startswith("# runs/a on tiny\n") and "24 rows, 700 target tokens, 20 answered." in text
    assert "## general (" in text
    assert "Measured 2026-01-02 in 12 s on CPU with finetune 1.2, torch 3.4, seed 0." in text


def test_the_picture_shows_each_figure_at_its_model(table):
    loss, accuracy, score, kl = gap_figure(table).axes
    assert [label.get_text() for label in loss.get_yticklabels()][2] == "NF4 + adapter\n4.5 MB"
    drawn = {text.get_text(): text.xy for text in loss.texts}
    assert drawn["1.0100"][0] == 1.01 and drawn["1.0100"][1] == pytest.approx(1, abs=0.5)
    assert drawn["3.0300"][1] == pytest.approx(3, abs=0.5) and len(drawn) == 8
    assert [text.get_text() for text in accuracy.texts] == ["30.0", "31.0", "32.0", "33.0"]
    assert score.get_title() == "exact match, %" and score.texts[3].xy[0] == pytest.approx(43)
    assert [text.get_text() for text in kl.texts] == ["0.5100", "0.5200", "0.5300"]
    assert loss.get_ylim()[0] > loss.get_ylim()[1], "the first model is on top"


def test_a_table_of_tasks_alone_has_no_sets(table):
    alone = replace(table, models=[replace(model, sets=[]) for model in table.models], metric=None)
    assert len(grids(gap_markdown(alone))) == 1


def test_a_table_of_an_earlier_training_is_none_of_this_adapter(table, tmp_path):
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"first")
    of_these = replace(table, adapter_files={weights.name: sha256_of(weights)})
    (tmp_path / "gap.json").write_text(to_json(of_these))
    assert load_gap(tmp_path) is not None
    weights.write_bytes(b"trained on")
    assert load_gap(tmp_path) is None
    weights.unlink()  # in a folder of its own it stays what it is
    assert load_gap(tmp_path) is not None
