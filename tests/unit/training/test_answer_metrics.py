"""Answers are scored at each evaluation, also of the untrained model; a resumed run has an unbroken one's scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from finetune import load_config, train
from finetune.report.run import read_run
from finetune.report.run_page import write_report
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged
from tests.html_reader import Reader
from tests.runs import REWARDED_RUN, differing, metrics, result, small_run

SETTINGS = (
    "train.eval_every=2",
    "train.save_every=2",
    "train.keep_checkpoints=9",
    "generation.num_examples=6",
    "generation.max_new_tokens=8",
    "generation.metrics=[exact_match,rouge_l]",
)

# Answers without a colon are right. Sampling and training must agree, so without noise.
REWARDED = (
    *REWARDED_RUN,
    "reward.functions={format: 1}",
    "reward.format='[^:]*'",
    "reward.length=null",
    "lora.dropout=0",
    "train.neftune_alpha=0",
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


def test_a_run_on_pairs_answers_their_prompts_and_expects_the_chosen_side(tmp_path):
    rows = ("data.train.0.limit=12", "data.eval.0.limit=4", "train.batch_size=2")
    settings = [
        *SETTINGS,
        *rows,
        "train.max_steps=2",
        "train.eval_every=1",
        "generation.samples=4",
        f"output_dir={tmp_path}",
    ]
    train(load_config("dpo.yaml", settings))
    names = [f"eval/pairs-heldout/{name}" for name in ("exact_match", "rouge_l")]
    last = metrics(tmp_path)[-1]
    assert [result(tmp_path)["evaluations"][name] for name in names] == [last[name] for name in names]
    pairs = [json.loads(line) for line in (packaged("data") / "sample" / "pairs-heldout.jsonl").open()][:4]
    shown = read_run(tmp_path).samples
    assert [(row["prompt"], row["expected"]) for row in shown] == [(pair["prompt"], pair["chosen"]) for pair in pairs]
    page = Reader(write_report(tmp_path).read_text())
    assert {"Generated answers: exact match", "Generated answers: ROUGE-L"} <= {*page.texts("h3")}
    assert {"Answers before and after", "Worst answers"} <= {*page.texts("h2")}


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


def test_answers_are_judged_before_training_and_at_each_evaluation_and_kept_with_their_rewards(tmp_path, capfd):
    """A row's reward is 1 for an answer without a colon: the mean of the kept rewards is the figure."""
    words = (*REWARDED, "generation.samples=6", "generation.every=3", "train.eval_every=2")
    train(small_run(tmp_path, *words))
    found = result(tmp_path)
    kept = json.loads((tmp_path / "samples.json").read_text())
    assert len(kept) == 6
    for when, figures in (("before", found["evaluations_before"]), ("after", found["evaluations"])):
        assert all(row[f"{when}_reward"] == (":" not in row[when]) for row in kept)
        (name,) = [name for name in figures if name.endswith("/reward")]
        assert figures[name] == pytest.approx(sum(row[f"{when}_reward"] for row in kept) / 6)
        assert found[f"reward_{when}"] == figures[name] and figures[f"{name}_low"] <= figures[name]
    judged = json.loads((tmp_path / "rewarded_answers.json").read_text())
    assert judged["answered"] == 6 and [len(judged[name]) for name in ("best", "worst")] == [3, 3]
    assert min(row["after_reward"] for row in judged["best"]) >= max(row["after_reward"] for row in judged["worst"])
    assert not (tmp_path / "worst_answers.json").exists()
    shown = [re.findall(r"^  ('.*') -> .*  reward ([\d.]+)$", line) for line in capfd.readouterr().err.splitlines()]
    (best, high), (worst, low) = [found for [found] in filter(None, shown)]
    assert best == worst and float(high) >= float(low)


def test_a_finished_run_that_is_continued_keeps_its_judged_answers(tmp_path):
    train(small_run(tmp_path, *REWARDED))
    names = ("samples.json", "rewarded_answers.json")
    first = [(tmp_path / name).read_text() for name in names]
    train(small_run(tmp_path, *REWARDED, "train.resume=auto"))
    assert [(tmp_path / name).read_text() for name in names] == first
