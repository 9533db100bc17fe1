"""Learning from preferences and rewards on a GPU."""

from __future__ import annotations

import math

import pytest

from finetune import load_config, train
from tests.runs import REWARDED_RUN, metrics, small_run

pytestmark = pytest.mark.gpu


def test_a_run_on_pairs_starts_at_its_reference(tmp_path):
    settings = ("train.max_steps=4", "data.train.0.limit=24", "data.eval.0.limit=8", "train.eval_every=2")
    train(load_config("dpo.yaml", [*settings, "preference.sft_weight=null", f"output_dir={tmp_path}"]))
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_rewards_samples_what_it_trains(tmp_path, dtype):
    """bitsandbytes multiplies few tokens by a kernel of its own; ours dequantizes for many."""
    settings = (*REWARDED_RUN, f"model.dtype={dtype}", f"quant.compute_dtype={dtype}", "train.max_steps=4")
    train(small_run(tmp_path, *settings, "lora.dropout=0", "train.neftune_alpha=0"))
    gaps = [line["train/sampling_gap"] for line in metrics(tmp_path)]
    # Logits of bf16 are exact to 2**-8 of their size, about 10.
    assert max(gaps) <= (1e-3 if dtype == "float32" else 0.1)
