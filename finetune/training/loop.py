"""The loop: one optimizer step after another, normalized once by the global count of target tokens."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from finetune.config.schema import TrainConfig
from finetune.data.batch import Batch, build_batch, dummy_batch
from finetune.data.documents import Document
from finetune.data.packing import split_among_ranks
from finetune.data.sampler import Sampler
from finetune.system.console import log
from finetune.system.errors import FinetuneError, Interrupted
from finetune.training.checkpoint import TrainState
from finetune.training.optim import learning_rate_at
from finetune.training.track import SilentTracker, Tracker


@dataclass(frozen=True)
class Job:
    """Everything the loop works with.

    loss: module from Batch to the summed loss, wrapped for DDP. micro_batch: sequences a forward pass.
    share_prefixes: skip tokens after the last target, and compute shared prefixes once.
    before_step: told a step, and what gives this rank's batches of it or of a later one, before any of them runs.
    evaluate: the evaluations' figures by name, `loss` among them; None without held-out rows. guard: takes them, gives
    them as they are after what it did, and whether the run ends. sample: shows answers.
    save: writes the checkpoint of a state, on the main rank. last_checkpoint: the newest one, None before the first.
    """

    cfg: TrainConfig
    accelerator: Accelerator
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    total_steps: int
    micro_batch: int
    share_prefixes: bool
    tracker: Tracker | SilentTracker
    save: Callable[[TrainState], None]
    last_checkpoint: Callable[[], Path | None]
    before_step: Callable[[int, Callable[[int], list[Batch]]], None] | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    guard: Callable[[TrainState, dict[str, float]], tuple[dict[str, float], bool]] | None = None
    sample: Callable[[], None] | None = None
    sample_every: int | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one step over all ranks. loss: nats a target token. signal_number: 0, or the signal to stop for.

    computed_tokens: those of `tokens` that some target needs, with what rows share counted once.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    computed_tokens: int
    target_tokens: int
    signal_number: int


class StopSignals:
    """Remembers SIGTERM and Ctrl+C until the step is done; a second Ctrl+C stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError):  # not in the main thread: signals stay with whoever started this one
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        log("\nstopping after this step; its checkpoint will be saved")


def peak_bytes() -> int:
    """Highest memory so far: CUDA's max allocated, on CPU the process's peak resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fit(job: Job, state: TrainState) -> None:
    """Train from `state.step` to the end, to early stopping or until the guard ends it; `state` is kept up to date.

    Raises: Interrupted after a signal, once the step's checkpoint is saved; FinetuneError on a loss or gradient that is
    not finite, before it reaches the weights.
    """
    halted = False
    with StopSignals() as stop:
        while state.step < job.total_steps and not halted and not _stopped_early(job, state):
            start = time.perf_counter()
            step = state.step + 1
            result = train_step(job, step, stop.received)
            seconds = time.perf_counter() - start
            _advance(state, result, seconds)
            figures, improved, halted = _evaluate_if_due(job, state, step)
            job.tracker.step({**_metrics(step, result, seconds), **figures}, _seconds_left(job, state))
            if job.sample is not None and job.sample_every and step % job.sample_every == 0:
                job.sample()
            last = step == job.total_steps or halted or _stopped_early(job, state)
            if last or improved or result.signal_number or (job.cfg.save_every and step % job.cfg.save_every == 0):
                job.save(state)
            if result.signal_number and not last:
                raise Interrupted(
                    result.signal_number, f"stopped by a signal after step {step}; continue with train.resume=auto"
                )
    if _stopped_early(job, state):
        job.tracker.message(f"early stopping: no better evaluation since step {state.best_step}")


def train_step(job: Job, step: int, signal_number: int = 0) -> StepResult:
    """One optimizer step (from 1) over the step's sequences on all ranks.

    Gradient: d(sum of nats)/d(weights) divided by the global count of target tokens, so neither micro-batches nor ranks
    change it. Every generator is seeded from (seed, step, rank): what happened before a step cannot change it.
    """
    accelerator, ranks = job.accelerator, job.accelerator.num_processes
    set_seed((job.cfg.seed * 1_000_003 + step * 1_009 + accelerator.process_index) % 2**32)
    sequences = job.sampler.step_batches(step - 1)
    documents = [document for sequence in sequences for document in sequence]
    target_tokens = sum(document.target_tokens for document in documents)
    loss_sum = 0.0
    batches = _rank_batches(job, sequences)
    if job.before_step is not None:
        job.before_step(step, lambda s: batches if s == step else _rank_batches(job, job.sampler.step_batches(s - 1)))
    for i, batch in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(job.loss):
            loss = job.loss(batch.to(accelerator.device))
            accelerator.backward(loss * (ranks / target_tokens))
        loss_sum += loss.item()
    shared = accelerator.gather(
        torch.tensor(
            [[loss_sum, signal_number, sum(batch.rows for batch in batches)]],
            dtype=torch.float64,
            device=accelerator.device,
        )
    )
    loss_mean = shared[:, 0].sum().item() / target_tokens
    _check_finite(job, "loss", loss_mean, step, documents)
    grad_norm = _clip(job)
    _check_finite(job, "gradient norm", grad_norm, step, documents)
    learning_rate = learning_rate_at(job.cfg, step, job.total_steps)
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss_mean,
        learning_rate,
        grad_norm,
        sum(map(len, documents)),
        int(shared[:, 2].sum().item()),
        target_tokens,
        int(shared[:, 1].max().item()),
    )


def _rank_batches(job: Job, sequences: list[list[Document]]) -> list[Batch]:
    """What this rank computes of a step's sequences, a forward pass each."""
    ranks, rank = job.accelerator.num_processes, job.accelerator.process_index
    mine = split_among_ranks([sum(map(len, sequence)) for sequence in sequences], ranks)[rank]
    if not mine:
        return [dummy_batch(sequences[0][0])]
    groups = [[sequences[i] for i in mine[j : j + job.micro_batch]] for j in range(0, len(mine), job.micro_batch)]
    return [build_batch(list(chain.from_iterable(group)), share_prefixes=job.share_prefixes) for group in groups]


def _clip(job: Job) -> float:
    parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
    limit = job.cfg.max_grad_norm or math.inf
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.item()


def _check_finite(job: Job, what: str, value: float, step: int, documents: Sequence[Document]) -> None:
    if math.isfinite(value):
        return
    places = sorted({document.location for document in documents})
    shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    raise FinetuneError(
        f"step {step}: the {what} is {value}, so the update was not made. Rows in the batch: {shown}. Look at them or "
        f"lower train.learning_rate. The last good checkpoint is {job.last_checkpoint() or 'none yet'}."
    )


def _stopped_early(job: Job, state: TrainState) -> bool:
    return job.cfg.early_stopping is not None and state.evaluations_since_best >= job.cfg.early_stopping


def _advance(state: TrainState, result: StepResult, seconds: float) -> None:
    state.step += 1
    state.tokens += result.tokens
    state.target_tokens += result.target_tokens
    state.seconds += seconds
    state.last_loss = result.loss


def _evaluate_if_due(job: Job, state: TrainState, step: int) -> tuple[dict[str, float], bool, bool]:
    """The evaluations' figures, whether they are the best so far, and whether the guard ends the run; nothing between
    two evaluations.
    """
    due = step == job.total_steps or (job.cfg.eval_every and step % job.cfg.eval_every == 0)
    if job.evaluate is None or not due:
        return {}, False, False
    figures, halted = job.evaluate(), False
    if job.guard is not None:
        figures, halted = job.guard(state, figures)
    state.evaluations = figures
    improved = state.best_loss is None or figures["eval_loss"] < state.best_loss
    if improved:
        state.best_loss, state.best_step, state.evaluations_since_best = figures["eval_loss"], step, 0
    else:
        state.evaluations_since_best += 1
    return figures, improved, halted


def _metrics(step: int, result: StepResult, seconds: float) -> dict[str, float]:
    """One line of metrics.jsonl: counts and seconds are this step's, over all ranks."""
    return {
        "step": step,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "computed_tokens": result.computed_tokens,
        "target_tokens": result.target_tokens,
        "tokens_per_second": result.tokens / seconds,
        "peak_bytes": peak_bytes(),
        "seconds": seconds,
    }


def _seconds_left(job: Job, state: TrainState) -> float:
    return state.seconds / state.step * (job.total_steps - state.step)
