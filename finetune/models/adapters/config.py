"""What an adapter_config.json says about an adapter's update, which for plain LoRA is scaling * B A on each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.models.module_matching import matches_key

# Settings of PEFT under which the update is something else. This package makes none of them.
_OTHER_UPDATES = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Inits that leave the base as it is. After others the base holds the rest; this package saves those as the difference
# to their start, and as init True.
_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal")


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A of a module by: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((alpha for key, alpha in patterns.items() if matches_key(key, module)), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def other_updates(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings of the adapter under which its update is another than scaling * B A."""
    for key in _OTHER_UPDATES:
        if config.get(key):
            yield f"{key}={config[key]}: the update is another than scaling * B A"


def other_base(config: Mapping[str, Any]) -> str | None:
    """The init after which an adapter belongs on other weights than those of the base it names; None if it does not."""
    init = str(config.get("init_lora_weights")).lower()
    return None if init in _KEEPS_BASE else init
