"""A checkpoint is complete or absent and exact to the bit, and each changed byte is detected."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.system import atomic
from finetune.system.errors import IntegrityError, ResourceError
from finetune.system.sealed import unseal
from finetune.training import checkpoint as ck
from finetune.training.checkpoint import TrainState


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def write(run: Path, step: int, optimizer: torch.optim.Optimizer) -> Path:
    folder = run / f"checkpoint-{step}"
    state = TrainState({"train.seed": 0}, "digest", step=step, last_loss=0.25, before={"exact_match": 0.0})
    ck.write_checkpoint(folder, lambda p: (p / "adapter_config.json").write_text("{}"), optimizer, state)
    return folder


def test_a_checkpoint_is_read_back_to_the_bit(tmp_path):
    model, optimizer = trained()
    folder = write(tmp_path, 3, optimizer)
    ck.verify_checkpoint(folder)
    other_model, other = trained(seed=9)
    ck.load_training(folder, other)
    for key, tensor in ck.training_tensors(optimizer).items():
        assert torch.equal(ck.training_tensors(other)[key], tensor), key
    assert torch.equal(other_model.weight, model.weight)
    state = ck.read_state(folder)
    assert (state.step, state.last_loss, state.before) == (3, 0.25, {"exact_match": 0.0})


def test_every_changed_byte_truncation_and_missing_file_is_named(tmp_path):
    folder = write(tmp_path, 1, trained()[1])
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for position in {0, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(IntegrityError, match="checkpoint-1"):
                ck.verify_checkpoint(folder)
        file.write_bytes(content[:-1])
        with pytest.raises(IntegrityError, match=file.name):
            ck.verify_checkpoint(folder)
        file.unlink()
        with pytest.raises(IntegrityError, match=file.name):
            ck.verify_checkpoint(folder)
        file.write_bytes(content)
    ck.verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path, name):
    folder = write(tmp_path, 1, trained()[1])
    manifest = unseal(json.loads((folder / ck.MANIFEST).read_text()))
    (folder / ck.MANIFEST).write_text(json.dumps(manifest | {name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(IntegrityError, match="missing"):
        ck.verify_checkpoint(folder)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    optimizer = trained()[1]
    older, newer = write(tmp_path, 2, optimizer), write(tmp_path, 10, optimizer)
    assert ck.list_checkpoints(tmp_path) == [older, newer], "by number, not by name"
    logged: list[str] = []
    assert ck.newest_valid(tmp_path, logged.append) == newer and not logged
    (newer / ck.TRAINING).write_bytes(b"corrupt")
    assert ck.newest_valid(tmp_path, logged.append) == older
    assert "checkpoint-10" in logged[0] and ck.TRAINING in logged[0]
    shutil.rmtree(older)
    assert ck.newest_valid(tmp_path, logged.append) is None


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_leaves_the_older_checkpoint(tmp_path, failure, monkeypatch):
    optimizer = trained()[1]
    older = write(tmp_path, 1, optimizer)

    def full(path: Path) -> None:
        raise OSError(failure, "no room")

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        write(tmp_path, 2, optimizer)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [older]
    ck.verify_checkpoint(older)


def test_a_crash_at_any_write_leaves_the_new_checkpoint_complete_or_absent(tmp_path, monkeypatch):
    """Stop the process, in effect, before the n-th durable operation, for every n."""
    optimizer = trained()[1]
    real = atomic.sync
    for crash_at in range(100):
        calls = 0

        def maybe_crash(path: Path, crash_at: int = crash_at) -> None:
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt
            real(path)

        run = tmp_path / str(crash_at)
        write(run, 1, optimizer)
        monkeypatch.setattr(atomic, "sync", maybe_crash)
        try:
            write(run, 2, optimizer)
        except KeyboardInterrupt:
            found = ck.newest_valid(run, lambda text: pytest.fail(text))
            assert found is not None and found.name in ("checkpoint-1", "checkpoint-2")
            monkeypatch.undo()
            ck.prune_checkpoints(run, keep=5, best_step=None)
            assert all(p.name.startswith("checkpoint-") for p in run.iterdir())
        else:
            assert crash_at > 4, "the sweep must have crashed somewhere"
            return
        monkeypatch.undo()
    pytest.fail("the write never ended")


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    optimizer = trained()[1]
    for step in (1, 2, 3, 10):
        write(tmp_path, step, optimizer)
    ck.prune_checkpoints(tmp_path, keep=2, best_step=1)
    assert [p.name for p in ck.list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-10"]
    ck.prune_checkpoints(tmp_path, keep=1, best_step=None)
    assert [p.name for p in ck.list_checkpoints(tmp_path)] == ["checkpoint-10"]


def test_the_training_state_of_another_model_is_refused_by_name(tmp_path):
    folder = write(tmp_path, 1, trained()[1])
    other = torch.optim.AdamW([("weight", nn.Parameter(torch.zeros(5, 5))), ("extra", nn.Parameter(torch.zeros(1)))])
    with pytest.raises(IntegrityError, match=r"weight, extra, bias"):
        ck.load_training(folder, other)
    assert not other.state, "nothing may be half loaded"
