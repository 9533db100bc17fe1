"""Runs whose student writes its own answers: the teacher alone teaches, and neither a kill nor ranks change anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import train
from finetune.data.batch import Document
from finetune.data.template.chat import UNTRAINED
from finetune.distill.on_policy import OnPolicyFeed
from finetune.training import recipe
from tests.runs import SMALL_RUN, adapter, differing, metrics, small_run

ON_POLICY = ("distill.objective=recover", "distill.divergence=jsd", "distill.on_policy_tokens=24")


def test_a_share_that_chooses_no_row_changes_no_bit(tmp_path, capsys):
    plain, wrapped = tmp_path / "plain", tmp_path / "wrapped"
    train(small_run(plain, *ON_POLICY))
    assert "itself writes" not in capsys.readouterr().err
    train(small_run(wrapped, *ON_POLICY, "distill.on_policy=1e-9"))
    assert capsys.readouterr().err.count("itself writes the answers of 0% of the rows, up to 24 tokens") == 1
    assert differing(plain, wrapped) == []
    assert metrics(plain) == metrics(wrapped)


def test_what_the_student_wrote_is_no_example_to_follow(tmp_path):
    """Where it wrote everything, cross-entropy beside the divergence has no effect; on rows it has."""
    losses = {}
    for share in (0, 1):
        for objective in ("recover", "sft+anchor"):
            folder = tmp_path / f"{objective}-{share}"
            weight = [] if objective == "recover" else ["distill.weight=1"]
            settings = (*ON_POLICY, *weight, f"distill.objective={objective}", f"distill.on_policy={share}")
            train(small_run(folder, *settings, "train.max_steps=2"))
            losses[objective, share] = [line["loss"] for line in metrics(folder)]
    assert differing(tmp_path / "recover-1", tmp_path / "sft+anchor-1") == []
    assert losses["recover", 1] == losses["sft+anchor", 1]
    assert differing(tmp_path / "recover-0", tmp_path / "sft+anchor-0") != []
    assert losses["recover", 0] != losses["sft+anchor", 0]


def test_a_resumed_run_writes_the_same_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    """Evaluating and answering rows between the steps changes nothing either."""
    seen: list[tuple[int, list[list[int]]]] = []
    original = OnPolicyFeed.sequences

    def sequences(self: OnPolicyFeed, step: int) -> list[list[Document]]:
        found = original(self, step)
        seen.append((step, [d.ids.tolist() for sequence in found for d in sequence if d.own]))
        return found

    monkeypatch.setattr(OnPolicyFeed, "sequences", sequences)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = (*ON_POLICY, "distill.on_policy=0.5", "train.save_every=1")
    train(small_run(whole, *settings))
    unbroken, seen[:] = dict(seen), []
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    train(small_run(broken, *settings, "train.resume=auto", "generation.every=1"))
    assert [step for step, _ in seen] == [3]
    assert dict(seen)[3] == unbroken[3] and all(unbroken.values())
    assert differing(whole, broken) == []
    assert metrics(whole) == metrics(broken)


def test_answers_stop_at_the_end_of_a_turn_which_is_a_target(tmp_path, monkeypatch):
    written: list[Document] = []
    original = OnPolicyFeed.sequences

    def sequences(self: OnPolicyFeed, step: int) -> list[list[Document]]:
        found = original(self, step)
        written.extend(d for sequence in found for d in sequence if d.own)
        return found

    monkeypatch.setattr(OnPolicyFeed, "sequences", sequences)
    cfg = small_run(tmp_path, *ON_POLICY, "distill.on_policy=1", "train.max_steps=2")
    train(cfg)
    tokenizer = recipe.load_tokenizer(cfg.model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stopped = [d for d in written if d.ids[-1] == end]
    assert len(stopped) > len(written) / 2
    for document in written:
        targets = np.flatnonzero(document.labels != UNTRAINED)
        answer = document.ids[targets[0] + 1 :]
        assert document.labels[targets].tolist() == answer.tolist()
        assert end not in answer[:-1] and (answer[-1] == end or len(answer) == 24)
        assert tokenizer.decode(document.ids[: targets[0] + 1]).endswith("<|im_start|>assistant\n")


# fp32, so that a batch's make-up moves no draw across a border; what is drawn for dropout differs between ranks.
DETERMINISTIC = (
    "lora.dropout=0", "train.neftune_alpha=0", "train.batch_size=5", "data.train.0.limit=16", "data.packing=false",
    "model.dtype=float32", "quant.compute_dtype=float32", "distill.teacher.dtype=float32", "train.micro_batch_size=2",
    "distill.on_policy=0.5",
)  # fmt: skip


def run(ranks: int, folder: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "finetune" / "train.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    settings = (*SMALL_RUN, *ON_POLICY, *DETERMINISTIC, f"train.world_size={ranks}", f"output_dir={folder}")
    command = [sys.executable, *launcher, str(script), "config=quickstart.yaml", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_write_what_one_writes(tmp_path):
    """The last step of the epoch has a single row, so that one rank has nothing to write."""
    one, two = tmp_path / "1", tmp_path / "2"
    run(1, one)
    run(2, two)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    expected = adapter(one)
    for name, tensor in adapter(two).items():
        # As for rows that were given: Adam makes of a sum's last bits an error of the weight's own size.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
