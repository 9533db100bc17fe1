"""Assemble and run one training run: plan, tokenizer, data, base, adapter, loss, fit, save, report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from transformers import PreTrainedModel

from finetune.config.schema import RunConfig, SourceConfig
from finetune.data.sources.memory import write_rows
from finetune.evaluation.generation import Answer, exact_match
from finetune.evaluation.probe import measure, text_rows, write_probe
from finetune.models.adapters.files import check_adapter, fetch_adapter, load_weights, save_adapter
from finetune.models.embedding import move_embedding_to_host
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
from finetune.models.load import check_loaded
from finetune.objectives.distillation import mean_teacher_kl, teacher_table
from finetune.objectives.user_rewards import RewardFunction, UserReward, check_rewards, user_rewards
from finetune.ops.determinism import deterministic
from finetune.parallel.heartbeat import Heartbeat
from finetune.parallel.ranks import build_accelerator, describe_ignored_settings, join_ranks
from finetune.parallel.sharding import is_sharded
from finetune.planning.auto_batch import free_memory
from finetune.planning.describe import describe_plan, describe_start
from finetune.report.run import TEACHER
from finetune.report.run_page import try_report
from finetune.system import console
from finetune.system.accelerator import device_warning, on_gpu
from finetune.system.atomic import sync, write_text
from finetune.system.console import Log
from finetune.system.errors import FinetuneError, Interrupted, os_errors_as
from finetune.system.format import format_bytes
from finetune.system.machine import use_all_cores
from finetune.system.manifest import record_files
from finetune.training import output_folder, run_folder
from finetune.training.assemble import assemble
from finetune.training.autotune import inputs_of_run
from finetune.training.checkpoint import (
    FULL_DISK,
    TrainState,
    load_training,
    prune_checkpoints,
    read_state,
    verify_checkpoint,
    write_checkpoint,
    write_folder,
)
from finetune.training.choices import choices_before, current_choices
from finetune.training.guard import build_guard
from finetune.training.loop import StepInputs, fit, peak_bytes
from finetune.training.micro_batch import try_largest_pass
from finetune.training.optimizer import build_optimizer
from finetune.training.run_context import (
    RunContext,
    answer_held_out,
    evaluate_before_training,
    evaluate_run,
    log_samples,
)
from finetune.training.run_folder import RunResult
from finetune.training.step_inputs import build_step_inputs
from finetune.training.summary import CARD, describe_result, model_card
from finetune.training.track import SilentTracker, Tracker


def train(
    cfg: RunConfig,
    rows: Iterable[Mapping[str, Any]] | None = None,
    verbose: bool = False,
    model: PreTrainedModel | None = None,
    reward_functions: Sequence[RewardFunction | UserReward] = (),
) -> RunResult:
    """Run one config from its files to a saved, verified adapter, or continue it as `train.resume` allows.

    Args:
        cfg: from `load_config`.
        rows: training examples in memory (a list of mappings, a Dataset, a DataFrame), in place of data.train.
        verbose: log the whole plan, threads and kernels too, not only model, data and memory.
        reward_functions: rewards of sampled answers beside `reward.functions`, each with weight 1; in TRL's signature.
        model: the base, from `load_base(cfg.model, cfg.quant)`, in place of loading it. It gets the trained adapter.

    Returns:
        The content of result.json.

    Raises:
        InputError: the config or the data is wrong; wherever possible, before any weight is loaded.
        Interrupted: SIGTERM or Ctrl+C stopped the run, and its checkpoint is saved.
        RankLost: another rank failed, was killed or cannot be reached.
    """
    started = datetime.now(UTC)
    own_rewards = user_rewards(reward_functions)
    check_rewards(cfg, own_rewards)
    if rows is not None:
        source = SourceConfig(path=str(write_rows(rows)), name="rows")
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"train": [source]})})
    with join_ranks() as heartbeat:
        return _train(cfg, heartbeat, model, own_rewards=own_rewards, verbose=verbose, started=started)


def _train(
    cfg: RunConfig,
    heartbeat: Heartbeat,
    model: PreTrainedModel | None,
    *,
    own_rewards: Sequence[UserReward],
    verbose: bool,
    started: datetime,
) -> RunResult:
    accelerator = build_accelerator(cfg)
    if model is not None:
        check_loaded(model, cfg.model, cfg.quant, accelerator.device)
    set_seed(cfg.train.seed)
    is_main, kind = accelerator.is_main_process, accelerator.device.type
    log: Log = console.log if is_main else _drop
    detail = log if verbose else _drop
    describe_ignored_settings(cfg, log)
    if message := device_warning():
        log(message)
    if message := use_all_cores(kind):
        detail(message)
    [folder] = broadcast_object_list([output_folder.choose_folder(cfg) if is_main else None])
    given, cfg = cfg, cfg.model_copy(update={"output_dir": folder})
    lock = output_folder.claim_folder(cfg) if is_main else None
    if cfg.output_dir != given.output_dir:
        log(f"output_dir: {folder} ({given.output_dir} holds a run)")
    with ExitStack() as stack:
        if lock is not None:
            stack.callback(output_folder.release_folder, lock)
        stack.enter_context(os_errors_as(FinetuneError, f"output_dir: {folder}: the run stopped", FULL_DISK))
        [checkpoint] = broadcast_object_list([run_folder.find_checkpoint(cfg, log) if is_main else None])
        [(stored, halvings)] = broadcast_object_list([_choices_before(cfg, checkpoint) if is_main else None])
        inputs = inputs_of_run(cfg, accelerator, stored, log)
        log((describe_plan if verbose else describe_start)(inputs, free_memory(kind)))
        if model is not None and inputs.embedding_on_host:
            move_embedding_to_host(model)
        options: dict[str, Any] = {"own_rewards": own_rewards, "log": log, "detail": detail, "started": started}
        context = assemble(cfg, inputs, accelerator, checkpoint, model, **options)
        if is_main:
            output_folder.link_latest(given, folder)
        with deterministic(cfg.train.deterministic and on_gpu(kind)):
            return _run(context, checkpoint, halvings, heartbeat)


def _drop(text: str) -> None:
    """Print nothing: the log of the other ranks, and of details."""


def _run(
    context: RunContext, checkpoint: Path | None, halvings: Sequence[dict[str, int]], heartbeat: Heartbeat
) -> RunResult:
    cfg, accelerator = context.cfg, context.accelerator
    optimizer = build_optimizer(cfg.train, context.model.named_parameters())
    state = _first_state(context, optimizer, checkpoint)
    inputs = build_step_inputs(context, optimizer, state)
    state.choices = current_choices(cfg.train, context.batch_plan, accelerator.num_processes)
    state.halvings = list(halvings)
    tracker = Tracker(cfg, context.folder, inputs.total_steps, state.step) if context.is_main else SilentTracker()
    guard = None if cfg.guard.max is None else build_guard(context, inputs, tracker.message)
    result = RunResult(
        "failed", world_size=accelerator.num_processes, predicted_peak_bytes=context.batch_plan.predicted_peak_bytes
    )
    heartbeat.on_loss = partial(_note_loss, context, state, result)
    try:
        with heartbeat.explained():
            with closing(tracker), closing(context.sampler):
                if state.step < inputs.total_steps:
                    _try_largest_pass(context, inputs, state)
                paused = fit(
                    inputs,
                    state,
                    tracker=tracker,
                    save=partial(_save_checkpoint, context, optimizer),
                    evaluate=(guard or partial(_evaluate, context)) if context.data.eval else None,
                    sample=partial(log_samples, context, tracker.message),
                    sample_every=cfg.generation.every,
                )
            apply_gradient_checkpointing(context.model, context.batch_plan.recompute)  # anew: unpins main memory
            if paused:
                _pause(context, state)
            else:
                _finish(context, optimizer, state, result)
        result.status = "paused" if paused else "finished"
    except Interrupted as error:
        result.status, result.error = "stopped", str(error)
        raise
    except BaseException as error:
        result.error = str(error) or type(error).__name__
        raise
    finally:
        _fill(result, state, context)
        if context.is_main:
            _write_end(context, result)
    return result


def _note_loss(context: RunContext, state: TrainState, result: RunResult, message: str) -> None:
    """Write the results of a run that ends at once, because another rank is lost."""
    result.error = message
    _fill(result, state, context)
    if context.is_main:
        run_folder.write_result(context.folder, result)


def _choices_before(cfg: RunConfig, checkpoint: Path | None) -> tuple[dict[str, Any], Sequence[dict[str, int]]]:
    return ({}, []) if cfg.train.resume == "never" else choices_before(Path(cfg.output_dir), checkpoint)


def _try_largest_pass(context: RunContext, inputs: StepInputs, state: TrainState) -> None:
    """Make the run's largest pass, so that one that cannot fit ends before its first step."""
    later = 0 if state.step else context.batch_plan.memory.static.parts.get("optimizer", 0)
    batch = try_largest_pass(inputs, state.step + 1, round(later))
    if batch is None:
        context.detail("memory: the largest pass is not tried first, since rows are streamed")
    else:
        context.detail(f"memory: largest pass tried, rows={batch.rows}, peak={format_bytes(peak_bytes())}")


def _write_end(context: RunContext, result: RunResult) -> None:
    """Write result.json and the report. A disk that cannot hold them does not hide an earlier error."""
    try:
        run_folder.write_result(context.folder, result)
    except OSError as error:
        if result.error is None:
            raise
        context.log(f"WARNING: {context.folder}: the result cannot be written ({error})")
    try_report(context.folder, context.log)


def _evaluate(context: RunContext, state: TrainState) -> tuple[dict[str, float], bool]:
    """Evaluate, and store the answers, so that the page of an unfinished run shows the latest."""
    figures = evaluate_run(context)
    if context.is_main and context.answers:
        _write_answers(context, state, context.answers)
    return figures, False


def _write_answers(context: RunContext, state: TrainState, after: Sequence[Answer]) -> None:
    shown = after[: context.cfg.generation.samples]
    run_folder.write_samples(context.folder, _answers_before(state), shown)
    if context.reinforcement is not None:
        run_folder.write_rewarded(context.folder, after)


def _answers_before(state: TrainState) -> list[Answer]:
    return [Answer.from_row(row) for row in state.before.get("answers", [])]


def _first_state(context: RunContext, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> TrainState:
    """Load the checkpoint, or evaluate the untrained model."""
    if checkpoint is not None:
        state = read_state(checkpoint)
        if context.cfg.lora.freeze_a:  # the training state holds trained parameters only
            load_weights(context.model, fetch_adapter(str(checkpoint), "train.resume"))
        load_training(checkpoint, optimizer)
        context.log(f"continuing from {checkpoint}")
    else:
        state = TrainState(run_folder.trajectory(context.cfg, context.own_rewards), context.sampler.digest)
        evaluate_before_training(context, state)
    if context.is_main:
        run_folder.write_samples(context.folder, _answers_before(state))
    return state


def _pause(context: RunContext, state: TrainState) -> None:
    """Evaluate a run that is paused and saved: what it computes from here on changes nothing when it continues."""
    every = context.cfg.train.eval_every
    if context.data.eval and (every is None or state.step % every):
        state.evaluations = evaluate_run(context)
    context.log(f"paused: step={state.step}, continue with train.resume=auto and a later train.pause_at, or none")


def _finish(context: RunContext, optimizer: torch.optim.Optimizer, state: TrainState, result: RunResult) -> None:
    """Restore the best adapter after early stopping, evaluate, save and print the results."""
    generation = context.cfg.generation
    if context.cfg.train.early_stopping is not None and state.best_step not in (None, state.step):
        best = context.folder / f"checkpoint-{state.best_step}"
        verify_checkpoint(best)
        load_training(best, optimizer)
        state.evaluations = evaluate_run(context)
        context.log(f"early stopping: final adapter=step {state.best_step} (the best one)")
    after: list[Answer] = []
    if generation.num_examples:
        # The last evaluation may have answered them.
        after = context.answers or answer_held_out(context, generation.num_examples)
        result.exact_match_after = exact_match(after) if context.reinforcement is None else None
    _fill(result, state, context)
    if context.reinforcement is not None:
        context.reinforcement.check_taught()
    if context.is_main:
        # Again: a process that was killed after its last save may not have deleted all that it should.
        prune_checkpoints(context.folder, context.cfg.train.keep_checkpoints, state.best_step)
        _save_final(context, result)
        result.adapter = str(context.folder)
        if (before := state.before.get("evaluations")) and context.distillation is not None:
            write_text(context.folder / TEACHER, teacher_table(before, state.evaluations))
        _write_answers(context, state, after)
        if after and context.reinforcement is None:
            run_folder.write_worst(context.folder, after)
        print(describe_result(result, _answers_before(state), after[: generation.samples]))
    context.accelerator.wait_for_everyone()
    _record_probe(context)


def _fill(result: RunResult, state: TrainState, context: RunContext) -> None:
    speed, result.predicted_time_source = context.predicted_speed
    result.predicted_train_seconds = state.tokens / speed
    result.duration_seconds = (datetime.now(UTC) - context.started).total_seconds()
    result.steps, result.target_tokens = state.step, state.target_tokens
    result.final_loss, result.train_seconds = state.last_loss, state.seconds
    result.tokens_per_second = state.tokens / state.seconds if state.seconds else None
    result.evaluations, result.eval_loss = state.evaluations, state.evaluations.get("eval_loss")
    result.evaluations_before = state.before.get("evaluations", {})
    result.eval_loss_before = result.evaluations_before.get("eval_loss")
    result.exact_match_before = state.before.get("exact_match")
    result.teacher_kl_before = mean_teacher_kl(result.evaluations_before)
    result.teacher_kl_after = mean_teacher_kl(state.evaluations)
    if context.reinforcement is not None and result.eval_loss is not None:
        # What training lowers is the negative reward; 0 - x is never -0.
        result.reward_after = 0 - result.eval_loss
        result.reward_before = None if result.eval_loss_before is None else 0 - result.eval_loss_before
    recovers = state.trajectory.get("distill.objective") == "recover"
    if recovers and result.teacher_kl_before and result.teacher_kl_after is not None:
        result.recovered = 1 - result.teacher_kl_after / result.teacher_kl_before
    result.breaches = state.breaches
    result.micro_batch, result.halvings = state.choices.get("micro_batch"), state.halvings
    result.peak_bytes = peak_bytes()


def _save_checkpoint(context: RunContext, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    if context.is_main:
        folder = context.folder / f"checkpoint-{state.step}"
        write_checkpoint(folder, lambda part: save_adapter(context.model, part, context.tokenizer), optimizer, state)
        prune_checkpoints(context.folder, context.cfg.train.keep_checkpoints, state.best_step)
    context.accelerator.wait_for_everyone()


def _save_final(context: RunContext, result: RunResult) -> None:
    """Write and verify the adapter in a folder of its own, then move it into place file by file."""

    def write(folder: Path) -> None:
        save_adapter(context.model, folder, context.tokenizer)
        check_adapter(folder, context.model)
        (folder / CARD).write_text(model_card(context.cfg, result), encoding="utf-8")

    staged = context.folder / ".adapter"
    write_folder(staged, write)
    names = sorted(file.name for file in staged.iterdir())
    for name in names:
        os.replace(staged / name, context.folder / name)
    # After the files: in between, the manifest of an earlier end of this run shows that they do not belong together.
    record_files(context.folder, [name for name in names if name != CARD])
    sync(context.folder)
    staged.rmdir()


def _record_probe(context: RunContext) -> None:
    """Record what the trained model computes on a few rows, with which `finetune serve` compares its answers.

    All ranks compute it where the base is sharded.
    """
    data = context.data
    rows = text_rows(data.eval[0].documents if data.eval else data.documents if data.train else ())
    if not rows or not (context.is_main or is_sharded(context.model)):
        return
    measured = measure(context.model, rows)
    if context.is_main:
        source = "held-out rows of the run" if data.eval else "training rows of the run"
        write_probe(context.folder, rows, measured, source=source, base=context.cfg.model.name)
