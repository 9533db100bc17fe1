"""On-policy runs: only the teacher scores the student's answers, and neither kills nor ranks change the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import train
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill.on_policy import OnPolicySampler
from finetune.models.tokenizer import load_tokenizer
from tests.commands import train_on_ranks
from tests.runs import SMALL_RUN, adapter, differing, metrics, small_run

ON_POLICY = ("distill.objective=recover", "distill.divergence=jsd", "distill.on_policy_tokens=24")


def test_a_share_that_selects_no_row_changes_no_bit(tmp_path, capsys):
    plain, wrapped = tmp_path / "plain", tmp_path / "wrapped"
    train(small_run(plain, *ON_POLICY))
    assert "on_policy=" not in capsys.readouterr().err
    train(small_run(wrapped, *ON_POLICY, "distill.on_policy=1e-9"))
    assert capsys.readouterr().err.count("on_policy=0% of the rows, max_tokens=24") == 1
    assert differing(plain, wrapped) == []
    assert metrics(plain) == metrics(wrapped)


def test_student_answers_have_no_cross_entropy(tmp_path):
    """If the student writes all answers, the weight of the cross-entropy has no effect."""
    settings = (*ON_POLICY, "distill.on_policy=1", "train.max_steps=2")
    train(small_run(tmp_path / "alone", *settings))
    train(small_run(tmp_path / "beside", *settings, "distill.objective=sft+anchor", "distill.weight=1"))
    assert differing(tmp_path / "alone", tmp_path / "beside") == []
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("alone", "beside")]
    assert losses[0] == losses[1]


HALF = (*ON_POLICY, "distill.on_policy=0.5", "train.save_every=1")


@contextmanager
def recorded() -> Iterator[dict[int, list[Document]]]:
    """Record the answers of runs inside the block, by step from 0."""
    written: dict[int, list[Document]] = {}
    original = OnPolicySampler.step_batches

    def step_batches(self: OnPolicySampler, step: int) -> list[list[Document]]:
        found = original(self, step)
        written[step] = [document for sequence in found for document in sequence if document.student_generated]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnPolicySampler, "step_batches", step_batches)
        yield written


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[int, list[Document]]]:
    """An unbroken run with half of the answers from the student, and these answers."""
    folder = tmp_path_factory.mktemp("on-policy") / "whole"
    with recorded() as written:
        train(small_run(folder, *HALF))
    return folder, written


def test_a_resumed_run_writes_the_same_and_ends_in_the_same_bits(whole, tmp_path):
    """Evaluating and sampling between the steps does not change it, either."""
    folder, written = whole
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "checkpoint-4")
    with recorded() as again:
        train(small_run(broken, *HALF, "train.resume=auto", "generation.every=1", "train.eval_every=1"))
    assert list(written) == [0, 1, 2, 3] and list(again) == [3]
    assert [d.ids.tolist() for d in again[3]] == [d.ids.tolist() for d in written[3]] != []
    assert differing(folder, broken) == []
    assert metrics(folder) == metrics(broken)


def test_answers_end_with_the_end_of_a_turn_which_is_a_target(whole):
    folder, written = whole
    tokenizer = load_tokenizer(small_run(folder).model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    documents = [document for step in written.values() for document in step]
    stopped = [document for document in documents if document.ids[-1] == end]
    assert len(stopped) > len(documents) / 2
    for document in documents:
        targets = np.flatnonzero(document.labels != IGNORE_INDEX)
        answer = document.ids[targets[0] + 1 :]
        assert document.labels[targets].tolist() == answer.tolist()
        assert end not in answer[:-1] and (answer[-1] == end or len(answer) == 24)
        assert str(tokenizer.decode(document.ids[: targets[0] + 1])).endswith("<|im_start|>assistant\n")


# fp32, so that a batch's make-up moves no draw across a border; what is drawn for dropout differs between ranks. Beside
# cross-entropy, since the gradient of a small divergence alone is mostly rounding, which Adam would make large.
DETERMINISTIC = (
    "lora.dropout=0",
    "train.neftune_alpha=0",
    "train.batch_size=5",
    "data.train.0.limit=16",
    "data.packing=false",
    "model.dtype=float32",
    "quant.compute_dtype=float32",
    "distill.teacher.dtype=float32",
    "train.micro_batch_size=2",
    "distill.on_policy=0.5",
    "distill.objective=sft+anchor",
    "distill.weight=1",
    # Adam divides by the gradient's size: with a small eps, entries next to nothing become what rounding made of them.
    "train.eps=1e-3",
)


def test_two_ranks_write_the_same_answers_as_one(tmp_path):
    """The last step of the epoch has a single row, so that one rank has nothing to write."""
    one, two = tmp_path / "1", tmp_path / "2"
    train(small_run(one, *ON_POLICY, *DETERMINISTIC))
    train_on_ranks(2, *SMALL_RUN, *ON_POLICY, *DETERMINISTIC, "train.world_size=2", f"output_dir={two}")
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    expected = adapter(one)
    for name, tensor in adapter(two).items():
        # fp32 sums of another order, after four steps: 1e-4 of the largest.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
