"""What is advised to make a run fit does make it fit; what is called the longest or the fastest is."""

from __future__ import annotations

import pytest

from finetune import load_config
from finetune.config.schema import RunConfig
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.advice import (
    BUDGETS_GB,
    LONGEST,
    changes_that_fit,
    describe_change,
    fastest_that_fits,
    length_table,
    longest_that_fits,
)
from finetune.planning.fitting import foresee

SHAPE = QWEN25_SHAPES["7B"]


def run(*overrides: str) -> RunConfig:
    return load_config("lora.yaml", overrides)


def needed(cfg: RunConfig, free_bytes: float, shape=SHAPE) -> float:
    return foresee(cfg, shape, 1, "cuda", free_bytes).needed_bytes


@pytest.mark.parametrize(
    ("overrides", "gigabytes"),
    [
        (("train.recompute=none", "train.micro_batch_size=4"), 12),
        (("quant.type=none",), 16),
        (("quant.resident=true", "data.max_length=4096"), 16),
        (("lora.target_modules=all-linear", "lora.rank=256", "data.max_length=8192"), 12),
        (("distill=recover",), 16),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_change_that_is_said_to_fit_fits(overrides, gigabytes):
    free = gigabytes * 1e9
    before = needed(run(*overrides), free)
    assert before > free
    changes = changes_that_fit(run(*overrides), SHAPE, 1, "cuda", free)
    assert changes and any(change.fits for change in changes)
    for change in changes:
        words = [word.strip("'") for word in change.overrides]
        after = needed(run(*overrides, *words), free)
        assert (after <= free) == change.fits
        assert after == pytest.approx(before - change.saved_bytes, rel=1e-9)
        assert describe_change(change).endswith("GiB" if change.fits else "by itself)")


def test_where_no_setting_helps_a_smaller_model_is_named():
    changes = changes_that_fit(run("data.max_length=256"), QWEN25_SHAPES["72B"], 1, "cuda", 12e9)
    assert changes[0].fits and changes[0].overrides == ("model=qwen2.5-14b-instruct",)
    assert needed(run("data.max_length=256"), 12e9, QWEN25_SHAPES["14B"]) <= 12e9
    assert needed(run("data.max_length=256"), 12e9, QWEN25_SHAPES["32B"]) > 12e9


def test_the_longest_sequence_fits_and_the_next_one_does_not():
    for gigabytes in (8, 16, 24):
        tokens = longest_that_fits(run(), SHAPE, "cuda", gigabytes * 1e9)
        short, long = (run(f"data.max_length={n}", "train.micro_batch_size=1") for n in (tokens, tokens + 128))
        assert tokens % 64 == 0 and needed(short, gigabytes * 1e9) <= gigabytes * 1e9 < needed(long, gigabytes * 1e9)
    assert longest_that_fits(run(), SHAPE, "cuda", 4e9) == 0


def test_the_table_grows_with_memory_and_shrinks_with_the_model():
    table = length_table(run())
    assert list(table) == list(QWEN25_SHAPES)
    for row in table.values():
        assert list(row) == list(BUDGETS_GB) and sorted(row.values()) == list(row.values())
    for budget in BUDGETS_GB:
        column = [row[budget] for row in table.values()]
        assert column == sorted(column, reverse=True) and max(column) <= LONGEST


def test_the_fastest_settings_fit_and_use_what_memory_there_is():
    rich, poor = (fastest_that_fits(run(), SHAPE, 1, "cuda", size * 1e9, None) for size in (80, 10))
    assert rich is not None and poor is not None
    assert "train.recompute=none" in rich.overrides and "quant.resident=true" in rich.overrides
    assert "quant.resident=false" in poor.overrides and poor.footprint.needed_bytes <= 10e9
    cfg = run(*poor.overrides)
    assert needed(cfg, 10e9) == pytest.approx(poor.footprint.needed_bytes)
    shorter = fastest_that_fits(run("data.max_length=65536"), SHAPE, 1, "cuda", 10e9, None)
    assert shorter is not None and any(word.startswith("data.max_length=") for word in shorter.overrides)
    assert fastest_that_fits(run(), SHAPE, 1, "cuda", 4e9, None) is None
