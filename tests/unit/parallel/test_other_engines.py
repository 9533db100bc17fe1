"""Engines of a launcher that a run does not use are refused, each by its name and with what replaces it."""

from __future__ import annotations

import pytest

from finetune import load_config
from finetune.parallel.other_engines import refuse_other_engines
from finetune.system.errors import ConfigError

PLAN = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "parallel.shard=full"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "FSDP2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (PLAN | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
        (PLAN | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, "context parallelism"),
        (PLAN | {"PARALLELISM_CONFIG_SP_SIZE": "2"}, "sequence parallelism"),
        (PLAN | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "8", "PARALLELISM_CONFIG_TP_SIZE": "1"}, "parallel.shard=full"),
        (PLAN | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, "parallel.shard=hybrid"),
        (PLAN, "parallel.shard"),
    ],
)
def test_an_engine_is_refused_by_name(environment: dict[str, str], named: str):
    with pytest.raises(ConfigError) as refused:
        refuse_other_engines(environment)
    problem, advice = str(refused.value).splitlines()
    assert problem.split(":")[0] == list(environment)[-1 if len(environment) < 3 else 1] and named in problem
    assert advice.startswith("help: ")


def test_a_launcher_that_only_starts_ranks_is_accepted():
    refuse_other_engines({"ACCELERATE_USE_FSDP": "false", "PARALLELISM_CONFIG_TP_SIZE": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("deepspeed", "FSDP2"),
        ("fsdp", "parallel.shard"),
        ("tensor_parallel_size", "tensor parallelism"),
        ("context_parallel_size", "a sequence lies on one GPU"),
        ("sequence_parallel_size", "a sequence lies on one GPU"),
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("parallel.tp_size", "tensor parallelism"),
    ],
)
def test_keys_of_other_engines_are_answered(key: str, reason: str):
    with pytest.raises(ConfigError) as refused:
        load_config("lora.yaml", [f"{key}=2"], needs_data=False)
    assert reason in str(refused.value)
