"""A loaded run: its parts, how it scores its held-out sets, and how it answers their rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.config.schema import RunConfig
from finetune.data.loader import LoadedData, first_conversations
from finetune.data.sampler import Sampler
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.generation import Answer, answer_rows
from finetune.evaluation.scoring import evaluate
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.planning.auto_batch import BatchPlan
from finetune.system.console import Log
from finetune.training.distillation import DistillationSetup

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunContext:
    """The parts of one run, fixed once it is loaded. distillation: None for a run without a teacher."""

    cfg: RunConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    preparation: Preparation
    data: LoadedData
    sampler: Sampler
    model: PeftModel
    batch_plan: BatchPlan
    distillation: DistillationSetup | None

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process


def evaluate_run(context: RunContext) -> dict[str, float]:
    """Score every held-out set: loss, perplexity, accuracy and, with a teacher, the distance from it.

    Returns:
        `eval/NAME/METRIC` of each set, and `eval_loss`: the mean over the sets of the objective that the run minimizes.
    """
    accelerator = context.accelerator
    rank, ranks = accelerator.process_index, accelerator.num_processes
    figures: dict[str, float] = {}
    losses = []

    def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(sums.to(accelerator.device), "sum").cpu()

    for source in context.data.eval:
        measured = evaluate(
            context.model,
            source.documents[rank::ranks],
            limit_tokens=max(EVALUATION_TOKENS, context.cfg.data.max_length),
            sum_over_ranks=sum_over_ranks,
        )
        losses.append(measured.loss)
        figures |= {
            f"eval/{source.name}/loss": measured.loss,
            f"eval/{source.name}/perplexity": measured.perplexity,
            f"eval/{source.name}/accuracy": measured.accuracy,
        }
    if context.distillation is not None:
        part = slice(rank, None, ranks)
        figures |= context.distillation.figures(context.model, context.data, part, sum_over_ranks)
        if context.cfg.distill.objective == "recover":  # it minimizes the KL, not the loss on the rows
            losses = [value for name, value in figures.items() if name.endswith("/teacher_kl")]
    return {"eval_loss": sum(losses) / len(losses), **figures}


def answer_held_out(context: RunContext, rows: int) -> list[Answer]:
    """Answer the first held-out rows greedily, in order; each rank answers a part."""
    generation, ranks = context.cfg.generation, context.accelerator.num_processes
    conversations = first_conversations(context.data.eval[0], context.preparation, rows)
    mine = list(range(len(conversations)))[context.accelerator.process_index :: ranks]
    answers = answer_rows(
        context.model,
        context.tokenizer,
        context.preparation.chat,
        [conversations[i] for i in mine],
        max_new_tokens=generation.max_new_tokens,
        batch_size=generation.batch_size,
    )
    pairs = list(zip(mine, answers, strict=True))
    gathered = gather_object(pairs) if ranks > 1 else pairs
    return [answer for _, answer in sorted(gathered, key=lambda pair: pair[0])]


def log_samples(context: RunContext, log: Log) -> None:
    """Log the model's answers to the first `generation.samples` held-out rows."""
    for answer in answer_held_out(context, context.cfg.generation.samples):
        log(f"  {answer.prompt!r} -> {answer.given!r}")
