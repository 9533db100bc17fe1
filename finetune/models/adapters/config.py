"""The update of an adapter according to its adapter_config.json; for plain LoRA, scaling * B A on each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.models.module_matching import matches_key

# Settings of PEFT with another update. This package writes none of them.
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
# Inits that do not change the base. After other inits the base holds the residual; this package saves such an adapter
# as the difference to its start, with init True.
_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal")


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return PEFT's factor of B A for a module: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((alpha for key, alpha in patterns.items() if matches_key(key, module)), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def other_updates(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings of an adapter whose update is not scaling * B A."""
    for key in _OTHER_UPDATES:
        if config.get(key):
            yield f"{key}={config[key]}: the update is not scaling * B A"


def other_base(config: Mapping[str, Any]) -> str | None:
    """Return the init after which an adapter needs other weights than its base, else None."""
    init = str(config.get("init_lora_weights")).lower()
    return None if init in _KEEPS_BASE else init
