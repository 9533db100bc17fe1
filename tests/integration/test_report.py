"""report.html of a real run, drawn in a real browser if one is installed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from finetune import train
from finetune.cli import main
from tests.browser import CONTRAST, DRAWN, Page
from tests.html_reader import Reader
from tests.runs import small_run

CURVES = [
    "Loss, nats per target token",
    "Held-out token accuracy",
    "Learning rate",
    "Gradient norm before clipping",
    "Throughput, tokens/s",
    "Peak memory, GB",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with answers before and after, and evaluate it beside its base."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    train(small_run(folder, "generation.num_examples=3", "generation.max_new_tokens=8", "train.eval_every=2"))
    words = ("limit=6", "answers=3", "variants=[base,quantized,trained]", "resamples=100", "max_new_tokens=8")
    assert main(["eval", f"adapter={folder}", *words]) == 0
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page_file(folder: Path) -> Path:
    return folder / "report.html"


@pytest.fixture(scope="module")
def read(page_file: Path) -> Reader:
    return Reader(page_file.read_text(encoding="utf-8"))


def stored(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_the_page_is_well_formed_and_self_contained(read: Reader, page_file: Path):
    assert not {"script", "img", "link", "iframe", "a"} & {name for name, _, _ in read.elements}
    attributes = {name for _, attrs, _ in read.elements for name in attrs}
    assert not {name for name in attributes if name.startswith("on")} | ({"src", "href"} & attributes)
    text = page_file.read_text(encoding="utf-8")
    assert "://" not in text.replace("http://www.w3.org/", "") and "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    ids = [attrs["id"] for _, attrs, _ in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) == set(ids)


def test_the_page_has_every_section(read: Reader):
    assert read.texts("h2") == [
        "Curves",
        "Answers before and after",
        "Worst answers",
        "Quantization gap and gain of training",
        "Predicted and measured",
        "Data",
        "A training example",
        "Non-default settings",
        "Environment",
        "Next steps",
    ]


def test_the_page_shows_the_results(read: Reader, folder: Path):
    result = stored(folder, "result.json")
    labels = read.texts("dt")
    shown = dict(zip(labels, read.texts("dd"), strict=True))
    assert shown["held-out loss"] == f"{result['eval_loss']:.4f}" and shown["steps"] == "4"
    assert shown["peak memory"] == f"{result['peak_bytes'] / 1e9:.2f} GB"
    cells = read.texts("td")
    measured = [f"{result[key] / 1e9:.2f} GB" for key in ("predicted_peak_bytes", "peak_bytes")]
    assert cells[cells.index("peak memory") + 1 :][:2] == measured
    assert "training time" in cells and result["predicted_train_seconds"] > 0
    facts = stored(folder, "run.json")
    assert shown["cpu"] == facts["hardware"]["cpu"] and shown["threads"] == str(facts["hardware"]["threads"])
    assert result["duration_seconds"] > result["train_seconds"]
    assert shown["held-out perplexity"] == f"{math.exp(result['eval_loss']):.4f}"
    assert cells[cells.index("lora.dropout") + 1 :][:2] == ["0.1", "0.0"]
    assert shown["torch"] == stored(folder, "run.json")["versions"]["torch"]


def test_answers_and_an_example_with_targets_are_shown(read: Reader, folder: Path):
    shown = list(zip(read.texts("dt"), read.texts("dd"), strict=True))
    for sample in stored(folder, "samples.json"):
        assert ("prompt", sample["prompt"]) in shown and ("expected", sample["expected"]) in shown
        assert ("before", sample["before"] or "(nothing)") in shown and (
            "after",
            sample["after"] or "(nothing)",
        ) in shown
    row = next(text for text in read.texts("pre") if "<|im_start|>user" in text)
    (target,) = [text for text in read.texts("mark") if text in row and "product" in text]
    assert row.endswith(f"<|im_start|>assistant\n{target}") or target in row.rpartition("assistant")[2]


def test_the_gap_table_has_every_model(read: Reader, folder: Path):
    heads = read.texts("th")
    assert {model["name"] for model in stored(folder, "gap.json")["models"]} <= set(heads)


def test_a_curve_has_a_point_for_every_step(read: Reader, page_file: Path, folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = page_file.read_text().split('aria-label="Learning rate"')[1].split("</figure>")[0]
    curves = [path for path in re.findall(r'<path d="([^"]+)"[^>]*--line-1', figure) if path.count("L") > 1]
    assert [len(re.findall("[ML]", curve)) for curve in curves] == [len(lines)] == [4]


def test_every_picture_is_drawn_without_network(browser: Page, page_file: Path):
    browser.look()
    browser.open(page_file)
    drawn = browser.evaluate(DRAWN)
    labels = [label for label, _ in drawn]
    assert labels == [*CURVES, "Quantization gap and gain of training", None]
    for label, shapes in drawn:
        assert len(shapes) > 1 and all(shapes), label
    assert browser.troubles() == []
    assert [event["params"]["request"]["url"] for event in browser.events if "request" in event.get("params", {})] == [
        page_file.as_uri()
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(browser: Page, page_file: Path, scheme: str):
    browser.look(scheme=scheme)
    browser.open(page_file)
    assert browser.evaluate(CONTRAST) == []
    paper = "getComputedStyle(document.body).backgroundColor"
    bright = sum(map(int, browser.evaluate(paper).removeprefix("rgb(").removesuffix(")").split(","))) > 384
    assert bright == (scheme == "light")


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_window(browser: Page, page_file: Path, width: int):
    browser.look(width)
    browser.open(page_file)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_compared_runs_share_their_pictures(browser: Page, folder: Path, tmp_path: Path, capsys):
    other = folder.parent / "b"
    train(small_run(other, "train.learning_rate=1e-3", "train.max_steps=2"))
    capsys.readouterr()
    assert main(["compare", str(folder), str(other), f"out={tmp_path}/c.html"]) == 0
    table = {
        line.split("|")[1].strip(): [cell.strip(" *") for cell in line.split("|")[2:4]]
        for line in capsys.readouterr().out.splitlines()
    }
    results = [stored(run, "result.json") for run in (folder, other)]
    assert table["held-out loss"] == [f"{result['eval_loss']:.4f}" for result in results]
    assert table["training loss"] == [f"{result['final_loss']:.4f}" for result in results]
    assert table["train.learning_rate"] == ["0.005", "0.001"] and table["steps"] == ["4", "2"]
    browser.look()
    browser.open(tmp_path / "c.html")
    drawn = browser.evaluate(DRAWN)
    assert len(drawn) == 7 and all(len(shapes) > 2 and all(shapes) for _, shapes in drawn)
    assert browser.troubles() == [] and browser.evaluate(CONTRAST) == []
    strokes = "[...new Set([...document.querySelectorAll('.lines path')].map(n => getComputedStyle(n).stroke))].length"
    assert browser.evaluate(strokes) == 2
