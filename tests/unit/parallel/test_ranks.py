"""What a launcher's file sets changes neither the precision nor the engine of a run."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from finetune import train
from finetune.parallel.ranks import build_accelerator
from finetune.system.errors import ConfigError
from tests.runs import differing, reference_run, small_run


@pytest.fixture(autouse=True)
def first_in_the_process():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_the_config_alone_decides_the_precision(tmp_path, monkeypatch, capsys, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator = build_accelerator(small_run(tmp_path))
    assert accelerator.mixed_precision == "no" and accelerator.state.dynamo_plugin.backend.value == "NO"
    if precision == "fp16":
        train(small_run(tmp_path))
        assert "mixed_precision=fp16" in capsys.readouterr().err
        assert differing(reference_run(), tmp_path) == []


def test_other_engines_are_refused_together(tmp_path, monkeypatch):
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError) as refused:
        build_accelerator(small_run(tmp_path))
    assert all(name in str(refused.value) for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))


def test_the_precision_of_another_trainer_in_the_process_has_no_effect(tmp_path):
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    train(small_run(tmp_path))
    assert differing(reference_run(), tmp_path) == []
