"""Answers are scored at each evaluation, also of the untrained model; a resumed run has an unbroken one's scores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune import load_config, train
from finetune.system.errors import ConfigError
from tests.runs import differing, metrics, result, small_run

SETTINGS = (
    "train.eval_every=2",
    "train.save_every=2",
    "train.keep_checkpoints=9",
    "generation.num_examples=6",
    "generation.max_new_tokens=8",
    "generation.metrics=[exact_match,rouge_l]",
)


def scores(folder: Path) -> list[tuple[float, float, float]]:
    (prefix,) = {name.rpartition("/")[0] for line in metrics(folder) for name in line if name.endswith("/rouge_l")}
    return [
        (line["step"], line[f"{prefix}/exact_match"], line[f"{prefix}/rouge_l"])
        for line in metrics(folder)
        if f"{prefix}/rouge_l" in line
    ]


def test_answers_are_scored_at_each_evaluation_and_after_a_resume_as_without_one(tmp_path, capfd):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(small_run(unbroken, *SETTINGS))
    printed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("evaluation:")]
    found = scores(unbroken)
    assert [step for step, _, _ in found] == [2, 4] and len(printed) == 2
    assert all(0 <= score <= 1 for _, *pair in found for score in pair)
    assert f"rouge_l={found[0][2]:.4g}" in printed[0]
    before, after = result(unbroken)["evaluations_before"], result(unbroken)["evaluations"]
    assert (
        {name.rpartition("/")[2] for name in before}
        == {"exact_match", "rouge_l"}
        <= {name.rpartition("/")[2] for name in after}
    )
    assert result(unbroken)["exact_match_after"] == found[-1][1]

    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / "checkpoint-4")
    train(small_run(broken, *SETTINGS, "train.resume=auto"))
    assert scores(broken) == found and differing(unbroken, broken) == []
    assert result(broken)["evaluations_before"] == before


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["generation.metrics=[exact_match]", "generation.num_examples=0"], "generation.metrics"),
        (["generation.metrics=[exact_match,exact_match]", "generation.num_examples=4"], "generation.metrics"),
        (["generation.metrics=[bleu]"], "generation.metrics"),
        (["generation.metrics=[exact_match]", "data.eval=[]"], "generation.metrics"),
    ],
)
def test_metrics_without_answers_are_an_error_of_the_config(overrides: list[str], key: str):
    with pytest.raises(ConfigError, match=key):
        load_config("quickstart.yaml", overrides)
