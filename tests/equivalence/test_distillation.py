"""The teacher's placement, micro-batches, ranks and evaluations do not change the adapter."""

from __future__ import annotations

import pytest
import torch

from finetune import load_config, train
from finetune.commands.cache import run as run_cache
from finetune.system.arguments import Arguments
from tests.commands import train_on_ranks
from tests.runs import SMALL_RUN, adapter, differing, metrics, reference_run, result, small_run

ANCHOR = ("distill.objective=sft+anchor", "data.train.0.limit=48", "data.eval.0.limit=8", "train.max_steps=3")
PLAIN = ("lora.dropout=0", "train.neftune_alpha=0", "train.warmup_ratio=0", "train.schedule=constant")
FP32 = ("model.dtype=float32", "quant.compute_dtype=float32", "distill.teacher.dtype=float32")


def test_streamed_and_resident_teachers_give_the_same_bits_for_any_steps_ahead(tmp_path):
    resident = reference_run(*ANCHOR)
    for ahead in (1, 2):
        settings = ("distill.teacher.placement=streamed", f"distill.teacher.steps_ahead={ahead}")
        train(small_run(tmp_path / f"ahead{ahead}", *ANCHOR, *settings))
        assert differing(resident, tmp_path / f"ahead{ahead}") == []
        assert metrics(resident) == metrics(tmp_path / f"ahead{ahead}")


def test_cached_hidden_states_train_as_the_teacher_does(tmp_path):
    """Another batch shape may change the rounding of a hidden state, in fp32 by 2**-24 of it."""
    settings = (*ANCHOR, *FP32, *PLAIN, "distill.cache_kind=hidden", f"distill.cache={tmp_path / 'signal'}")
    words = [*SMALL_RUN, *settings, f"output_dir={tmp_path / 'none'}"]
    assert run_cache(Arguments("quickstart.yaml", tuple(words), frozenset())) == 0
    train(small_run(tmp_path / "resident", *ANCHOR, *FP32, *PLAIN))
    train(small_run(tmp_path / "cached", *settings, "distill.teacher.placement=cached"))
    for a, b in zip(metrics(tmp_path / "resident"), metrics(tmp_path / "cached"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_evaluating_at_every_step_changes_no_bit(tmp_path):
    plain = reference_run(*ANCHOR)
    train(small_run(tmp_path / "watched", *ANCHOR, "train.eval_every=1", "train.save_every=1"))
    assert differing(plain, tmp_path / "watched") == []


def test_eight_by_one_equals_one_by_eight(tmp_path):
    settings = (*ANCHOR, *FP32, *PLAIN, "train.batch_size=8", "data.packing=false")
    train(small_run(tmp_path / "together", *settings, "train.micro_batch_size=8"))
    train(small_run(tmp_path / "apart", *settings, "train.micro_batch_size=1"))
    for a, b in zip(metrics(tmp_path / "together"), metrics(tmp_path / "apart"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_resumed_run_equals_an_unbroken_one_and_keeps_its_first_evaluation(tmp_path):
    settings = (*ANCHOR, "train.schedule=constant", "train.warmup_ratio=0", "distill.objective=recover")
    train(small_run(tmp_path / "whole", *settings))
    train(small_run(tmp_path / "broken", *settings, "train.max_steps=1"))
    train(small_run(tmp_path / "broken", *settings, "train.resume=auto"))
    assert differing(tmp_path / "whole", tmp_path / "broken") == []
    keys = ("teacher_kl_before", "teacher_kl_after", "recovered")
    whole, broken = result(tmp_path / "whole"), result(tmp_path / "broken")
    assert [whole[key] for key in keys] == [broken[key] for key in keys]
    assert whole["teacher_kl_before"] > 0


def test_two_ranks_equal_one(tmp_path):
    """Five documents per step: the ranks have unequal shares, and each queries the teacher for its own."""
    # Adam divides by the gradient's size: where that is next to nothing, so is what the order of a sum leaves, and the
    # quotient is anything. A large eps keeps the update proportional to the gradient there.
    steady = ("train.batch_size=5", "data.packing=false", "train.eps=1e-3")
    settings = (*SMALL_RUN, *ANCHOR, *FP32, *PLAIN, *steady)
    train(load_config("quickstart.yaml", [*settings, f"output_dir={tmp_path / '1'}", "train.world_size=1"]))
    train_on_ranks(2, *settings, f"output_dir={tmp_path / '2'}", "train.world_size=2")
    for a, b in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("eval_loss", 0.0) == pytest.approx(b.get("eval_loss", 0.0), rel=1e-5)
    expected = adapter(tmp_path / "1")
    for name, tensor in adapter(tmp_path / "2").items():
        # fp32 sums of another order, after three steps: 1e-4 of the largest.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
