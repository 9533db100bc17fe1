"""Measurements survive a kill, and are never taken for those of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.mixed_precision.divergences import MeanKl
from finetune.mixed_precision.journal import JOURNAL, RESULT, Journal, Sensitivities
from finetune.mixed_precision.sensitivity import ALL, Measured
from finetune.mixed_precision.summary import MARKDOWN, PICTURE, write_summary
from finetune.system.errors import ConfigError, IntegrityError

MADE_FROM = {"version": 1, "weights": {"a": "1"}, "mode": "only"}
FIRST = Measured("model.layers.0.mlp.up_proj", "nf4", MeanKl(1e-3, 1e-4, 50))
SECOND = Measured("model.layers.1.mlp.up_proj", "nf4", MeanKl(2.5e-6, 1e-7, 50))


def sensitivities(**changes: Any) -> Sensitivities:
    shapes = {f"model.layers.{i}.{name}": (8, 64) for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    measured = {
        (name, kind): MeanKl(0.1 * (1 + n), 0.01, 50) for n, name in enumerate(shapes) for kind in ("nf4", "int8")
    }
    measured |= {(ALL, kind): MeanKl(1.0, 0.1, 50) for kind in ("nf4", "int8")}
    content: dict[str, Any] = {
        "model": "base",
        "mode": "only",
        "kinds": ["nf4", "int8"],
        "rows": 7,
        "shapes": shapes,
        "measured": measured,
        "made_from": MADE_FROM,
    }
    return Sensitivities(**content | changes)


def test_what_was_measured_is_there_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new", MADE_FROM)
    assert journal.measured == {}
    for found in (FIRST, SECOND):
        journal.append(found)
    again = Journal(tmp_path / "new", MADE_FROM)
    assert again.measured == journal.measured == {(found.name, "nf4"): found.mean for found in (FIRST, SECOND)}


@pytest.mark.parametrize("torn_bytes", [1, 10, 60])
def test_a_line_that_a_kill_left_torn_is_measured_again(tmp_path: Path, torn_bytes: int) -> None:
    journal = Journal(tmp_path, MADE_FROM)
    for found in (FIRST, SECOND):
        journal.append(found)
    file = tmp_path / JOURNAL
    whole = file.read_bytes()
    file.write_bytes(whole[: -torn_bytes - 1])
    torn = Journal(tmp_path, MADE_FROM)
    assert list(torn.measured) == [(FIRST.name, "nf4")]
    torn.append(SECOND)
    assert file.read_bytes() == whole


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Journal(tmp_path, MADE_FROM).append(FIRST)
    with pytest.raises(ConfigError, match="measurements of other weights, mode; name another folder"):
        Journal(tmp_path, {**MADE_FROM, "weights": {"a": "2"}, "mode": "keep"})
    assert list(Journal(tmp_path, MADE_FROM).measured) == [(FIRST.name, "nf4")]


def test_another_programs_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('["mine"]\n')
    with pytest.raises(ConfigError, match="is not this command's"):
        Journal(tmp_path, MADE_FROM)
    assert (tmp_path / JOURNAL).read_text() == '["mine"]\n'
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        Journal(tmp_path / "file", MADE_FROM)


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    written = sensitivities()
    written.save(tmp_path)
    assert Sensitivities.read(tmp_path) == written
    assert (written.layers, written.targets) == (2, 50)


def test_what_is_no_result_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no sensitivity\.json"):
        Sensitivities.read(tmp_path)
    Journal(tmp_path, MADE_FROM)
    with pytest.raises(ConfigError, match="is not finished: give the same"):
        Sensitivities.read(tmp_path)
    for damage in ("", "[]", '{"all": {}}'):
        (tmp_path / RESULT).write_text(damage)
        with pytest.raises(IntegrityError, match="is damaged"):
            Sensitivities.read(tmp_path)


@pytest.mark.parametrize("mode", ["only", "keep"])
def test_the_summary_holds_every_figure(tmp_path: Path, mode: str) -> None:
    write_summary(sensitivities(mode=mode), tmp_path, True, "bfloat16")
    text = (tmp_path / MARKDOWN).read_text()
    assert all(f"{0.1 * (1 + n):.2e} ± 1e-02" in text for n in range(4)) and "1.00e+00 ± 1e-01" in text
    # The last costs most when it alone is changed, and is worth least where keeping it leaves most.
    first = text[text.index("nats a MB") :].splitlines()[2]
    assert ("model.layers.1.mlp.up_proj" if mode == "only" else "model.layers.0.self_attn.q_proj") in first
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
