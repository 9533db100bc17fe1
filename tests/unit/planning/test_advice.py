"""What is advised to make a run fit does make it fit; what is called the longest or the fastest is."""

from __future__ import annotations

import functools

import pytest

from finetune import load_config
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.advice import (
    BUDGETS_GB,
    LONGEST,
    changes_that_fit,
    fastest_that_fits,
    length_table,
    longest_that_fits,
)
from finetune.planning.auto_batch import estimate_memory
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.timing import cost_of_token

SHAPE = QWEN25_SHAPES["7B"]


def run(*overrides: str, shape=SHAPE, device_type: str = "cuda", ranks: int = 1) -> PlanInputs:
    return plan_inputs(
        load_config("lora.yaml", overrides, needs_data=False), shape, device_type=device_type, ranks=ranks
    )


def needed(inputs: PlanInputs, free_bytes: float) -> float:
    return estimate_memory(inputs, free_bytes).needed_bytes


@pytest.mark.parametrize(
    ("overrides", "gigabytes"),
    [
        (("train.gradient_checkpointing=none", "train.micro_batch_size=4"), 12),
        (("quant.type=none",), 14),
        (("quant.keep_dequantized=true", "data.max_length=4096"), 16),
        (("lora.target_modules=all-linear", "lora.rank=256", "data.max_length=8192"), 12),
        (("distill=recover",), 16),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_change_that_is_said_to_fit_fits(overrides, gigabytes):
    free = gigabytes * 1e9
    before = needed(run(*overrides), free)
    assert before > free
    changes = changes_that_fit(run(*overrides), free)
    assert changes and any(change.fits for change in changes)
    for change in changes:
        words = [word.strip("'") for word in change.overrides]
        after = needed(run(*overrides, *words), free)
        assert (after <= free) == change.fits
        assert after == pytest.approx(before - change.saved_bytes, rel=1e-9)
        assert str(change).endswith("GB" if change.fits else "by itself)")


HARD = (
    ("train.gradient_checkpointing=offload", "quant.double=false"),
    ("lora.rank=256", "lora.rank_pattern={q_proj: 128}"),
    ("quant.type=none", "lora.modules_to_save=[lm_head,embed_tokens]", "train.gradient_checkpointing=5"),
    ("distill=teacher", "distill.teacher.name=Qwen/Qwen2.5-14B", "data.max_length=8192", "train.kernels=peft"),
    ("guard.max=0.1", "data.held_out=0.1", "train.eval_every=5", "guard.action=recover", "data.max_length=32"),
    ("train.batch_size=6", "train.micro_batch_size=3", "lora.dora=true", "lora.target_modules=all-linear"),
    ("quant.type=none", "data.max_length=256", "train.batch_size=64", "train.micro_batch_size=64"),
)
DEVICES = [("cuda", 80), ("cuda", 10), ("cuda", 20), ("cuda", 6), ("cpu", 8), ("cpu", 24)]


@pytest.mark.parametrize("overrides", HARD, ids=lambda words: " ".join(words))
def test_changes_and_fastest_settings_do_what_they_say_whatever_the_config(overrides):
    """Pasted back: a change needs what was said; the fastest fit, and are never slower than the config if that fits."""
    for ranks, (kind, gigabytes) in enumerate(DEVICES, start=1):
        on_device = functools.partial(run, *overrides, device_type=kind, ranks=ranks)
        inputs, free = on_device(), gigabytes * 1e9
        before = estimate_memory(inputs, free)
        fits = before.needed_bytes <= free
        for change in [] if fits else changes_that_fit(inputs, free):
            words, shape = [word.strip("'") for word in change.overrides], SHAPE
            if words[0].startswith("model="):
                shape = QWEN25_SHAPES[words[0].split("-")[1].upper()]
            after = needed(on_device(*words, shape=shape), free)
            assert (after <= free) == change.fits, (change, kind, gigabytes)
            assert after == pytest.approx(before.needed_bytes - change.saved_bytes)
        if (fastest := fastest_that_fits(inputs, free, None)) is None:
            assert not fits
            continue
        words, memory, _ = fastest
        pasted = on_device(*words)
        after = estimate_memory(pasted, free)
        assert after.needed_bytes == pytest.approx(memory.needed_bytes) and after.needed_bytes <= free
        if fits:
            costs = [cost_of_token(tried, memory, None) for tried, memory in ((pasted, after), (inputs, before))]
            assert costs[0] <= costs[1] * (1 + 1e-9), (fastest, kind, gigabytes)


def test_where_no_setting_helps_a_smaller_model_is_named():
    changes = changes_that_fit(run("data.max_length=256", shape=QWEN25_SHAPES["72B"]), 12e9)
    assert changes[0].fits and changes[0].overrides == ("model=qwen2.5-14b-instruct",)
    assert needed(run("data.max_length=256", shape=QWEN25_SHAPES["14B"]), 12e9) <= 12e9
    assert needed(run("data.max_length=256", shape=QWEN25_SHAPES["32B"]), 12e9) > 12e9


def test_the_longest_sequence_fits_and_the_next_one_does_not():
    for kind, gigabytes in (("cuda", 8), ("cuda", 24), ("cpu", 16)):
        free = gigabytes * 1e9
        tokens = longest_that_fits(run(device_type=kind), free)
        short, long = (
            needed(run(f"data.max_length={n}", "train.micro_batch_size=1", device_type=kind), free)
            for n in (tokens, tokens + 64)
        )
        assert tokens % 64 == 0 and short <= free < long
    assert longest_that_fits(run(), 4e9) == 0


def test_the_tables_lengths_are_the_longest_of_each_size():
    table = length_table(run())
    for size, budget in (("0.5B", 8), ("7B", 16), ("72B", 48)):
        assert table[size][budget] == longest_that_fits(run(shape=QWEN25_SHAPES[size]), budget * 1e9) > 0


def test_the_table_grows_with_memory_and_shrinks_with_the_model():
    table = length_table(run())
    assert list(table) == list(QWEN25_SHAPES)
    for row in table.values():
        assert list(row) == list(BUDGETS_GB) and sorted(row.values()) == list(row.values())
    for budget in BUDGETS_GB:
        column = [row[budget] for row in table.values()]
        assert column == sorted(column, reverse=True) and max(column) <= LONGEST


def test_the_fastest_settings_fit_and_use_what_memory_there_is():
    rich, poor = (fastest_that_fits(run(), size * 1e9, None) for size in (80, 10))
    assert rich is not None and poor is not None
    assert "train.gradient_checkpointing=none" in rich[0] and "quant.keep_dequantized=true" in rich[0]
    assert "train.micro_batch_size=4" in rich[0]  # 8,192 tokens, from which more are no faster
    assert "quant.keep_dequantized=false" in poor[0] and poor[1].needed_bytes <= 10e9
    assert needed(run(*poor[0]), 10e9) == pytest.approx(poor[1].needed_bytes)
    shorter = fastest_that_fits(run("data.max_length=65536"), 10e9, None)
    assert shorter is not None and any(word.startswith("data.max_length=") for word in shorter[0])
    assert fastest_that_fits(run(), 4e9, None) is None
