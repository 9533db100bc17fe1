"""Fit a run to the memory of its machine: recomputed layers, sequences per forward pass; and predict its speed."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune.config.command_options import PlanOptions
from finetune.config.schema import RunConfig
from finetune.data.loader import LoadedData
from finetune.losses.hidden_states import base_of
from finetune.models.decoder import decoder_of
from finetune.models.families import shape_of, text_settings
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
from finetune.ops.dispatch import compile_problem
from finetune.planning.activations import elementwise_kernels
from finetune.planning.advice import changes_that_fit
from finetune.planning.auto_batch import BatchPlan, choose_micro_batch, free_memory, keep_copies, place_embedding
from finetune.planning.inputs import GpuTraits, PlanInputs, plan_inputs
from finetune.planning.media import measured_media
from finetune.planning.peak_memory import MARGIN, predict_peak
from finetune.planning.sharded_base import shard_group
from finetune.planning.timing import estimate_time, read_rates
from finetune.system.accelerator import (
    default_device,
    device_name,
    free_bytes_of,
    has_flash_attention,
    on_gpu,
    runtime,
)
from finetune.system.console import Log
from finetune.system.format import format_bytes
from finetune.system.machine import available_memory, malloc_trim, nodes_of_run, ranks_here
from finetune.training.choices import repeat_choices

# Gradient and AdamW's moments come later; the weights are already loaded. A guard's recovery has moments of its own.
_BYTES_PER_TRAINED_LATER, _BYTES_IN_A_RECOVERY = 12, 8


def inputs_of_run(cfg: RunConfig, accelerator: Accelerator, stored: dict[str, Any], log: Log) -> PlanInputs:
    """Build the inputs of a run's plan for the device of this process.

    stored: the choices of an earlier part of the run, which are repeated; empty for a new run.
    """
    device, ranks, gpu = accelerator.device, accelerator.num_processes, GpuTraits()
    if has_flash_attention(device):
        gpu = GpuTraits(True, runtime(device).get_device_properties(device).multi_processor_count)
    elif on_gpu(device):
        gpu = GpuTraits(False)
    nodes = nodes_of_run(os.environ)
    inputs = plan_inputs(cfg, shape_of(cfg.model.name), device_type=device.type, ranks=ranks, gpu=gpu, nodes=nodes)
    inputs = replace(inputs, shard_ranks=shard_group(inputs, _least_free(accelerator)))
    inputs = inputs.with_settings(train=repeat_choices(cfg.train, stored, ranks, log))
    if on_gpu(device) and elementwise_kernels(inputs) == "compiled" and compile_problem(device):
        inputs = inputs.with_settings(train={"compile": False})
    inputs = place_embedding(inputs, free_memory(device.type))
    if stored.get("ranks") != ranks:
        return keep_copies(inputs, free_memory(device.type))
    kept = cfg.quant.keep_dequantized or stored.get("keep_dequantized", False)
    return inputs.with_settings(quant={"keep_dequantized": kept})


def _least_free(accelerator: Accelerator) -> float | None:
    """Return the free device memory of the rank that has least, None if it is unknown: all ranks must decide alike."""
    free = free_memory(accelerator.device.type)
    known = torch.tensor([-1.0 if free is None else free], dtype=torch.float64, device=accelerator.device)
    least = accelerator.gather(known).min().item()
    return None if least < 0 else least


def with_answers(inputs: PlanInputs, data: LoadedData) -> PlanInputs:
    """Return the inputs with the media of rows, and what limits the memory of answers that share a prompt.

    Streamed rows are unknown. With rewards that is the longest prompt, with pairs the largest share of trained tokens.
    """
    inputs = _with_media(inputs, data)
    if not data.train or inputs.row_objective in ("none", "kto"):
        return inputs
    lengths, targets = data.documents.lengths, data.documents.targets
    if not inputs.learns_from_rewards:
        return inputs.with_rows(None, (targets / lengths).max().item())
    prompts = lengths - targets
    return inputs.with_rows(prompts[prompts <= inputs.data.max_length - inputs.reward.max_new_tokens].max().item(), 1.0)


def _with_media(inputs: PlanInputs, data: LoadedData) -> PlanInputs:
    """Return the inputs with the measured media of all rows, unless they are streamed or the model has no towers."""
    if not data.train or not inputs.towers:
        return inputs
    documents = data.documents
    rows = zip(documents.lengths.tolist(), documents.media_of_each(), strict=True)
    return replace(inputs, media=measured_media(inputs.towers, rows, data.every_document.media()))


def apply_batch_plan(inputs: PlanInputs, model: nn.Module, accelerator: Accelerator, log: Log) -> BatchPlan:
    """Choose the micro-batch for the memory that is free after loading, and set up gradient checkpointing.

    All ranks follow the rank with the least free memory, measured once all of them have loaded.

    Raises:
        ConfigError: train.gradient_checkpointing exceeds the number of layers.
    """
    if accelerator.device.type == "cpu":
        install_malloc_trim(model)
    accelerator.wait_for_everyone()
    device = accelerator.device
    if on_gpu(device):
        memory = runtime(device)
        free = free_bytes_of(device) + memory.memory_reserved(device) - memory.memory_allocated(device)
    else:
        free = available_memory() // ranks_here(os.environ)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    each = _BYTES_PER_TRAINED_LATER + (_BYTES_IN_A_RECOVERY if inputs.may_recover else 0)
    for_activations = max(0.0, (free - trained * each) / (1 + MARGIN[inputs.device_kind]))
    of_ranks = accelerator.gather(torch.tensor([for_activations], dtype=torch.float64, device=device))
    inputs = inputs.with_model_config(text_settings(base_of(model).config.to_dict()))
    plan = choose_micro_batch(inputs, of_ranks.min().item())
    apply_gradient_checkpointing(model, plan.recompute)
    log(plan.text)
    return plan


def advice_on_memory(plan: BatchPlan, device_type: str) -> str:
    """Return the predicted memory of a run with one sequence per forward pass, what is free, and changes that help."""
    inputs = plan.inputs.with_settings(train={"micro_batch_size": 1})
    memory = predict_peak(inputs, 1, plan.memory.recomputed)
    free = free_memory(device_type)
    lines = [f"predicted_peak={format_bytes(memory.peak_bytes)}, {memory.moment}"]
    if free is not None:
        lines[0] += f"; free={format_bytes(free)} with what this process holds of main memory"
    # Memory ran out, so the run had less than its predicted peak, or another process took some.
    changes = changes_that_fit(inputs, min(memory.peak_bytes, math.inf if free is None else free))
    advice = "help: free memory of the device, or " + ("change the run:" if changes else "lower data.max_length")
    return "\n".join([*lines, advice, *(f"  {change}" for change in changes)])


def predict_speed(inputs: PlanInputs, model: nn.Module, plan: BatchPlan, data: LoadedData) -> tuple[float, str]:
    """Predict the tokens per second of training, from rates that were measured or are assumed.

    The real lengths and trained tokens of the examples count, unless they are streamed.

    Returns:
        The speed of all ranks, and the source of the rates.
    """
    inputs = inputs.with_model_config(text_settings(base_of(model).config.to_dict()))
    if data.train:
        documents = data.documents
        tokens, targets = int(documents.lengths.sum()), int(documents.targets.sum())
        inputs = inputs.with_rows(round(tokens / len(documents)), max(1, targets) / tokens)
        if inputs.towers_stay:
            inputs = _with_media(inputs, data)
    gpu_name = device_name(default_device()) if inputs.on_gpu else None
    rates = read_rates(inputs.device_type)
    timing = estimate_time(inputs, plan.memory, rates=rates, options=PlanOptions(), gpu_name=gpu_name)
    return timing["tokens_per_second"], timing["rates"].partition(";")[0]


def install_malloc_trim(model: nn.Module) -> None:
    """Return free heap memory to the system: now, after each training pass, and before one that follows an evaluation.

    A layer's temporaries lie between the tensors it keeps. Once freed, they are holes too small for backward's blocks,
    so they would add to the peak: 0.25 GB for 0.5B and 1,024 tokens. One trim per step has no measurable cost
    (docs/planning.md).
    """
    malloc_trim()
    evaluated = False

    def before_forward(*_: Any) -> None:
        # Not after each pass of an evaluation, because one generated token is one pass.
        nonlocal evaluated
        if torch.is_grad_enabled() and evaluated:
            malloc_trim()
        evaluated = not torch.is_grad_enabled()

    def after_forward(*_: Any) -> None:
        if torch.is_grad_enabled():
            malloc_trim()

    base = base_of(model)
    backbone = decoder_of(base)
    # The first and the last module that a pass calls outside the decoder layers, which checkpointing calls again.
    backbone.rotary_emb.register_forward_pre_hook(before_forward)
    backbone.norm.register_forward_hook(after_forward)
