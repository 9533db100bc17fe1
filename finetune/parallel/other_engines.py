"""Engines of a launcher that share a model in another way than this room, refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from finetune.system.errors import ConfigError

# What `accelerate launch` sets -> the engine, and why a run does not use it.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "accelerate's FSDP plugin: parallel.shard=full replaces it",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: FSDP2 shares a base here; set parallel.shard=full in place of ZeRO-3",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: parallel.shard=full shares a base over GPUs",
}
_PLAN = "ACCELERATE_USE_PARALLELISM_CONFIG"
_SIZES = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism: parallel.shard=full shares a base over GPUs",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism: a sequence lies on one GPU; "
    "train.gradient_checkpointing=offload makes room for long ones",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism: a sequence lies on one GPU; "
    "train.gradient_checkpointing=offload makes room for long ones",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "a number of ranks that share a model: parallel.shard=full takes all ranks, "
    "hybrid those of each machine",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "a number of copies: parallel.shard=hybrid makes one per machine, none one "
    "per rank",
}


def refuse_other_engines(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if the launcher asks for an engine that this run does not use.

    Args:
        environment: the variables of this process, from accelerate's launcher.
    """
    problems = [f"{variable}: {reason}" for variable, reason in _found(environment)]
    if problems:
        help_line = "help: use a file of launch/accelerate/: accelerate launch --config_file launch/accelerate/ddp.yaml"
        raise ConfigError("\n".join([*problems, help_line]))


def _found(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    asked = {name for name in (*_ENGINES, _PLAN) if environment.get(name, "false").lower() in ("1", "true")}
    yield from ((name, reason) for name, reason in _ENGINES.items() if name in asked)
    if _PLAN in asked:
        sizes = [(name, reason) for name, reason in _SIZES.items() if environment.get(name, "1") != "1"]
        yield from sizes or [(_PLAN, "parallel.shard says how ranks share a base")]
