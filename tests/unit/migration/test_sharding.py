"""FSDP and DeepSpeed of other frameworks become parallel.shard where the meaning is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.migration.files import PeerConfig
from finetune.migration.migrate import migrate
from finetune.migration.sharding import read_sharding

FULL, HYBRID, NONE = ({"parallel.shard": word} for word in ("full", "hybrid", "none"))
OFFLOAD = {"parallel.offload": True}
ZERO_3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"fsdp": "full_shard auto_wrap"}, FULL),
        ({"fsdp": ["full_shard", "auto_wrap", "offload"]}, FULL | OFFLOAD),
        ({"fsdp": "hybrid_shard auto_wrap", "fsdp_config": {"min_num_params": 0}}, HYBRID),
        ({"fsdp": "shard_grad_op"}, NONE),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True, "reshard_after_forward": True}}, FULL | OFFLOAD),
        ({"fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD", "fsdp_offload_params": True}}, NONE),
        ({"deepspeed": "zero2"}, NONE),
        ({"deepspeed": "zero3_offload"}, FULL | OFFLOAD),
        ({"deepspeed": "examples/deepspeed/ds_z3_config.json"}, FULL),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, FULL),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, NONE),
        ({"dp_shard_size": 4}, FULL),
        ({"dp_shard_size": 4, "dp_replicate_size": 2}, HYBRID),
    ],
)
def test_a_strategy_becomes_ours(theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path):
    lost: list[str] = []
    assert read_sharding(theirs, tmp_path, lost) == ours and lost == []


def test_the_file_of_deepspeed_counts_more_than_its_name(tmp_path: Path):
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO_3))
    lost: list[str] = []
    assert read_sharding({"deepspeed": "zero2.json"}, tmp_path, lost) == FULL | OFFLOAD
    assert [line.split(":")[:2] for line in lost] == [["deepspeed", " offload_optimizer"]]


def test_an_unknown_file_is_reported(tmp_path: Path):
    lost: list[str] = []
    assert read_sharding({"deepspeed": "ds.json"}, tmp_path, lost) == {}
    assert lost[0].startswith("deepspeed: ds.json")


def test_an_8_bit_base_stays_whole_and_what_has_no_counterpart_is_named():
    settings = {"base_model": "Qwen/Qwen2.5-7B", "adapter": "lora", "load_in_8bit": True, "fsdp": ["full_shard"]}
    settings |= {"datasets": [{"path": "rows.jsonl"}], "tensor_parallel_size": 2, "context_parallel_size": 2}
    migration = migrate(PeerConfig(Path("a.yml"), "axolotl", settings))
    assert migration.settings["quant.type"] == "int8" and "parallel.shard" not in migration.settings
    assert {line.split(":")[0] for line in migration.lost} == {
        "parallel.shard",
        "tensor_parallel_size",
        "context_parallel_size",
    }
