"""A run's predicted peak is the plan's figure, and free heap memory returns to the system."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from finetune import attach_lora, load_base, load_config
from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.models.fused import fuse_layers
from finetune.planning.auto_batch import BatchPlan
from finetune.planning.inputs import plan_inputs
from finetune.planning.peak_memory import predict_peak
from finetune.training import autotune
from finetune.training.autotune import apply_batch_plan, install_malloc_trim
from tests.runs import small_run


@pytest.fixture(scope="module")
def model():
    cfg = load_config("quickstart.yaml", [])
    loaded = attach_lora(load_base(cfg.model, cfg.quant, "cpu"), cfg.lora)
    fuse_layers(loaded)
    return loaded.train()


def fit(cfg: RunConfig, model: nn.Module, logged: list[str]) -> BatchPlan:
    inputs = plan_inputs(cfg, shape_of(cfg.model.name), device_type="cpu")
    return apply_batch_plan(inputs, model, Accelerator(cpu=True), logged.append)


def test_the_predicted_peak_is_the_plans_for_the_chosen_micro_batch(model, tmp_path):
    cfg, logged = small_run(tmp_path, "train.gradient_checkpointing=2", "data.eval=[]"), []
    found = fit(cfg, model, logged)
    assert found.micro_batch == 4
    inputs = plan_inputs(cfg, shape_of(cfg.model.name), device_type="cpu")
    assert found.predicted_peak_bytes == round(predict_peak(inputs, 4, 2).peak_bytes)
    assert "recomputed_layers=2 of 4" in logged[0]


def test_little_free_memory_means_recomputing(model, tmp_path, monkeypatch):
    logged: list[str] = []
    cfg = small_run(tmp_path)
    monkeypatch.setattr(autotune, "available_memory", lambda: 2**40)
    plenty = fit(cfg, model, logged)
    monkeypatch.setattr(autotune, "available_memory", lambda: 2**20)
    short = fit(cfg, model, logged)
    assert "recomputed_layers=0 of 4" in logged[0] and "WARNING" in logged[1]
    # The evaluation of 4,096 tokens is the peak of so small a model, whatever its training takes.
    assert short.micro_batch < plenty.micro_batch and short.predicted_peak_bytes <= plenty.predicted_peak_bytes


def test_the_heap_is_trimmed_after_training_passes_only(model, monkeypatch):
    calls = []
    monkeypatch.setattr(autotune, "malloc_trim", lambda: calls.append(0))
    decoder = model.get_base_model().model
    tables = decoder.rotary_emb._forward_pre_hooks, decoder.norm._forward_hooks
    before = [dict(hooks) for hooks in tables]
    for hooks in tables:
        hooks.clear()
    install_malloc_trim(model)
    assert calls == [0]
    ids = torch.arange(8)[None]
    model(input_ids=ids)
    assert calls == [0, 0]
    with torch.no_grad():
        model(input_ids=ids)
    assert calls == [0, 0]
    model(input_ids=ids)  # trimmed before it, too: an evaluation came first
    assert calls == [0] * 4
    model(input_ids=ids)
    assert calls == [0] * 5
    for hooks, saved in zip(tables, before, strict=True):
        hooks.clear()
        hooks.update(saved)
