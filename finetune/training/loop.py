"""Run optimizer steps, each normalized once by the global count of target tokens."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from finetune.config.schema import TrainConfig
from finetune.data.batch import Batch, build_batch, dummy_batch
from finetune.data.documents import Document
from finetune.data.packing import Sampler, micro_batches
from finetune.parallel.ranks import sum_gradients
from finetune.system.accelerator import default_device, on_gpu, runtime
from finetune.system.console import log
from finetune.system.errors import FinetuneError, Interrupted
from finetune.system.signals import StopSignals
from finetune.training.checkpoint import TrainState
from finetune.training.micro_batch import MicroBatch
from finetune.training.optimizer import learning_rate_at
from finetune.training.track import SilentTracker

Figures = dict[str, float]
BatchesOf = Callable[[int], list[Batch]]
_PLACES_SHOWN = 8


class RowLoss(Protocol):
    """A loss on whole rows, as a preference or a reward."""

    def count(self, documents: Sequence[Document]) -> float:
        """Return what the summed loss of documents is divided by."""
        ...

    def take_sums(self) -> Tensor:
        """Return this rank's sums for figures since the last call, fp64 on the CPU."""
        ...

    def figures_of(self, of_ranks: Tensor) -> Figures:
        """Return the figures from what `take_sums` returned on each rank [ranks, sums]."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The inputs of `train_step`, the same for all steps of a run.

    Attributes:
        loss: module from a Batch to the summed loss in nats.
        micro_batch: sequences per forward pass; fewer once memory ran out.
        share_prefixes: skip tokens after the last target, and compute shared prefixes once.
        is_sharded: whether the base is split over the ranks.
        resume_command: continues the run after a stop.
        last_checkpoint: returns the newest checkpoint for error messages, None before the first.
        row_loss: how a loss on rows is divided and described; None for a loss on tokens.
        round_steps: steps that share sampled answers. A run is saved and stopped only between rounds.
        before_step: `before_step(step, batches_of)`: called before the first forward pass of `step`.
            `batches_of(s)` returns this rank's batches of step `s`.
    """

    cfg: TrainConfig
    accelerator: Accelerator
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    total_steps: int
    micro_batch: MicroBatch
    share_prefixes: bool
    is_sharded: bool
    resume_command: str
    last_checkpoint: Callable[[], Path | None]
    row_loss: RowLoss | None = None
    round_steps: int = 1
    before_step: Callable[[int, BatchesOf], None] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one step over all ranks.

    Attributes:
        loss: nats per target token; under `preference`, per row.
        computed_tokens: the part of `tokens` that some target needs, with shared prefixes counted once.
        figures: further figures of the objective.
        stop_signal: 0, or the operating system's signal to stop for.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    computed_tokens: int
    target_tokens: int
    figures: Figures
    stop_signal: int


def _announce_stop(number: int, again: bool) -> None:
    if again and number == signal.SIGINT:
        raise KeyboardInterrupt
    log("\nstopping after this step, once its checkpoint is saved")


def peak_bytes() -> int:
    """Return the peak memory so far: the most that a GPU's allocator handed out, or the peak resident size on a CPU."""
    if on_gpu(device := default_device()):
        return runtime(device).max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fit(
    inputs: StepInputs,
    state: TrainState,
    *,
    tracker: SilentTracker,
    save: Callable[[TrainState], None],
    evaluate: Callable[[TrainState], tuple[Figures, bool]] | None = None,
    sample: Callable[[], None] | None = None,
    sample_every: int | None = None,
) -> bool:
    """Train from `state.step` to the last step, to `pause_at`, to early stopping, or until `evaluate` ends the run.

    Args:
        state: updated in place after each step.
        save: writes the checkpoint of a state on the main rank.
        evaluate: returns the figures of the held-out sets, `eval_loss` among them, and whether the run ends.
        sample: shows answers of the model, every `sample_every` steps.

    Returns:
        Whether the run is paused: saved, with steps left.

    Raises:
        Interrupted: after SIGTERM or Ctrl+C, once the checkpoint of the step is saved.
        FinetuneError: the loss or the gradient is NaN or infinite. The update is not made.
    """
    cfg, halted = inputs.cfg, False
    end = min(inputs.total_steps, cfg.pause_at or inputs.total_steps)
    with StopSignals(_announce_stop) as stop:
        while state.step < end and not halted and not _stopped_early(cfg, state):
            start, step = time.perf_counter(), state.step + 1
            result = train_step(inputs, step, stop.received)
            seconds = time.perf_counter() - start
            state.step, state.last_loss = step, result.loss
            state.tokens += result.tokens
            state.target_tokens += result.target_tokens
            state.seconds += seconds
            figures: Figures = {}
            improved = False
            if evaluate is not None and (step == inputs.total_steps or _is_due(cfg.eval_every, step)):
                figures, halted = evaluate(state)
                improved = _record_evaluation(state, figures)
            seconds_left = state.seconds / state.step * (inputs.total_steps - state.step)
            tracker.step({"step": step, **_metrics(result, seconds), **figures}, seconds_left)
            if sample is not None and _is_due(sample_every, step):
                sample()
            last = step == inputs.total_steps or halted or _stopped_early(cfg, state)
            stopping = result.stop_signal and _is_due(inputs.round_steps, step)
            if last or step == end or improved or stopping or _is_due(cfg.save_every, step):
                save(state)
            if stopping and not last and step < end:
                advice = f"help: {inputs.resume_command}"
                raise Interrupted(result.stop_signal, f"stopped by a signal after step {step}\n{advice}")
    if _stopped_early(cfg, state):
        tracker.message(f"early stopping: step={state.step}, best_step={state.best_step}")
    return state.step < inputs.total_steps and not halted and not _stopped_early(cfg, state)


def train_step(inputs: StepInputs, step: int, stop_signal: int = 0) -> StepResult:
    """Make optimizer step `step` (from 1) over the sequences of all ranks.

    The gradient of the summed loss is divided by the global count of target tokens. So neither micro-batches nor ranks
    change it. Every generator is seeded from (seed, step, rank), so nothing before the step changes its noise.

    Where memory runs out on any rank, all ranks repeat the passes with half the micro-batch: gradients are exchanged
    only once every rank has its own.

    Args:
        stop_signal: the signal that this rank received, 0 for none.

    Raises:
        ResourceError: memory ran out with one sequence per forward pass.
        FinetuneError: the loss or the gradient is NaN or infinite. The update is not made.
    """
    accelerator, optimizer = inputs.accelerator, inputs.optimizer
    sequences = inputs.sampler.step_batches(step - 1)
    documents = [document for sequence in sequences for document in sequence]
    target_tokens = sum(document.target_tokens for document in documents)
    count = target_tokens if inputs.row_loss is None else inputs.row_loss.count(documents)
    while True:
        passed = inputs.micro_batch.attempt(lambda: _add_gradients(inputs, step, sequences, count), step)
        loss_sum, rows = passed or (0.0, 0)
        more = [] if inputs.row_loss is None else inputs.row_loss.take_sums().tolist()
        sums = [[loss_sum, stop_signal, rows, passed is None, *more]]
        of_ranks = accelerator.gather(torch.tensor(sums, dtype=torch.float64, device=accelerator.device))
        if not of_ranks[:, 3].any():
            break
        optimizer.zero_grad(set_to_none=True)
        inputs.micro_batch.halve(step)
    loss_mean = of_ranks[:, 0].sum().item() / count
    _check_finite(inputs, "loss", loss_mean, step, documents)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters, accelerator)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, inputs.cfg.max_grad_norm or math.inf).item()
    _check_finite(inputs, "gradient norm", grad_norm, step, documents)
    learning_rate = learning_rate_at(inputs.cfg, step, inputs.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_factor"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss_mean,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        tokens=sum(map(len, documents)),
        computed_tokens=int(of_ranks[:, 2].sum().item()),
        target_tokens=target_tokens,
        figures={} if inputs.row_loss is None else inputs.row_loss.figures_of(of_ranks[:, 4:].cpu()),
        stop_signal=int(of_ranks[:, 1].max().item()),
    )


def _add_gradients(inputs: StepInputs, step: int, sequences: list[list[Document]], count: float) -> tuple[float, int]:
    """Make this rank's passes of a step; return its summed loss, and the rows that it computed."""
    set_seed((inputs.cfg.seed * 1_000_003 + step * 1_009 + inputs.accelerator.process_index) % 2**32)
    batches = _rank_batches(inputs, sequences)
    if inputs.before_step is not None:
        inputs.before_step(
            step, lambda s: batches if s == step else _rank_batches(inputs, inputs.sampler.step_batches(s - 1))
        )
    loss_sum = 0.0
    for batch in batches:
        loss = inputs.loss(batch)
        (loss * (1 / count)).backward()
        loss_sum += loss.item()
    return loss_sum, sum(batch.rows for batch in batches)


def _rank_batches(inputs: StepInputs, sequences: list[list[Document]]) -> list[Batch]:
    """Return this rank's part of a step's sequences, one batch per forward pass."""
    accelerator = inputs.accelerator
    lengths = [sum(map(len, sequence)) for sequence in sequences]
    of_ranks = micro_batches(lengths, accelerator.num_processes, inputs.micro_batch.size)
    groups = of_ranks[accelerator.process_index]
    documents = ([document for i in group for document in sequences[i]] for group in groups)
    batches = [build_batch(some, share_prefixes=inputs.share_prefixes) for some in documents]
    # Each pass of a sharded base gathers weights from all ranks, so all make as many passes as the busiest one.
    passes = max(map(len, of_ranks)) if inputs.is_sharded else 1
    return batches + [dummy_batch(sequences[0][0])] * (passes - len(batches))


def _check_finite(inputs: StepInputs, name: str, value: float, step: int, documents: Sequence[Document]) -> None:
    if math.isfinite(value):
        return
    places = sorted({document.location for document in documents})
    shown = ", ".join(places[:_PLACES_SHOWN])
    if (more := len(places) - _PLACES_SHOWN) > 0:
        shown += f" and {more} more"
    raise FinetuneError(
        f"step {step}: the {name} is {value}; the update was not made. Rows in the batch: {shown}. "
        f"Last good checkpoint: {inputs.last_checkpoint() or 'none'}\n"
        "help: check these rows, or lower train.learning_rate"
    )


def _is_due(every: int | None, step: int) -> bool:
    return bool(every) and step % every == 0


def _stopped_early(cfg: TrainConfig, state: TrainState) -> bool:
    return cfg.early_stopping is not None and state.evaluations_since_best >= cfg.early_stopping


def _record_evaluation(state: TrainState, figures: Figures) -> bool:
    """Store an evaluation and return whether it is the best so far."""
    state.evaluations = figures
    improved = state.best_loss is None or figures["eval_loss"] < state.best_loss
    if improved:
        state.best_loss, state.best_step, state.evaluations_since_best = figures["eval_loss"], state.step, 0
    else:
        state.evaluations_since_best += 1
    return improved


def _metrics(result: StepResult, seconds: float) -> Figures:
    """Return the figures of a step for metrics.jsonl."""
    figures: dict[str, Any] = asdict(result)
    del figures["stop_signal"]
    figures |= {f"train/{name}": value for name, value in figures.pop("figures").items()}
    return {**figures, "tokens_per_second": result.tokens / seconds, "peak_bytes": peak_bytes(), "seconds": seconds}
