"""A few kills of the campaign, and that it sees what a kill could leave."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.system.locks import locked
from tests.faults.kills import JOBS, Reference, draw_place, run
from tests.faults.outcome import content_of, differences, held_locks


def test_killed_commands_end_in_the_files_of_undisturbed_ones():
    figures = run(seed=0, count=5, minutes=None, jobs=("train", "merge"))
    assert (figures["lost"], figures["kills"]) == (0, 5), figures["problems"]


def test_every_command_survives_kills():
    figures = run(seed=1, count=40, minutes=None)
    assert figures["trials"] >= len(JOBS)  # a kill can come after the end of a command
    assert (figures["lost"], figures["kills"]) == (0, 40), figures["problems"]


def write(folder: Path, **files: str) -> dict[str, Any]:
    """Write a folder with files, `a_txt` as a.txt, and return its content."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return content_of(folder)


def test_a_file_that_is_missing_left_over_or_different_is_named(tmp_path):
    one, two, three = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    expected = write(one, a_txt="1", b_json='{"loss": 1, "seconds": 1}', c_txt=f"in {one}")
    assert differences(expected, write(two, a_txt="1", b_json='{"seconds": 2, "loss": 1}', c_txt=f"in {two}")) == []
    found = write(three, b_json='{"loss": 2}', c_txt=f"in {three}", d_tmp="")
    assert differences(expected, found) == ["a.txt: missing", "d.tmp: left over", "b.json: different"]


def test_a_lock_that_stays_is_named(tmp_path):
    with locked(tmp_path / "free.lock"):
        pass
    with locked(tmp_path / "mine.lock"):
        assert held_locks(tmp_path) == ["mine.lock: held"]


def test_places_of_kills_are_spread_over_all_kinds(tmp_path):
    reference = Reference(tmp_path, Counter({"open": 20, "fsync": 5, "rename": 2}), 1.0, {}, 1000)
    rng = random.Random(0)
    places = [draw_place(reference, rng) for _ in range(400)]
    assert {place.name for place in places} == {"open", "fsync", "rename", "write"}
    assert all(1 <= place.call <= reference.operations[place.operation] for place in places)
    assert all(count > 60 for count in Counter(place.name for place in places).values())
    assert all(place.byte < 1000 for place in places if place.byte is not None)
