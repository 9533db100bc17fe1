"""Rules on adapters whose A is frozen."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.problems import Problem
from finetune.config.sections import LoraConfig, TrainConfig

# Inits whose B starts at zero and whose A depends on the seed alone.
_SEEDED = ("default", "gaussian")


def frozen_a(lora: LoraConfig, train: TrainConfig) -> Iterator[Problem]:
    """Yield what has no meaning with a frozen A, or makes the mean of B differ from the mean of the updates."""
    if not lora.freeze_a:
        return
    if lora.dora:
        yield Problem(
            "lora.dora", "means of DoRA's magnitudes are not exact with lora.freeze_a; set one of them to false"
        )
    if lora.init not in _SEEDED:
        yield Problem(
            "lora.init", f"lora.freeze_a needs default or gaussian, whose B starts at zero, found {lora.init}"
        )
    if train.lora_plus_ratio is not None:
        yield Problem("train.lora_plus_ratio", "is a ratio to the learning rate of A, which lora.freeze_a freezes")
