"""wandb and TensorBoard receive every step; a failing tracker stops no run, and no secret reaches the disk."""

from __future__ import annotations

import sys

import pytest

from finetune.system.errors import MissingExtra
from finetune.training.track import build_backends
from tests.runs import small_run


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = small_run(tmp_path, "track.tensorboard=true")
    [backend] = build_backends(cfg, tmp_path)
    backend.log(1, {"loss": 0.5})
    backend.log(2, {"loss": 0.25})
    backend.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_wandb_records_offline_without_a_key_and_writes_no_secret(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-value")
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-value")
    cfg = small_run(tmp_path, "track.wandb=true", "track.project=tests")
    [backend] = build_backends(cfg, tmp_path)
    backend.log(1, {"loss": 0.5})
    backend.close()
    assert "deprecated" not in capfd.readouterr().err
    written = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert not [path for path in written if b"s3cr3t-value" in path.read_bytes()]


def test_a_tracker_that_fails_to_start_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **settings: (_ for _ in ()).throw(RuntimeError("no service")))
    cfg = small_run(tmp_path, "track.wandb=true")
    assert build_backends(cfg, tmp_path) == []
    logged = capsys.readouterr().err
    assert "wandb" in logged and "no service" in logged


def test_a_missing_wandb_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = small_run(tmp_path, "track.wandb=true")
    with pytest.raises(MissingExtra, match=r"track\.wandb.*finetune-qlora\[tracking\]"):
        build_backends(cfg, tmp_path)
    assert build_backends(small_run(tmp_path), tmp_path) == []
