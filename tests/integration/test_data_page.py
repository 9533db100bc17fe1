"""The page of `finetune data html=…`, checked by a parser and, if one is installed, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.cli import main
from tests.browser import CONTRAST, Page
from tests.html_reader import Reader

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> </pre> &amp; \x1b[31m"
QUESTION = f"{HOSTILE} <|im_end|> ⟦x⟧\n  two  spaces, 你好, שלום"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report on hostile rows, one of them weighted, some too long, with a leak."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"prompt": f"q {i} " + "long " * (i * 12), "completion": "an answer"} for i in range(30)]
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "half", "weight": 0.5}]
    write(folder / "a.jsonl", rows)
    write(folder / "b.jsonl", [{"messages": [*messages, {"role": "user", "content": "?"}, answer("whole")]}])
    write(folder / "<b>held.jsonl", rows[:2])
    settings = [
        f"data.train=[{{path: '{folder}/a.jsonl'}},{{path: '{folder}/b.jsonl', name: '<i>b</i>'}}]",
        f"data.eval=[{{path: '{folder}/<b>held.jsonl'}}]",
        "data.max_length=250",
    ]
    assert main(["data", "config=quickstart.yaml", *settings, "show=40", f"html={folder}/page.html"]) == 0
    return folder / "page.html"


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def read(page_file: Path) -> Reader:
    return Reader(page_file.read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_self_contained(read: Reader, page_file: Path):
    assert read.texts("h1") == ["quickstart"] and read.texts("title")[0] == "quickstart: data report"
    assert read.texts("h2") == ["Warnings", "Sources", "Training rows", "Source details", "Examples"]
    assert not {"script", "img", "link", "iframe", "a", "i", "u", "b"} & {name for name, _, _ in read.elements}
    attributes = {name for _, attrs, _ in read.elements for name in attrs}
    assert not {name for name in attributes if name.startswith("on")} | ({"src", "href", "style"} & attributes)
    text = page_file.read_text(encoding="utf-8")
    assert "://" not in text and "@import" not in text and "url(" not in text


def test_rows_are_shown_unchanged_with_their_targets_marked(read: Reader):
    rows = [text for text in read.texts("pre") if "half" in text]
    assert len(rows) == 1 and QUESTION.replace("\x1b", "␛") in rows[0]
    assert "×0.5half<|im_end|>" in read.texts("mark") and "whole<|im_end|>" in read.texts("mark")
    spelled = [text for _, attrs, text in read.elements if attrs.get("class") == "spelled"]
    assert spelled.count("<|im_end|>") == 1


def test_the_page_holds_the_statistics(read: Reader):
    cells = read.texts("td")
    assert {"a", "<i>b</i>", "<b>held", "together"} <= set(cells)
    assert cells[cells.index("a") : cells.index("a") + 3] == ["a", "train", "30"]
    advice = read.texts("li")
    assert advice[0].startswith("Leak. <b>held: 2 of 2 rows") and any("data.max_length=250" in t for t in advice)
    bars = [attrs for name, attrs, _ in read.elements if name == "rect"]
    assert any(attrs.get("class") == "over" for attrs in bars) and any("class" not in attrs for attrs in bars)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(browser: Page, page_file: Path, scheme: str):
    browser.look(scheme=scheme)
    browser.open(page_file)
    assert browser.evaluate("document.querySelectorAll('mark').length") > 20
    assert browser.evaluate(CONTRAST) == []
    paper = "getComputedStyle(document.body).backgroundColor"
    bright = sum(map(int, browser.evaluate(paper).removeprefix("rgb(").removesuffix(")").split(","))) > 384
    assert bright == (scheme == "light")
    colors = (
        "[...new Set([...document.querySelectorAll('pre, pre mark')].map(n => getComputedStyle(n).backgroundColor))]"
    )
    assert len(browser.evaluate(colors)) == 3  # a row, a target, a target of another weight
    assert browser.screenshot().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_window(browser: Page, page_file: Path, width: int):
    browser.look(width)
    browser.open(page_file)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_rows_run_nothing_and_load_nothing(browser: Page, page_file: Path):
    browser.look()
    browser.open(page_file)
    assert browser.evaluate("document.title") == "quickstart: data report"
    requested = [
        e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
    ]
    assert requested == [page_file.as_uri()]
    assert not [e for e in browser.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    shown = browser.evaluate("[...document.querySelectorAll('pre')].map(node => node.textContent)")
    assert any(QUESTION.replace("\x1b", "␛") in text for text in shown)


def test_the_length_of_a_bar_is_proportional_to_its_rows(browser: Page, page_file: Path):
    browser.look()
    browser.open(page_file)
    bars = browser.evaluate(
        "[...document.querySelector('svg').querySelectorAll('g')].map(g => [g.querySelector('rect')."
        "getBoundingClientRect().width, +g.lastElementChild.textContent, g.querySelector('rect').className.baseVal])"
    )
    assert sum(rows for _, rows, _ in bars) == 31
    longest, most = max(width for width, _, _ in bars), max(rows for _, rows, _ in bars)
    assert all(abs(width / longest - rows / most) < 0.01 for width, rows, _ in bars)
    over = [kind == "over" for _, _, kind in bars]
    assert over == sorted(over) and True in over and False in over
    line = browser.evaluate("document.querySelector('svg line').getBoundingClientRect().y")
    tops = browser.evaluate(
        "[...document.querySelector('svg').querySelectorAll('rect')].map(r => r.getBoundingClientRect().y)"
    )
    assert [top > line for top in tops] == over
