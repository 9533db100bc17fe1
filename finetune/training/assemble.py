"""Assemble one run: tokenizer, data, base, towers, teacher, adapter, and the objective."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import RunConfig
from finetune.data import loader
from finetune.data.packing import MapSampler, Sampler, SequenceOrder
from finetune.data.stream import StreamingSampler
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation, console_progress
from finetune.distill.resident import Share
from finetune.models.adapters.attach import attach_lora
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.models.quant.four_bit import keep_resident
from finetune.models.tokenizer import extend_tokenizer, load_tokenizer
from finetune.objectives.distillation import build_distillation, check_distillation
from finetune.objectives.preference import build_preference, check_preference
from finetune.objectives.reinforcement import build_reinforcement, prepare_judge, prompts_with_room
from finetune.objectives.user_rewards import UserReward
from finetune.parallel.sharding import shard_base, shard_mesh
from finetune.planning.inputs import PlanInputs
from finetune.report.dataset.files import store_report
from finetune.system.console import Log
from finetune.system.machine import ranks_here
from finetune.towers.towers import Towers, build_towers
from finetune.training import run_folder
from finetune.training.autotune import apply_batch_plan, predict_speed, with_answers
from finetune.training.run_context import (
    RunContext,
)


def assemble(
    cfg: RunConfig,
    inputs: PlanInputs,
    accelerator: Accelerator,
    checkpoint: Path | None,
    base: PreTrainedModel | None,
    *,
    own_rewards: Sequence[UserReward],
    log: Log,
    detail: Log,
    started: datetime,
) -> RunContext:
    """Load the parts of a run, in their order. Raises: InputError, wherever possible before any weight is loaded."""
    tokenizer = load_tokenizer(cfg.model)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    preparation = _preparation(cfg, tokenizer, accelerator, log)
    data, chat = loader.load_data(preparation), preparation.chat
    _describe_data(cfg, data, chat, log)
    sampler = _build_sampler(cfg, preparation, data, log)
    if checkpoint is not None:
        run_folder.check_continuation(cfg, sampler.digest, checkpoint, own_rewards)
    if accelerator.is_main_process:
        kind, ranks = accelerator.device.type, accelerator.num_processes
        run_folder.describe_run(cfg, sampler.digest, own_rewards, started=started, device_type=kind, world_size=ranks)
        _store_data(cfg, preparation, data, tokenizer, log)
    judge = prepare_judge(cfg, own_rewards, data, preparation)
    vocabulary = check_distillation(cfg, tokenizer, data, log)
    given, base = base, _with_copies(base or _load(cfg, inputs, accelerator, log), cfg, inputs)
    share = _share_among(inputs.shard_ranks, cfg, accelerator)
    if towers := build_towers(base, cfg.model, preparation.media, cfg.data.media_cache and not cfg.lora.towers):
        _run_towers(towers, cfg, data, accelerator, log=log, keep=given is not None)
    # Before the adapter is attached: student and teacher use one copy of equal tensors.
    parts = {"chat": chat, "data": data, "vocabulary": vocabulary, "accelerator": accelerator, "share": share}
    distillation = build_distillation(cfg, base=base, log=log, **parts)
    model = _attach(base, cfg)
    _fuse(model, cfg, detail)
    _share(base, share, inputs, log)
    model.train()
    preference = build_preference(cfg, model, chat, data, log)
    reinforcement = build_reinforcement(cfg, model, sampler, judge, accelerator=accelerator, log=log) if judge else None
    batch_plan = apply_batch_plan(with_answers(inputs, data), model, accelerator, log)
    return RunContext(
        cfg=cfg,
        accelerator=accelerator,
        log=log,
        detail=detail,
        tokenizer=tokenizer,
        preparation=preparation,
        data=data,
        sampler=sampler if reinforcement is None else reinforcement.rollouts,
        model=model,
        batch_plan=batch_plan,
        distillation=distillation,
        preference=preference,
        reinforcement=reinforcement,
        own_rewards=own_rewards,
        started=started,
        predicted_speed=predict_speed(inputs, model, batch_plan, data),
    )


def _preparation(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, log: Log) -> Preparation:
    chat = loader.load_chat_template(cfg.data, tokenizer)
    # Ranks of one machine share its disk: one of them tokenizes, the others wait for its files.
    main, processor = accelerator.is_local_main_process, loader.load_media_processor(cfg.model, cfg.data)
    return Preparation(cfg.data, chat, main, console_progress(log), cfg.row_objective, processor)


def _load(cfg: RunConfig, inputs: PlanInputs, accelerator: Accelerator, log: Log) -> PreTrainedModel:
    return load_base(inputs.model, cfg.quant, accelerator.device, log, mapped=inputs.shard_ranks > 1)


def _attach(base: PreTrainedModel, cfg: RunConfig) -> PeftModel:
    """Attach the adapter. Its random start depends on nothing that was loaded before: federated parties share it."""
    torch.manual_seed(cfg.train.seed)
    # A second tokenizer, because attach_lora adds the new tokens itself.
    return attach_lora(base, cfg.lora, load_tokenizer(cfg.model) if cfg.lora.new_tokens else None)


def _fuse(model: PeftModel, cfg: RunConfig, detail: Log) -> None:
    if cfg.train.kernels == "fused":
        detail(f"kernels: {fuse_layers(model)}")


def _share(base: PreTrainedModel, share: Share | None, inputs: PlanInputs, log: Log) -> None:
    if share is not None:
        share(base)
        log(f"base: sharded over {inputs.shard_ranks} ranks")


def _share_among(ranks: int, cfg: RunConfig, accelerator: Accelerator) -> Share | None:
    """Return the function that keeps this rank's part of a loaded model, of which `ranks` ranks hold one copy."""
    if ranks == 1:
        return None
    device = accelerator.device
    return partial(shard_base, mesh=shard_mesh(device, ranks), device=device, offload=cfg.parallel.offload)


def _with_copies(base: PreTrainedModel, cfg: RunConfig, inputs: PlanInputs) -> PreTrainedModel:
    """Return the base, with copies of its 4-bit weights in 16 bit if the plan wants them and loading made none."""
    if inputs.quant.keep_dequantized and not cfg.quant.keep_dequantized:
        keep_resident(base)
    return base


def _run_towers(
    towers: Towers, cfg: RunConfig, data: loader.LoadedData, accelerator: Accelerator, *, log: Log, keep: bool
) -> None:
    """Let frozen towers compute the media of all rows, and free them. Ranks of a machine share its disk and the work.

    keep: the caller's base serves other runs too.
    """
    media = list(data.every_document.media())
    towers.fill(media[accelerator.local_process_index :: ranks_here(os.environ)], log)
    accelerator.wait_for_everyone()
    if not keep and not cfg.data.stream_rows:  # a stream brings media that are not known yet
        towers.release()


def _describe_data(cfg: RunConfig, data: loader.LoadedData, chat: ChatTemplate, log: Log) -> None:
    warnings = loader.describe_leaks(data)
    if (advice := loader.advice_on_end_token(chat)) and "lm_head" not in cfg.lora.modules_to_save:
        warnings = [*warnings, advice]
    for line in (
        *map(loader.describe_source, (*data.train, *data.eval)),
        *(f"WARNING: {warning}" for warning in warnings),
    ):
        log(line)


def _store_data(
    cfg: RunConfig,
    preparation: Preparation,
    data: loader.LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    log: Log,
) -> None:
    """Write the report on the data, and the list of skipped rows, into the run's folder."""
    folder = Path(cfg.output_dir)
    store_report(folder, data, cfg, preparation.chat, tokenizer)
    if listed := loader.copy_bad_rows(data, folder):
        log(f"data: skipped rows are listed in {listed}")


def _build_sampler(cfg: RunConfig, preparation: Preparation, data: loader.LoadedData, log: Log) -> Sampler:
    if cfg.data.stream_rows:
        log(f"data: training rows are streamed, {cfg.data.stream_rows:,} at a time")
        return StreamingSampler(preparation, cfg.train.batch_size, cfg.train.seed, Path(cfg.output_dir) / "stream")
    if cfg.reward.loss != "none":
        kept = prompts_with_room(cfg, data, log)
        documents, weights = data.documents.select(kept), data.weights[kept]
        order = SequenceOrder(documents.lengths, weights, None, cfg.train.batch_size, cfg.train.seed)
        return MapSampler(documents, order, data.digest)
    check_preference(cfg, data)
    pack_to = cfg.data.max_length if cfg.data.packing else None
    order = SequenceOrder(data.documents.lengths, data.weights, pack_to, cfg.train.batch_size, cfg.train.seed)
    return MapSampler(data.documents, order, data.digest)
