"""A run's predicted peak is the plan's figure, and free heap memory returns to the system."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from finetune import attach_lora, load_base, load_config
from finetune.models.fused import fuse_layers
from finetune.planning.peak_memory import predict
from finetune.system import heap
from finetune.training import autotune
from finetune.training.autotune import choose_micro_batch, install_malloc_trim
from tests.runs import small_run


@pytest.fixture(scope="module")
def model():
    cfg = load_config("quickstart.yaml", [])
    loaded = attach_lora(load_base(cfg.model, cfg.quant, "cpu"), cfg.lora)
    fuse_layers(loaded)
    return loaded.train()


def test_the_predicted_peak_is_the_plans_for_the_chosen_micro_batch(model, tmp_path):
    cfg, logged = small_run(tmp_path, "train.gradient_checkpointing=2", "data.eval=[]"), []
    found = choose_micro_batch(cfg, model, Accelerator(cpu=True), logged.append)
    shape = model.get_base_model().config.to_dict()
    assert found.micro_batch == 4
    assert found.predicted_peak_bytes == round(predict(cfg, shape, "cpu", 4, 2).peak_bytes)
    assert "2 of 4 layers" in logged[0]


def test_little_free_memory_means_recomputing(model, tmp_path, monkeypatch):
    logged: list[str] = []
    cfg = small_run(tmp_path)
    monkeypatch.setattr(autotune, "available_memory", lambda: 2**40)
    plenty = choose_micro_batch(cfg, model, Accelerator(cpu=True), logged.append)
    monkeypatch.setattr(autotune, "available_memory", lambda: 2**20)
    short = choose_micro_batch(cfg, model, Accelerator(cpu=True), logged.append)
    assert "none of 4 layers" in logged[0] and "may not fit" in logged[1]
    # The evaluation of 4,096 tokens is the peak of so small a model, whatever its training takes.
    assert short.micro_batch < plenty.micro_batch and short.predicted_peak_bytes <= plenty.predicted_peak_bytes


def test_the_heap_is_trimmed_after_training_passes_only(model, monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "malloc_trim", lambda: calls.append(0))
    decoder = model.get_base_model().model
    handles, pre_handles = dict(decoder._forward_hooks), dict(decoder._forward_pre_hooks)
    decoder._forward_hooks.clear()
    decoder._forward_pre_hooks.clear()
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
    for hooks, before in ((decoder._forward_hooks, handles), (decoder._forward_pre_hooks, pre_handles)):
        hooks.clear()
        hooks.update(before)
