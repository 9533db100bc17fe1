"""The model card: what the hub reads from it, and settings that give the same config."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard

from finetune.config.compose import load_config
from finetune.evaluation.generation import Answer
from finetune.training.run_folder import RunResult
from finetune.training.summary import describe_result, model_card

FIGURES = {"eval_loss": 1.0, "eval/faq/loss": 1.25, "eval/faq/accuracy": 0.5}


def test_a_card_names_base_datasets_and_measured_values(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("{}")
    words = ["model=qwen2.5-7b-instruct", f"data.train=[{{path: org/rows}}, {{path: {tmp_path}/rows.jsonl}}]"]
    data = ModelCard(model_card(load_config("lora.yaml", words), RunResult("finished", evaluations=FIGURES))).data
    assert data.base_model == "Qwen/Qwen2.5-7B-Instruct" and data.datasets == ["org/rows"]
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {("faq", "loss"): 1.25, ("faq", "accuracy"): 0.5}


def test_a_card_of_a_local_base_without_held_out_rows_is_valid(tmp_path: Path):
    config = load_config("quickstart.yaml")
    text = model_card(config, RunResult("finished"))
    assert ModelCard(text).data.base_model is None
    (tmp_path / "again.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_a_run_with_rewards_is_described_by_them(tmp_path: Path):
    """Not by its losses: the training loss is about 0, and the held-out one is minus the reward."""
    before = {"eval_loss": -0.25, "eval/a/reward": 0.25, "eval/a/reward_low": 0.125, "eval/a/reward_high": 0.5}
    after = {"eval_loss": -0.75, "eval/a/reward": 0.75, "eval/a/reward_low": 0.5, "eval/a/reward_high": 0.875}
    rewards = {"reward_before": 0.25, "reward_after": 0.75, "eval_loss": -0.75, "final_loss": 1e-9}
    result = RunResult("finished", evaluations_before=before, evaluations=after, **rewards)
    answers = [Answer("q", "", "no", 0.0)], [Answer("q", "", "yes", 1.0)]
    text = describe_result(result, *answers)
    figures = "0.25 [0.125, 0.5] before, 0.75 [0.5, 0.875] after"
    assert re.search(rf"held-out reward +{re.escape(figures)}\n", text) and "loss" not in text
    assert "'no'  reward 0\n" in text and "'yes'  reward 1\n" in text and "expected" not in text
    card = model_card(load_config("quickstart.yaml", ["reward.loss=grpo", "reward.functions={exact: 1}"]), result)
    table = card[card.index("|---|") : card.index("## Settings")]
    assert figures in table and "loss" not in table


def test_each_held_out_set_has_its_reward():
    rewards = {"eval/a/reward": 0.25, "eval/b/c/reward": 0.75}
    text = describe_result(RunResult("finished", evaluations=rewards, reward_after=0.5, eval_loss=-0.5), [], [])
    assert re.findall(r"held-out reward, (\S+) +(\S+) after", text) == [("a", "0.25"), ("b/c", "0.75")]
