"""The quickstarts with pictures and sounds: they teach their skill, and the answers come from the media."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import load_config, train
from finetune.evaluation.gap_table import load_gap

# Config, and its data.
QUICKSTARTS = [("vision", "vision"), ("audio", "audio"), ("vision", "both")]


def exchanged(rows: Path, folder: Path) -> Path:
    """Write the rows with the media of the next row, by absolute path."""
    before = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    lines = []
    for row, following in zip(before, before[1:] + before[:1], strict=True):
        media = {
            column: [str(rows.parent / file) for file in following[column]]
            for column in ("images", "audios")
            if column in row
        }
        lines.append(json.dumps(row | media) + "\n")
    (folder / "exchanged.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "exchanged.jsonl"


@pytest.mark.parametrize(("name", "data"), QUICKSTARTS, ids=lambda word: word)
def test_a_quickstart_teaches_a_skill_that_needs_the_media(finetune_command, name: str, data: str, tmp_path: Path):
    cfg = load_config(f"quickstart-{name}.yaml", [f"data={data}", f"output_dir={tmp_path}/run"])
    run = train(cfg)
    assert run.exact_match_before <= 0.1 and run.exact_match_after >= 0.8
    wrong = exchanged(Path(cfg.data.eval[0].path), tmp_path)
    done = finetune_command(
        "eval", f"adapter={run.adapter}", f"data=[{{path: {wrong}}}]", "variants=[trained]", "out=found"
    )
    assert done.returncode == 0, done.stderr
    [trained] = load_gap(tmp_path / "found").models
    assert trained.sets[0].figures["score"].value < 0.3
