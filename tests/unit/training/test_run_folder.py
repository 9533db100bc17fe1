"""What a run may change when it goes on is not compared; all else is."""

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
def test_how_a_run_is_computed_may_change_when_it_goes_on(tmp_path, change):
    assert trajectory(small_run(tmp_path, change)) == trajectory(small_run(tmp_path))


@pytest.mark.parametrize("change", ["quant.type=int8", "quant.double=false", "train.learning_rate=1e-3", "lora.rank=4"])
def test_what_a_run_computes_may_not(tmp_path, change):
    assert trajectory(small_run(tmp_path, change)) != trajectory(small_run(tmp_path))
