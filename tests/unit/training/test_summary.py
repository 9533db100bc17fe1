"""The model card: what the hub reads from it, and settings that give the same config."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard

from finetune.config.compose import load_config
from finetune.training.run_folder import RunResult
from finetune.training.summary import model_card

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
