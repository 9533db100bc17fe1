"""Evaluating, sampling, saving and micro-batches do not change a run; another seed does."""

from __future__ import annotations

import pytest

from finetune import train
from tests.runs import differing, metrics, reference_run, small_run


def test_evaluating_sampling_and_saving_at_every_step_change_no_bit(tmp_path):
    """bitsandbytes re-packs weights after an evaluation on some CPUs, and sampling could draw from the same stream."""
    plain, watched = reference_run(), tmp_path / "watched"
    every = ("train.eval_every=1", "generation.every=1", "generation.num_examples=4", "train.save_every=1")
    every += ("generation.metrics=[exact_match,rouge_l]", "generation.max_new_tokens=8")
    train(small_run(watched, *every))
    assert differing(plain, watched) == []
    assert [line["loss"] for line in metrics(plain)] == [line["loss"] for line in metrics(watched)]


def test_the_same_config_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    first, again, other = reference_run(), tmp_path / "again", tmp_path / "other"
    train(small_run(again))
    train(small_run(other, "train.seed=1"))
    assert differing(first, again) == []
    assert metrics(first) == metrics(again)
    assert differing(first, other)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_eight_by_one_equals_one_by_eight(tmp_path, packing):
    """In fp32: sums of another order differ by roundings of 2**-24. No noise: a micro-batch draws its own dropout."""
    settings = (
        "lora.dropout=0",
        "train.neftune_alpha=0",
        "train.batch_size=8",
        f"data.packing={packing}",
        "model.dtype=float32",
        "quant.compute_dtype=float32",
    )
    train(small_run(tmp_path / "together", *settings, "train.micro_batch_size=8"))
    train(small_run(tmp_path / "apart", *settings, "train.micro_batch_size=1"))
    for a, b in zip(metrics(tmp_path / "together"), metrics(tmp_path / "apart"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])


def test_recomputing_layers_changes_no_bit(tmp_path):
    """Dropout is on: the second forward pass of a layer must draw what the first one drew."""
    kept = tmp_path / "none"
    train(small_run(kept, "train.gradient_checkpointing=none"))
    for setting in ("all", "offload", "2"):
        train(small_run(tmp_path / setting, f"train.gradient_checkpointing={setting}"))
        assert differing(kept, tmp_path / setting) == []
        assert metrics(kept) == metrics(tmp_path / setting)
