"""Measurements survive a kill, and are not mixed with those of other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.mixed_precision.journal import (
    ALL,
    JOURNAL,
    MARKDOWN,
    PICTURE,
    RESULT,
    Journal,
    MeanKl,
    Measured,
    Sensitivities,
    write_summary,
)
from finetune.system.errors import ConfigError, IntegrityError
from finetune.system.sealed import unseal

MADE_FROM = {"version": 1, "weights": {"a": "1"}, "dtype": "bfloat16"}
FIRST = Measured("model.layers.0.mlp.up_proj", "nf4", MeanKl(1e-3, 1e-4, 50))
SECOND = Measured("model.layers.1.mlp.up_proj", "nf4", MeanKl(2.5e-6, 1e-7, 50))


def sensitivities() -> Sensitivities:
    shapes = {f"model.layers.{i}.{name}": (8, 64) for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    measured = {
        (name, kind): MeanKl(0.1 * (1 + n), 0.01, 50) for n, name in enumerate(shapes) for kind in ("nf4", "int8")
    }
    measured |= {(ALL, kind): MeanKl(1.0, 0.1, 50) for kind in ("nf4", "int8")}
    return Sensitivities("base", ["nf4", "int8"], 7, shapes, measured, MADE_FROM)


def test_measurements_are_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new", MADE_FROM)
    assert journal.measured == {}
    for found in (FIRST, SECOND):
        journal.append(found)
    again = Journal(tmp_path / "new", MADE_FROM)
    assert again.measured == journal.measured == {(found.name, "nf4"): found.mean for found in (FIRST, SECOND)}


@pytest.mark.parametrize("torn_bytes", [1, 10, 60])
def test_a_line_that_a_kill_cut_off_is_measured_again(tmp_path: Path, torn_bytes: int) -> None:
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


def test_other_settings_are_refused_with_their_names(tmp_path: Path) -> None:
    Journal(tmp_path, MADE_FROM).append(FIRST)
    with pytest.raises(ConfigError, match="dtype, weights"):
        Journal(tmp_path, {**MADE_FROM, "weights": {"a": "2"}, "dtype": "float16"})
    assert list(Journal(tmp_path, MADE_FROM).measured) == [(FIRST.name, "nf4")]


def test_another_programs_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('["mine"]\n')
    with pytest.raises(ConfigError, match=r"measured\.jsonl: corrupt, or not written by"):
        Journal(tmp_path, MADE_FROM)
    assert (tmp_path / JOURNAL).read_text() == '["mine"]\n'
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Journal(tmp_path / "file", MADE_FROM)


def test_results_are_read_back_unchanged(tmp_path: Path) -> None:
    written = sensitivities()
    written.save(tmp_path)
    assert Sensitivities.read(tmp_path) == written
    assert written.layers == 2


def test_missing_incomplete_and_corrupt_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no sensitivity\.json"):
        Sensitivities.read(tmp_path)
    Journal(tmp_path, MADE_FROM)
    with pytest.raises(ConfigError, match="not complete"):
        Sensitivities.read(tmp_path)
    for damage in ("", "[]", '{"all": {}}'):
        (tmp_path / RESULT).write_text(damage)
        with pytest.raises(IntegrityError, match=r"sensitivity\.json: corrupt"):
            Sensitivities.read(tmp_path)


def test_sensitivities_of_the_removed_mode_are_refused(tmp_path: Path) -> None:
    sensitivities().save(tmp_path)
    file = tmp_path / RESULT
    file.write_text(json.dumps({**unseal(json.loads(file.read_text())), "mode": "only"}))
    assert Sensitivities.read(tmp_path) == sensitivities()
    file.write_text(json.dumps({**unseal(json.loads(file.read_text())), "mode": "keep"}))
    with pytest.raises(ConfigError, match="mode=keep"):
        Sensitivities.read(tmp_path)


def test_the_summary_holds_every_value(tmp_path: Path) -> None:
    write_summary(sensitivities(), tmp_path, True, "bfloat16")
    text = (tmp_path / MARKDOWN).read_text()
    assert all(f"{0.1 * (1 + n):.2e} ± 1e-02" in text for n in range(4)) and "1.00e+00 ± 1e-01" in text
    first_ranked = text[text.index("nats per MB") :].splitlines()[2]
    assert "model.layers.1.mlp.up_proj" in first_ranked
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
