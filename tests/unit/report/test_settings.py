"""Settings that differ from the defaults, or between runs."""

from __future__ import annotations

import yaml

from finetune.config.compose import load_config, to_yaml
from finetune.report.settings import changes, differing


def config(*overrides: str) -> dict:
    return yaml.safe_load(to_yaml(load_config("quickstart.yaml", overrides)))


def test_every_changed_key_has_its_default_and_its_value():
    found = {change.key: change[1:] for change in changes(config("lora.rank=4", "train.learning_rate=1e-3"))}
    assert found["lora.rank"] == ("8", "4")
    assert found["train.learning_rate"] == ("0.0002", "0.001")
    assert found["data.max_length"] == ("2048", "256")
    assert found["data.train.0.path"][0] == ""
    assert not {"lora.alpha", "quant.type", "data.train.0.limit", "name", "output_dir"} & found.keys()


def test_a_key_of_another_version_is_shown():
    found = {change.key: change[1:] for change in changes({"lora": {"magic": [1, 2]}, "old": 3, "train": None})}
    assert found["lora.magic"] == ("", "[1, 2]") and found["old"] == ("", "3")


def test_a_mapping_of_module_names_is_one_setting():
    found = {change.key: change.value for change in changes(config("lora.rank_pattern={q_proj: 4}"))}
    assert found["lora.rank_pattern"] == '{"q_proj": 4}'


def test_differing_settings_are_those_that_are_not_equal_in_all_runs():
    alone = config("lora.rank=4", "data.eval=[]", "generation.num_examples=0")
    table = differing([config("lora.rank=4"), config("lora.rank=8", "name=other"), alone])
    assert table["lora.rank"] == ["4", "8", "4"]
    assert table["data.eval.0.path"][2] == "" and table["data.eval.0.path"][0]
    assert all(key.startswith(("lora.rank", "data.eval", "generation.num_examples")) for key in table)
