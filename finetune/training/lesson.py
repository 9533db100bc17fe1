"""What a distilling run has besides a plain one: a teacher, its loss, and how far the model is from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import RunConfig
from finetune.data.batch import Batch
from finetune.data.documents import Documents
from finetune.data.loader import LoadedData, used_ids
from finetune.data.template.chat import ChatTemplate
from finetune.distill.schedule import Schedule
from finetune.distill.teacher import build_teacher, check_vocabulary
from finetune.evaluation.agreement import agreement
from finetune.losses.distillation import Distillation
from finetune.losses.divergence import Terms
from finetune.losses.signal import Teacher

Say = Callable[[str], None]
_CANNOT_TEACH = (
    "recover brings back what quantisation took from this base; it cannot teach a new task: for that, "
    "distill.objective=distill with a larger or tuned teacher, or sft+anchor"
)


@dataclass(frozen=True)
class Lesson:
    """Whom a run learns from, and the ids that take part, from 0 on."""

    cfg: RunConfig
    teacher: Teacher
    vocabulary: int

    def loss(self, model: PeftModel) -> Distillation:
        """The training loss as a module."""
        return Distillation(model, Terms.of(self.cfg.distill), self.vocabulary, self.cfg.train.neftune_alpha)

    def before_step(self, loss: Distillation, total_steps: int) -> Callable[[int, Callable[[int], list[Batch]]], None]:
        """What the loop calls before a step's batches run: asks the teacher about them."""
        schedule = Schedule(self.teacher, self.cfg.distill.teacher.steps_ahead, total_steps)
        return lambda step, batches_of: loss.expect(schedule.signals(step, batches_of))

    def figures(
        self, model: PeftModel, data: LoadedData, part: slice, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """`eval/NAME/teacher_kl` in nats a target and `eval/NAME/teacher_agreement`, a share, of every evaluation set.

        part: of each set's documents, what this rank looks at.
        """
        figures: dict[str, float] = {}
        for source in data.eval:
            found = agreement(
                model, self.teacher, source.documents[part], self.vocabulary,
                limit_tokens=max(4096, self.cfg.data.max_length), sum_over_ranks=sum_over_ranks,
            )  # fmt: skip
            figures[f"eval/{source.name}/teacher_kl"] = found.kl
            figures[f"eval/{source.name}/teacher_agreement"] = found.top1
        return figures


def plan_lesson(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, data: LoadedData, say: Say) -> int:
    """Ids that student and teacher share; 0 for a run that learns from rows alone. Nothing is loaded yet.

    Raises: ConfigError if the teacher means something else by a token that is in use.
    """
    if cfg.distill.objective == "none":
        return 0
    if cfg.distill.objective == "recover":
        say(_CANNOT_TEACH)
    used = np.arange(len(tokenizer)) if cfg.data.stream_rows else used_ids(data)
    return check_vocabulary(cfg, tokenizer, used)


def build_lesson(
    cfg: RunConfig,
    base: PreTrainedModel,
    chat: ChatTemplate,
    data: LoadedData,
    vocabulary: int,
    device: torch.device,
    say: Say,
) -> Lesson | None:
    """The teacher of a run; None for a run that learns from rows alone. base: before an adapter is on it."""
    if cfg.distill.objective == "none":
        return None
    sources = [*data.train, *data.eval]
    documents = Documents.join(source.documents for source in sources) if sources else ()
    return Lesson(cfg, build_teacher(cfg, base, chat, vocabulary, documents, device, say), vocabulary)
