"""How a config of another framework shares a model over ranks -> parallel.shard and parallel.offload."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHARDING_NAMES = frozenset("fsdp fsdp_config fsdp_version deepspeed dp_shard_size dp_replicate_size".split())

# FSDP's strategies by name, number and option of version 2. Others keep whole weights during a step.
_FULL = ("full_shard", "1")
_HYBRID = ("hybrid_shard", "4")
_WHOLE = ("no_shard", "shard_grad_op", "2", "3", "hybrid_shard_zero2", "5")
_ON = (True, "true", "True", "cpu")


def read_sharding(theirs: Mapping[str, Any], folder: Path, lost: list[str]) -> dict[str, Any]:
    """Return our settings for their FSDP or DeepSpeed.

    Args:
        theirs: their settings.
        folder: where relative paths of DeepSpeed's files start.
        lost: gets a line for each part without a counterpart.
    """
    if theirs.get("deepspeed"):
        shard, offload = _of_deepspeed(theirs["deepspeed"], folder, lost)
    else:
        shard, offload = _of_fsdp(theirs)
    if _number(theirs.get("dp_shard_size")) > 1:
        shard = "hybrid" if _number(theirs.get("dp_replicate_size")) > 1 else "full"
    if shard is None:
        return {}
    return {"parallel.shard": shard} | ({"parallel.offload": True} if offload and shard != "none" else {})


def _of_fsdp(theirs: Mapping[str, Any]) -> tuple[str | None, bool]:
    words = theirs.get("fsdp") or []
    words = [str(word) for word in (words if isinstance(words, list) else re.split(r"[\s,]+", str(words)))]
    config = theirs.get("fsdp_config")
    named = config.items() if isinstance(config, Mapping) else ()
    config = {str(key).removeprefix("fsdp_"): value for key, value in named}
    words += [str(config.get("sharding_strategy", "")).lower()]
    offload = "offload" in words or any(config.get(name) in _ON for name in ("offload_params", "cpu_offload"))
    for names, shard in ((_HYBRID, "hybrid"), (_WHOLE, "none"), (_FULL, "full")):
        if any(word in names for word in words):
            return shard, offload
    # Version 2 has no strategies: a config of it shards.
    return ("full" if config or any(word in ("true", "True") for word in words) else None), offload


def _of_deepspeed(value: Any, folder: Path, lost: list[str]) -> tuple[str | None, bool]:
    """Read the stage of ZeRO from settings, from a file, or from the name of a file that is not there."""
    settings = value if isinstance(value, Mapping) else _read_json(folder / str(value))
    if settings is None:
        name = Path(str(value)).name.lower()
        stage = next(re.finditer(r"(?:zero|z|stage)[-_]?([0-3])", name), None)
        if stage is None:
            lost.append(f"deepspeed: {value}: is not there, and its name has no stage of ZeRO")
            return None, False
        # The files that frameworks ship name what they offload; of stages 1 and 2 only the optimizer.
        zero: Mapping[str, Any] = {"stage": int(stage[1]), "offload_param": "offload" in name}
    else:
        zero = settings.get("zero_optimization") or {}
    offloaded = list(_offloaded(zero))
    if "offload_optimizer" in offloaded:
        lost.append("deepspeed: offload_optimizer: train.optimizer=paged_adamw moves an adapter's states when needed")
    return ("full" if _number(zero.get("stage")) == 3 else "none"), "offload_param" in offloaded


def _offloaded(zero: Mapping[str, Any]) -> Iterator[str]:
    for name in ("offload_param", "offload_optimizer"):
        part = zero.get(name)
        if isinstance(part, Mapping):
            part = part.get("device") in ("cpu", "nvme")
        if part in _ON:
            yield name


def _read_json(file: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, Mapping) else None


def _number(value: Any) -> int:
    return int(value) if str(value).isdecimal() else 0
