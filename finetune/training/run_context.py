"""A loaded run: its parts, how it scores its held-out sets, and how it answers their rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import RunConfig
from finetune.data.loader import LoadedData, first_conversations
from finetune.data.packing import Sampler
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.generation import Answer, answer_rows, exact_match
from finetune.evaluation.metrics import METRICS
from finetune.evaluation.scoring import agreement, evaluate
from finetune.objectives.distillation import DistillationSetup
from finetune.objectives.preference import PreferenceSetup
from finetune.objectives.reinforcement import PolicySetup
from finetune.objectives.user_rewards import UserReward
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.planning.auto_batch import BatchPlan
from finetune.report.facts import with_interval
from finetune.system.console import Log
from finetune.training.checkpoint import TrainState


@dataclass(frozen=True)
class RunContext:
    """The parts of one run, fixed once it is loaded.

    Attributes:
        log: prints on the main rank alone.
        detail: prints there what only --verbose shows.
        distillation: None for a run without a teacher.
        preference: None for a run that does not compare answers.
        reinforcement: None for a run without rewards.
        own_rewards: functions of the user that judge answers.
        started: start of this process's part of the run.
        predicted_speed: tokens per second of training, and the source of the rates.
        answers: of the latest evaluation, replaced by the next one; empty if it needed none.
    """

    cfg: RunConfig
    accelerator: Accelerator
    log: Log
    detail: Log
    tokenizer: PreTrainedTokenizerBase
    preparation: Preparation
    data: LoadedData
    sampler: Sampler
    model: PeftModel
    batch_plan: BatchPlan
    distillation: DistillationSetup | None
    preference: PreferenceSetup | None
    reinforcement: PolicySetup | None
    own_rewards: Sequence[UserReward]
    started: datetime
    predicted_speed: tuple[float, str]
    answers: list[Answer] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def part(self) -> slice:
        """What this rank takes of documents that all ranks have."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def scoring_options(self) -> dict[str, Any]:
        """Return the options that all functions which score documents take."""

        def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
            return self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()

        limit_tokens = max(EVALUATION_TOKENS, self.cfg.data.max_length)
        return {"limit_tokens": limit_tokens, "sum_over_ranks": sum_over_ranks}

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process


def evaluate_run(context: RunContext) -> dict[str, float]:
    """Score every held-out set, and with `generation.metrics` the answers to the first rows."""
    figures = score_held_out(context)
    if context.cfg.generation.metrics and context.reinforcement is None:
        context.answers[:] = answer_held_out(context, context.cfg.generation.num_examples)
    return {**figures, **score_answers(context, context.answers)}


def score_answers(context: RunContext, answers: Sequence[Answer]) -> dict[str, float]:
    """Return `eval/NAME/METRIC`, the mean over the answers, of each metric in `generation.metrics`.

    Raises: DataError if a metric finds nothing to compare in an expected answer.
    """
    names = context.cfg.generation.metrics
    return {f"eval/{context.data.eval[0].name}/{name}": METRICS[name].scores(answers).mean().item() for name in names}


def score_held_out(context: RunContext) -> dict[str, float]:
    """Score every held-out set: loss, perplexity, accuracy and, with a teacher, the distance from it.

    A run with rewards has them in place of perplexity and accuracy; `context.answers` gets the judged answers to the
    first set.

    Returns:
        `eval/NAME/METRIC` of each set, and `eval_loss`: the mean over the sets of the objective that the run minimizes.
        `teacher_kl` is in nats per target, `teacher_agreement` in [0, 1].
    """
    distillation, part, options = context.distillation, context.part, context.scoring_options()
    figures: dict[str, float] = {}
    losses = []
    for source in context.data.eval:
        if context.preference is not None:
            scores = context.preference.evaluate(source.documents, part, **options)
        elif context.reinforcement is not None:
            scores, judged = context.reinforcement.evaluate(source.documents)
            if source is context.data.eval[0]:
                context.answers[:] = judged
        else:
            found = evaluate(context.model, source.documents[part], **options)
            scores = {name: getattr(found, name) for name in ("loss", "perplexity", "accuracy")}
        losses.append(scores["loss"])
        figures |= {f"eval/{source.name}/{name}": value for name, value in scores.items()}
    if distillation is not None:
        for source in context.data.eval:
            scores = agreement(
                context.model, distillation.teacher, source.documents[part], distillation.vocabulary, **options
            )
            figures[f"eval/{source.name}/teacher_kl"] = scores.kl
            figures[f"eval/{source.name}/teacher_agreement"] = scores.top1
        if context.cfg.distill.objective == "recover":  # it minimizes the KL, not the loss on the rows
            losses = [value for name, value in figures.items() if name.endswith("/teacher_kl")]
    return {"eval_loss": sum(losses) / len(losses), **figures}


def answer_held_out(context: RunContext, rows: int) -> list[Answer]:
    """Answer the first held-out rows greedily, in order, and judge the answers in a run with rewards.

    Each rank answers a part.
    """
    if context.reinforcement is not None:
        return context.reinforcement.evaluate(context.data.eval[0].documents[:rows])[1]
    conversations = first_conversations(context.data.eval[0], context.preparation, rows)
    mine = range(context.accelerator.process_index, len(conversations), context.accelerator.num_processes)
    answers = answer_rows(
        context.model,
        context.tokenizer,
        context.preparation.chat,
        [conversations[i] for i in mine],
        max_new_tokens=context.cfg.generation.max_new_tokens,
        batch_size=context.cfg.generation.batch_size,
    )
    gathered = gather_object(list(zip(mine, answers, strict=True)))
    return [answer for _, answer in sorted(gathered, key=lambda pair: pair[0])]


def log_samples(context: RunContext, log: Log) -> None:
    """Log the model's answers to the first `generation.samples` held-out rows; with rewards, a step's extremes."""
    policy, count = context.reinforcement, context.cfg.generation.samples
    for answer in answer_held_out(context, count) if policy is None else policy.best_and_worst():
        reward = "" if answer.reward is None else f"  reward {answer.reward:.4g}"
        log(f"  {answer.prompt!r} -> {answer.given!r}{reward}")


def evaluate_before_training(context: RunContext, state: TrainState) -> None:
    """Answer held-out rows, and measure their rewards, or the distance from the teacher."""
    generation, log = context.cfg.generation, context.log
    if context.reinforcement is not None and context.data.eval:
        figures = evaluate_run(context)
        shown = [answer.as_row() for answer in context.answers[: generation.samples]]
        state.before |= {"answers": shown, "evaluations": figures}
        for source in context.data.eval:
            log(f"before training: set={source.name}, reward={with_interval(figures, f'eval/{source.name}/reward')}")
    elif generation.num_examples:
        answers = answer_held_out(context, generation.num_examples)
        state.before |= {
            "exact_match": exact_match(answers),
            "answers": [answer.as_row() for answer in answers[: generation.samples]],
            "evaluations": score_answers(context, answers),
        }
        log(f"before training: held-out exact_match={state.before['exact_match']:.1%}, answers={len(answers)}")
    if context.distillation is not None and context.data.eval:
        # Quantization loss is a property of the base: a LoftQ adapter already holds a part of the correction.
        recovers = context.cfg.distill.objective == "recover"
        with context.model.disable_adapter() if recovers else nullcontext():
            figures = score_held_out(context)
        state.before["evaluations"] = {**state.before.get("evaluations", {}), **figures}
        for source in context.data.eval:
            kl, top1 = (figures[f"eval/{source.name}/{name}"] for name in ("teacher_kl", "teacher_agreement"))
            log(f"before training: set={source.name}, teacher_kl={kl:.5f} nats/target, teacher_agreement={top1:.1%}")
