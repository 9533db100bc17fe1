"""A run recomputes before it makes its batches smaller, and says what it chose and why."""

from __future__ import annotations

import pytest

from finetune import load_config
from finetune.config.schema import RunConfig
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.activations import plan_activations
from finetune.planning.auto_batch import choose_memory, derive_micro_batch
from finetune.planning.describe import describe_plan

SHAPE = QWEN25_SHAPES["0.5B"]


def run(*overrides: str) -> RunConfig:
    return load_config("lora.yaml", ["data.max_length=512", "train.gradient_checkpointing=auto", *overrides])


def test_a_cpu_takes_fewer_tokens_at_a_time_than_a_gpu():
    assert [derive_micro_batch(run(), 1, device) for device in ("cpu", "cuda")] == [4, 16]
    assert [derive_micro_batch(run("data.max_length=65536"), 1, device) for device in ("cpu", "cuda")] == [1, 1]
    assert derive_micro_batch(run("train.micro_batch_size=7"), 1, "cpu") == 7
    assert derive_micro_batch(run("train.micro_batch_size=7"), 4, "cpu") == 4


def test_auto_recomputes_as_little_as_fits_then_shrinks_the_micro_batch():
    plan = plan_activations(SHAPE, run(), 4, "cpu")
    choices = [choose_memory(run(), SHAPE, 1, "cpu", share * plan.peak_bytes(0)) for share in (1, 0.7, 0.2, 0.05, 0)]
    assert [choice.recompute for choice in choices[:1]] == ["none"]
    assert isinstance(choices[1].recompute, int) and 0 < choices[1].recompute < 23
    assert plan.peak_bytes(choices[1].recompute) <= 0.7 * plan.peak_bytes(0)
    assert [choice.micro_batch for choice in choices[:2]] == [4, 4]
    assert choices[-2].micro_batch < 4 and choices[-1].micro_batch == 1
    assert "of 24 layers" in choices[1].text and "if all were kept" in choices[1].text
    assert "instead of 4, to fit" in choices[-1].text and "WARNING: this may not fit" in choices[-1].text
    assert "WARNING" not in choices[1].text


def test_what_the_user_set_stays():
    for setting in ("none", "all", "offload", 3):
        assert choose_memory(run(f"train.gradient_checkpointing={setting}"), SHAPE, 1, "cuda", 0).recompute == setting
    assert choose_memory(run("train.micro_batch_size=4"), SHAPE, 1, "cuda", 0).micro_batch == 4


def test_offload_on_a_cpu_says_that_it_is_all():
    cfg = run("train.gradient_checkpointing=offload")
    assert "on a CPU offload is the same as all" in choose_memory(cfg, SHAPE, 1, "cpu", 2**40).text
    gpu = choose_memory(cfg, SHAPE, 1, "cuda", 2**40).text
    assert "23 of 24 layers, their inputs in main memory" in gpu


def test_memory_that_is_not_known_is_taken_to_be_short():
    choice = choose_memory(run(), SHAPE, 1, "mps", None)
    assert choice.recompute == "all" and "not known" in choice.text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_tells_what_recomputing_saves(device):
    text = describe_plan(run(), SHAPE, 1, device)
    assert "when no layer is recomputed" in text and "train.gradient_checkpointing=auto" in text
    assert "not known here" in describe_plan(run(), None, 1, device)


def test_the_peak_is_told_with_what_it_is_made_of():
    """A tiny model's weights are no answer to where its memory goes: the process is the largest part of it."""
    small, large = (
        describe_plan(run(*overrides), QWEN25_SHAPES[size], 1, "cpu").partition("most of it: ")[2]
        for size, overrides in (("0.5B", ("data.max_length=64", "train.micro_batch_size=1")), ("72B", ()))
    )
    assert small.startswith("process and libraries 0.47 GB, ")
    assert large.startswith("linears in nf4 ") and large.count(" GB") == 3
