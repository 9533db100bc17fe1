"""The trajectory holds the settings that decide a run's result, and no others."""

from __future__ import annotations

import pytest

from finetune.training.run_folder import trajectory
from tests.runs import small_run


@pytest.mark.parametrize(
    "change",
    [
        "train.gradient_checkpointing=2",
        "train.gradient_checkpointing=offload",
        "train.kernels=peft",
        "train.compile=true",
        "quant.cache=false",
        "quant.keep_dequantized=true",
        "train.micro_batch_size=1",
    ],
)
def test_a_continued_run_may_change_how_it_computes(tmp_path, change):
    assert trajectory(small_run(tmp_path, change)) == trajectory(small_run(tmp_path))


@pytest.mark.parametrize(
    "change",
    ["quant.type=int8", "quant.double=false", "train.learning_rate=1e-3", "lora.rank=4", "preference.objective=orpo"],
)
def test_a_continued_run_may_not_change_its_result(tmp_path, change):
    assert trajectory(small_run(tmp_path, change)) != trajectory(small_run(tmp_path))
