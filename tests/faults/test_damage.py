"""A hundred damaged files of every kind: each damage is found, or repaired with a word, before the file is used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from finetune.system.errors import IntegrityError
from tests.faults import damage, damage_targets
from tests.runs import reference_run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, which all targets share."""
    folder = reference_run("train.save_every=1", "train.max_steps=2", "train.keep_checkpoints=2")
    build = damage_targets.build_targets
    monkeypatch.setattr(damage_targets, "build_targets", lambda place: build(place, folder))
    return folder


def test_no_damage_is_missed(run: Path):
    figures = damage.run(seed=1, count=100)
    assert figures["lost"] == 0, figures["examples"]
    assert figures["cases"] == 100 and figures["found"] > 30 and figures["repaired"] > 15


def test_a_reader_that_checks_nothing_loses_cases(tmp_path: Path):
    (tmp_path / "a").write_bytes(bytes(range(200)))
    target = damage.Target("plain", tmp_path, ("a",), lambda: (tmp_path / "a").read_bytes())
    right = damage._right(target)
    assert damage.attempt(target, "a", b"other", right)[0] == "missed"

    def refuse(error: Exception) -> None:
        raise error

    expected = {"found": IntegrityError("a: corrupt"), "unnamed": IntegrityError("c"), "crashed": KeyError("a")}
    for outcome, error in expected.items():
        one = damage.Target("plain", tmp_path, ("a",), lambda error=error: refuse(error), pristine=target.pristine)
        assert damage.attempt(one, "a", b"other", right)[0] == outcome
    assert (tmp_path / "a").read_bytes() == bytes(range(200)), "what was damaged is restored"


def test_every_kind_of_damage_changes_the_bytes():
    rng, content = damage.random.Random(0), damage.random.Random(1).randbytes(3 * damage.PAGE)
    kinds = Counter(damage.damaged(content, rng)[0] for _ in range(200))
    assert kinds.keys() == {"flip", "cut", "zeros", "swap", "append"}
    for end in (8, 100):  # only the beginning, or the size
        for _ in range(50):
            changed = damage.damaged(content, rng, end)[1]
            assert changed != content and (len(changed) != len(content) or changed[end:] == content[end:])
