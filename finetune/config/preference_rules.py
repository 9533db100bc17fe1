"""Checks on combinations of settings with `preference`, for the rules of schema.py."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.problems import Problem
from finetune.config.sections import (
    DataConfig,
    DistillConfig,
    GuardConfig,
    LoraConfig,
    PreferenceConfig,
    TrainConfig,
)

Problems = Iterator[Problem]

NEEDS_REFERENCE = ("dpo", "ipo", "kto")
# Settings that belong to some objectives only.
_OWNERS = {
    "gamma": ("simpo",),
    "label_smoothing": ("dpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": NEEDS_REFERENCE,
    "cache": ("dpo", "ipo"),
}
# These change the weights of the base, so the model without its adapter is not the base.
CHANGES_BASE = ("pissa", "pissa_niter_16", "olora", "loftq")


def preference_settings(preference: PreferenceConfig) -> Problems:
    fields = type(preference).model_fields
    changed = [key for key, field in fields.items() if getattr(preference, key) != field.get_default()]
    if preference.objective == "none":
        if changed:
            words = "dpo, ipo, orpo, simpo or kto"
            yield Problem("preference.objective", f"preference.{changed[0]} needs {words}, found none")
        return
    for key in changed:
        owners = _OWNERS.get(key)
        if owners and preference.objective not in owners:
            wanted = " or ".join(owners)
            yield Problem(f"preference.{key}", f"needs preference.objective={wanted}, found {preference.objective}")
    if preference.reference == "cached" and preference.objective == "kto":
        yield Problem("preference.reference", "kto scores new pairs in each step, which no cache has; set base")
    if preference.reference == "cached" and preference.cache is None:
        yield Problem("preference.cache", "is missing; preference.reference=cached needs a folder of `finetune cache`")


def preference_policies(preference: PreferenceConfig, lora: LoraConfig) -> Problems:
    if preference.objective == "none":
        return
    if preference.reference == "init_adapter" and lora.init_adapter is None:
        yield Problem("preference.reference", "init_adapter needs lora.init_adapter; set it, or reference=base")
    if lora.init in CHANGES_BASE and preference.objective in NEEDS_REFERENCE:
        yield Problem("lora.init", f"{lora.init} changes the base, which is the reference; set lora.init=default")


def preference_rows(preference: PreferenceConfig, data: DataConfig, train: TrainConfig) -> Problems:
    if preference.objective == "none":
        return
    if data.train_on == "all":
        yield Problem("data.train_on", "all would score prompts too; preferences compare answers: set assistant")
    if data.truncation not in ("drop", "error"):
        yield Problem("data.truncation", f"would cut one side of a pair; set drop or error, found {data.truncation}")
    if preference.objective == "kto" and train.batch_size == 1 and not data.packing:
        yield Problem("train.batch_size", "kto compares answers with other prompts; set at least 2, found 1")


def preference_alone(preference: PreferenceConfig, distill: DistillConfig, guard: GuardConfig) -> Problems:
    if preference.objective == "none":
        return
    if distill.objective != "none":
        yield Problem("distill.objective", "does not work with preference.objective; set one of them to none")
    if guard.max is not None:
        yield Problem(
            "guard.max", "does not work with preference.objective, which has its own reference; set it to null"
        )
