"""Assembles one run and runs it, in this order: plan, tokenizer, data, base, adapter, loss, fit, save, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from finetune.config.schema import RunConfig
from finetune.data.loader import (
    LoadedData,
    copy_bad_rows,
    describe_leaks,
    describe_source,
    load_chat_template,
    load_data,
)
from finetune.data.packing import SequenceOrder
from finetune.data.sampler import MapSampler, Sampler
from finetune.data.stream import StreamingSampler
from finetune.data.template.chat import ChatTemplate, advice_on_end_token
from finetune.data.tokens.prepare import Preparation, console_progress
from finetune.evaluation.generation import Answer, exact_match
from finetune.losses.cross_entropy import CrossEntropy
from finetune.losses.distillation import Distillation
from finetune.losses.hidden_states import base_of
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import check_adapter, save_adapter
from finetune.models.families import shape_of
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base, load_tokenizer
from finetune.models.tokens import extend_tokenizer
from finetune.ops import dispatch, matmul
from finetune.planning.auto_batch import free_memory
from finetune.planning.describe import describe_plan
from finetune.report.dataset.stored import store_report
from finetune.report.page import try_report
from finetune.system import console
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import ConfigError, Interrupted
from finetune.training import run_folder
from finetune.training.autotune import choose_micro_batch, use_all_cores
from finetune.training.card import model_card
from finetune.training.checkpoint import (
    TrainState,
    list_checkpoints,
    load_training,
    prune_checkpoints,
    read_state,
    replace_files,
    write_checkpoint,
    write_folder,
)
from finetune.training.distillation import build_distillation, check_distillation, mean_teacher_kl, teacher_table
from finetune.training.guard import build_guard
from finetune.training.held_out import answer_held_out, evaluate_run, say_samples
from finetune.training.loop import Job, fit, peak_bytes
from finetune.training.optim import build_optimizer
from finetune.training.run_context import Parts
from finetune.training.run_folder import RunResult
from finetune.training.summary import describe_result
from finetune.training.track import SilentTracker, Tracker


def train(cfg: RunConfig) -> RunResult:
    """Run one config from its files to a saved, verified adapter; continue an earlier run where `train.resume` says so.

    Returns: the content of result.json.
    Raises: InputError before any weight is loaded, where the input can be judged so early; Interrupted after a signal.
    """
    # Told so, accelerate starts ranks over gloo; left to guess, it gives a torchrun on CPU one rank each.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    _check_world_size(cfg, accelerator)
    set_seed(cfg.train.seed)
    log = _speaker(accelerator)
    if threads := use_all_cores(accelerator.device.type):
        log(threads)
    lock = run_folder.claim_folder(cfg) if accelerator.is_main_process else None
    try:
        checkpoint = _on_main(accelerator, lambda: run_folder.find_checkpoint(cfg, log))
        kind = accelerator.device.type
        log(describe_plan(cfg, shape_of(cfg.model.name), accelerator.num_processes, kind, free_memory(kind)))
        parts = _load(cfg, accelerator, checkpoint, log)
        return _run(parts, checkpoint, log)
    finally:
        if lock is not None:
            run_folder.release_folder(lock)


def _load(cfg: RunConfig, accelerator: Accelerator, checkpoint: Path | None, log: Log) -> Parts:
    tokenizer = load_tokenizer(cfg.model)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    chat = load_chat_template(cfg.data, tokenizer)
    # Ranks of one machine share its disk: one of them tokenizes, the others wait for its files.
    preparation = Preparation(cfg.data, chat, accelerator.is_local_main_process, console_progress(log))
    data = load_data(preparation)
    warnings = [*describe_leaks(data), *_end_token_advice(cfg, chat)]
    for line in (*map(describe_source, (*data.train, *data.eval)), *(f"WARNING: {warning}" for warning in warnings)):
        log(line)
    sampler = _build_sampler(cfg, preparation, data)
    if cfg.data.stream_rows:
        log(f"training rows are read while training, {cfg.data.stream_rows:,} at a time")
    if checkpoint is not None:
        run_folder.check_continuation(cfg, sampler.digest, checkpoint)
    if accelerator.is_main_process:
        run_folder.describe_run(cfg, Path(cfg.output_dir), sampler.digest, accelerator.num_processes)
        store_report(Path(cfg.output_dir), data, cfg, chat, tokenizer)
        if listed := copy_bad_rows(data, Path(cfg.output_dir)):
            log(f"skipped rows are listed in {listed}")
    vocabulary = check_distillation(cfg, tokenizer, data, log)
    base = load_base(cfg.model, cfg.quant, accelerator.device, log)
    # Before the adapter is attached: what student and teacher have in common is one copy.
    lesson = build_distillation(cfg, base, chat, data, vocabulary, accelerator, log)
    # It adds the new tokens to a tokenizer of its own.
    model = attach_lora(base, cfg.lora, load_tokenizer(cfg.model) if cfg.lora.new_tokens else None)
    if cfg.train.kernels == "fused":
        fuse_layers(model)
    model.train()
    found = choose_micro_batch(cfg, model, accelerator, log)
    return Parts(cfg, accelerator, tokenizer, preparation, data, sampler, model, found, lesson)


def _end_token_advice(cfg: RunConfig, chat: ChatTemplate) -> list[str]:
    advice = advice_on_end_token(chat)
    return [advice] if advice and "lm_head" not in cfg.lora.modules_to_save else []


def _build_sampler(cfg: RunConfig, preparation: Preparation, data: LoadedData) -> Sampler:
    if cfg.data.stream_rows:
        return StreamingSampler(preparation, cfg.train.batch_size, cfg.train.seed, Path(cfg.output_dir) / "stream")
    order = SequenceOrder(
        data.documents.lengths,
        data.weights,
        cfg.data.max_length if cfg.data.packing else None,
        cfg.train.batch_size,
        cfg.train.seed,
    )
    return MapSampler(data.documents, order, data.digest)


def _run(parts: Parts, checkpoint: Path | None, log: Log) -> RunResult:
    cfg, accelerator = parts.cfg, parts.accelerator
    optimizer = build_optimizer(cfg.train, parts.model.named_parameters())
    state = TrainState(run_folder.trajectory(cfg), parts.sampler.digest)
    if checkpoint is not None:
        state = read_state(checkpoint)
        load_training(checkpoint, optimizer)
        log(f"continuing from {checkpoint}")
    else:
        _evaluate_before_training(parts, state, log)
    if parts.is_main:
        run_folder.write_samples(parts.folder, state.before.get("answers", []))
    total_steps = cfg.train.max_steps or parts.sampler.steps_for(cfg.train.epochs or 1)
    all_fast = cfg.train.kernels == "fused" and not cfg.lora.dora and not cfg.quant.int8 and cfg.quant.type != "int8"
    if told := matmul.describe(accelerator.device, getattr(torch, cfg.model.dtype), all_fast):
        log(told)
    if cfg.train.kernels == "fused":
        most_tokens = (total_steps - state.step) * cfg.train.batch_size * cfg.data.max_length
        flops = 4.0 * base_of(parts.model).num_parameters() * most_tokens
        log(dispatch.configure_compile(accelerator.device, flops, cfg.train.compile))
    lesson = parts.lesson
    if lesson is not None and lesson.has_teacher:
        loss = lesson.loss(parts.model)
    else:
        loss = CrossEntropy(parts.model, cfg.train.neftune_alpha)
    sampler = parts.sampler
    if lesson:
        sampler = lesson.sampler(sampler, parts.model, parts.preparation.chat, accelerator, log)
    tracker = Tracker(cfg, parts.folder, total_steps, state.step) if parts.is_main else SilentTracker()
    job = Job(
        cfg=cfg.train,
        accelerator=accelerator,
        optimizer=optimizer,
        loss=accelerator.prepare_model(loss, device_placement=False),
        before_step=lesson.before_step(loss, total_steps) if lesson and isinstance(loss, Distillation) else None,
        sampler=sampler,
        total_steps=total_steps,
        share_prefixes=_can_share_prefixes(cfg),
        micro_batch=parts.fit.micro_batch,
        tracker=tracker,
        save=lambda state: _save_checkpoint(parts, optimizer, state),
        last_checkpoint=lambda: next(reversed(list_checkpoints(parts.folder)), None),
        evaluate=(lambda: evaluate_run(parts)) if parts.data.eval else None,
        sample=lambda: say_samples(parts, tracker.message),
        sample_every=cfg.generation.every,
    )
    if lesson is not None and cfg.guard.max is not None:
        job = build_guard(job, parts, lesson, lambda: evaluate_run(parts))
    result = RunResult(
        "failed", world_size=accelerator.num_processes, predicted_peak_bytes=parts.fit.predicted_peak_bytes
    )
    try:
        with closing(tracker), closing(parts.sampler):
            fit(job, state)
        _finish(parts, optimizer, state, result, log)
        result.status = "finished"
    except Interrupted as error:
        result.status, result.error = "stopped", str(error)
        raise
    except BaseException as error:
        result.error = str(error) or type(error).__name__
        raise
    finally:
        _fill(result, state)
        if parts.is_main:
            run_folder.write_result(parts.folder, result)
            try_report(parts.folder, log)
    return result


def _evaluate_before_training(parts: Parts, state: TrainState, log: Log) -> None:
    """Answer held-out rows and measure the distance from the teacher before the first step."""
    generation = parts.cfg.generation
    if generation.num_examples:
        answers = answer_held_out(parts, generation.num_examples)
        state.before |= {
            "exact_match": exact_match(answers),
            "answers": [[a.prompt, a.expected, a.given] for a in answers[: generation.samples]],
        }
        log(f"held-out exact match before training: {state.before['exact_match']:.1%} of {len(answers)}")
    if parts.lesson is not None and parts.data.eval:
        # What quantization took is a matter of the base: an adapter may start as a part of the answer (loftq).
        recovers = parts.cfg.distill.objective == "recover"
        with parts.model.disable_adapter() if recovers else nullcontext():
            state.before["evaluations"] = figures = evaluate_run(parts)
        for source in parts.data.eval:
            kl, top1 = (figures[f"eval/{source.name}/{name}"] for name in ("teacher_kl", "teacher_agreement"))
            log(f"{source.name} before training: {kl:.5f} nats a target from the teacher, same first choice {top1:.1%}")


def _finish(parts: Parts, optimizer: torch.optim.Optimizer, state: TrainState, result: RunResult, log: Log) -> None:
    """Evaluate and save what the run has learned, and say so."""
    cfg = parts.cfg
    if cfg.train.early_stopping is not None and state.best_step not in (None, state.step):
        load_training(parts.folder / f"checkpoint-{state.best_step}", optimizer)
        state.evaluations = evaluate_run(parts)
        log(f"the final adapter is the best one, of step {state.best_step}")
    after: list[Answer] = []
    asked_before = state.before.get("answers", [])
    if cfg.generation.num_examples:
        after = answer_held_out(parts, cfg.generation.num_examples)
        result.exact_match_after = exact_match(after)
    _fill(result, state)
    if parts.is_main:
        _save_final(parts, result)
        result.adapter = str(parts.folder)
        if (before := state.before.get("evaluations")) and parts.lesson is not None:
            write_text(parts.folder / run_folder.TEACHER_TABLE, teacher_table(before, state.evaluations))
        run_folder.write_samples(parts.folder, asked_before, after[: cfg.generation.samples])
        print(describe_result(result, asked_before, after[: cfg.generation.samples]))
    parts.accelerator.wait_for_everyone()


def _fill(result: RunResult, state: TrainState) -> None:
    result.steps, result.target_tokens = state.step, state.target_tokens
    result.final_loss, result.train_seconds = state.last_loss, state.seconds
    result.tokens_per_second = state.tokens / state.seconds if state.seconds else None
    result.evaluations, result.eval_loss = state.evaluations, state.evaluations.get("eval_loss")
    result.exact_match_before = state.before.get("exact_match")
    result.teacher_kl_before = mean_teacher_kl(state.before.get("evaluations", {}))
    result.teacher_kl_after = mean_teacher_kl(state.evaluations)
    recovers = state.trajectory.get("distill.objective") == "recover"
    if recovers and result.teacher_kl_before and result.teacher_kl_after is not None:
        result.recovered = 1 - result.teacher_kl_after / result.teacher_kl_before
    result.breaches = state.breaches
    result.peak_bytes = peak_bytes()


def _save_checkpoint(parts: Parts, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    if parts.is_main:
        folder = parts.folder / f"checkpoint-{state.step}"
        write_checkpoint(folder, lambda temporary: _write_adapter(parts, temporary), optimizer, state)
        prune_checkpoints(parts.folder, parts.cfg.train.keep_checkpoints, state.best_step)
    parts.accelerator.wait_for_everyone()


def _write_adapter(parts: Parts, folder: Path) -> None:
    save_adapter(parts.model, folder, parts.tokenizer)


def _save_final(parts: Parts, result: RunResult) -> None:
    """Write, read back and check the adapter beside its place, then put it there file by file."""

    def write(folder: Path) -> None:
        _write_adapter(parts, folder)
        check_adapter(folder, parts.model)
        (folder / "README.md").write_text(model_card(parts.cfg, result), encoding="utf-8")

    staged = parts.folder / ".adapter"
    write_folder(staged, write)
    replace_files(staged, sorted(p.name for p in staged.iterdir()), parts.folder)
    shutil.rmtree(staged)


def _can_share_prefixes(cfg: RunConfig) -> bool:
    """Whether documents may share what they have in common: not where noise is drawn for each token of each."""
    train = cfg.train
    return train.kernels == "fused" and train.share_prefixes and not cfg.lora.dropout and not train.neftune_alpha


def _check_world_size(cfg: RunConfig, accelerator: Accelerator) -> None:
    if cfg.train.world_size not in (None, accelerator.num_processes):
        raise ConfigError(
            f"train.world_size asks for {cfg.train.world_size} ranks, but {accelerator.num_processes} started; "
            "launch/accelerate/ has a launch command for each case"
        )


def _speaker(accelerator: Accelerator) -> Log:
    return console.log if accelerator.is_main_process else (lambda text: None)


def _on_main(accelerator: Accelerator, compute: Callable[[], Path | None]) -> Path | None:
    """The main rank's answer, on every rank."""
    answer = [compute() if accelerator.is_main_process else None]
    return broadcast_object_list(answer)[0] if accelerator.num_processes > 1 else answer[0]
