"""What every optimizer step of a run takes: its loss, its order of rows, and its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from finetune.losses.cross_entropy import CrossEntropy
from finetune.losses.distillation import Distillation, DistillLossWeights
from finetune.losses.hidden_states import base_of
from finetune.models.adapters.folder import list_checkpoints
from finetune.models.adapters.names import is_factor
from finetune.objectives.preference import PreferenceLoss, PreferenceSetup
from finetune.objectives.reinforcement import PolicyLoss
from finetune.ops import dispatch, matmul
from finetune.parallel.ranks import copy_from_main
from finetune.parallel.sharding import is_sharded
from finetune.report.facts import resume_command
from finetune.system.accelerator import on_gpu
from finetune.training.autotune import advice_on_memory
from finetune.training.checkpoint import TrainState
from finetune.training.choices import leave_smaller
from finetune.training.loop import BatchesOf, StepInputs
from finetune.training.micro_batch import MicroBatch
from finetune.training.run_context import RunContext


def build_step_inputs(context: RunContext, optimizer: torch.optim.Optimizer, state: TrainState) -> StepInputs:
    """Build the loss of a run and all else that a step needs; choose its kernels."""
    cfg, accelerator, distillation = context.cfg, context.accelerator, context.distillation
    total_steps = cfg.train.max_steps or context.sampler.steps_for(cfg.train.epochs or 1)
    _configure_kernels(context, total_steps, state.choices.get("compiled"))
    loss: CrossEntropy | Distillation | PreferenceLoss | PolicyLoss
    before_step, sampler, preference = None, context.sampler, context.preference
    if context.reinforcement is not None:
        loss, before_step = context.reinforcement.loss, context.reinforcement.before_step
    elif preference is not None:
        loss = preference.loss
        before_step = _divergence_hook(context, preference) if cfg.preference.objective == "kto" else None
    elif distillation is not None and cfg.distill.objective != "none":
        weights = DistillLossWeights.of(cfg.distill)
        loss = Distillation(context.model, weights, distillation.vocabulary, cfg.train.neftune_alpha)
        before_step = distillation.before_step(loss, total_steps)
        if cfg.distill.on_policy:
            chat = context.preparation.chat
            sampler = distillation.build_sampler(sampler, context.model, chat, accelerator, context.log)
    else:  # no teacher, or one that is only measured against
        loss = CrossEntropy(context.model, cfg.train.neftune_alpha)
    named = context.model.named_parameters()
    copy_from_main((each for name, each in named if each.requires_grad or is_factor(name)), accelerator)
    # Noise is drawn per token of each document, so documents cannot share computed prefixes under it.
    noisy = bool(cfg.lora.dropout or cfg.train.neftune_alpha)
    return StepInputs(
        cfg=cfg.train,
        accelerator=accelerator,
        loss=loss,
        optimizer=optimizer,
        sampler=sampler,
        total_steps=total_steps,
        micro_batch=_micro_batch(context, state),
        share_prefixes=cfg.train.kernels == "fused" and cfg.train.share_prefixes and not noisy,
        is_sharded=is_sharded(context.model),
        resume_command=resume_command(context.folder, [own.word for own in context.own_rewards]),
        last_checkpoint=lambda: next(reversed(list_checkpoints(context.folder)), None),
        row_loss=context.reinforcement or preference,
        round_steps=cfg.reward.updates,
        before_step=before_step,
    )


def _micro_batch(context: RunContext, state: TrainState) -> MicroBatch:
    """Build the micro-batch of a run. Where memory runs out, the log, the run's state and its checkpoints say so."""

    def halved(step: int, size: int, problem: str) -> None:
        context.log(f"WARNING: memory: step {step} ran out of memory ({problem}); repeated with micro_batch={size}")
        state.choices["micro_batch"] = size
        state.halvings.append({"step": step, "micro_batch": size})

    def leave(step: int, size: int) -> None:
        leave_smaller(context.folder, state, step, size)

    plan, kind = context.batch_plan, context.accelerator.device.type
    leaves = leave if is_sharded(context.model) else None
    return MicroBatch(plan.micro_batch, halved, lambda: advice_on_memory(plan, kind), leaves)


def _divergence_hook(context: RunContext, preference: PreferenceSetup) -> Callable[[int, BatchesOf], None]:
    """Build the hook that estimates the divergence from the reference over the rows of a step, for kto."""
    options = context.scoring_options()

    def before_step(step: int, _: BatchesOf) -> None:
        documents = [document for sequence in context.sampler.step_batches(step - 1) for document in sequence]
        preference.estimate_divergence(documents, context.part, **options)

    return before_step


def _configure_kernels(context: RunContext, steps: int, before: bool | None) -> None:
    """Choose between eager and compiled kernels for the whole run, as before if a checkpoint continues it."""
    cfg, device = context.cfg, context.accelerator.device
    fused = cfg.train.kernels == "fused"
    all_fused = fused and not cfg.lora.dora and not cfg.quant.int8 and cfg.quant.type != "int8"
    if on_gpu(device):
        matmul.require_fp32_sums()
    if message := matmul.describe(device, getattr(torch, cfg.model.dtype), all_fused):
        (context.detail if all_fused else context.log)(message)
    if fused:
        most_tokens = steps * cfg.train.batch_size * cfg.data.max_length
        flops = 4.0 * base_of(context.model).num_parameters() * most_tokens
        wanted = before if cfg.train.compile is None else cfg.train.compile
        choice = dispatch.configure_compile(device, flops, wanted)
        (context.detail if dispatch.STATE.compiled or device.type == "cpu" else context.log)(choice)
