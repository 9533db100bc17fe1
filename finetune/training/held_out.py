"""Held-out rows during a run: scored, and answered by the model as it is."""

from __future__ import annotations

import torch
from accelerate.utils import gather_object

from finetune.data.loader import first_conversations
from finetune.evaluation.generation import Answer, answer_rows
from finetune.evaluation.perplexity import evaluate
from finetune.system.console import Log
from finetune.training.run_context import Parts


def evaluate_run(parts: Parts) -> dict[str, float]:
    """loss, perplexity and accuracy of every evaluation set, how far it is from the teacher where there is one, and
    `eval_loss`, the mean over the sets of what the run minimizes.
    """
    rank, ranks = parts.accelerator.process_index, parts.accelerator.num_processes
    figures: dict[str, float] = {}
    losses = []

    def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
        return parts.accelerator.reduce(sums.to(parts.accelerator.device), "sum").cpu()

    for source in parts.data.eval:
        measured = evaluate(
            parts.model,
            source.documents[rank::ranks],
            limit_tokens=max(4096, parts.cfg.data.max_length),
            sum_over_ranks=sum_over_ranks,
        )
        losses.append(measured.loss)
        figures |= {
            f"eval/{source.name}/loss": measured.loss,
            f"eval/{source.name}/perplexity": measured.perplexity,
            f"eval/{source.name}/accuracy": measured.accuracy,
        }
    if parts.lesson is not None:
        figures |= parts.lesson.figures(parts.model, parts.data, slice(rank, None, ranks), sum_over_ranks)
        if parts.cfg.distill.objective == "recover":  # what it minimizes
            losses = [value for name, value in figures.items() if name.endswith("/teacher_kl")]
    return {"eval_loss": sum(losses) / len(losses), **figures}


def answer_held_out(parts: Parts, rows: int) -> list[Answer]:
    """Greedy answers to the first held-out rows, shared out among the ranks, in order."""
    generation, ranks = parts.cfg.generation, parts.accelerator.num_processes
    conversations = first_conversations(parts.data.eval[0], parts.preparation, rows)
    mine = list(range(len(conversations)))[parts.accelerator.process_index :: ranks]
    answers = answer_rows(
        parts.model,
        parts.tokenizer,
        parts.preparation.chat,
        [conversations[i] for i in mine],
        max_new_tokens=generation.max_new_tokens,
        batch_size=generation.batch_size,
    )
    pairs = gather_object(list(zip(mine, answers, strict=True))) if ranks > 1 else list(zip(mine, answers, strict=True))
    return [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]


def say_samples(parts: Parts, log: Log) -> None:
    for answer in answer_held_out(parts, parts.cfg.generation.samples):
        log(f"  {answer.prompt!r} -> {answer.given!r}")
