"""Pictures: an SVG that stands alone inside a page, a PNG that is whole, the same bits for the same numbers."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from finetune.system.plotting import curve, save_png, svg

LINES = {"train": ([1.0, 2.0, 3.0], [3.0, 2.0, 1.5]), "held out": ([1.0, 3.0], [3.1, 2.0])}


def test_an_svg_scales_and_refers_to_no_other_file():
    text = svg(curve("loss <a>", LINES, "step"))
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib and "height" not in root.attrib
    drawn = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
    assert {"loss <a>", "step", "train", "held out"} <= set(drawn)
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(link.startswith("#") for link in links)


def test_the_same_numbers_give_the_same_picture():
    assert svg(curve("loss", LINES, "step")) == svg(curve("loss", LINES, "step"))


def test_a_png_replaces_an_older_one_whole(tmp_path: Path):
    file = tmp_path / "loss.png"
    file.write_bytes(b"old")
    save_png(curve("loss", LINES, "step", logarithmic=True), file)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [found.name for found in tmp_path.iterdir()] == ["loss.png"]
