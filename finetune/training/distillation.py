"""What a run with a teacher has besides a plain one: the teacher, its loss, and how far the model is from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import RunConfig
from finetune.data.batch import Batch
from finetune.data.documents import Documents
from finetune.data.loader import LoadedData, used_ids
from finetune.data.sampler import Sampler
from finetune.data.template.chat import ChatTemplate
from finetune.distill.filling import write_cache
from finetune.distill.on_policy import OnPolicySampler
from finetune.distill.schedule import Schedule
from finetune.distill.teacher import build_teacher, check_vocabulary, check_width
from finetune.evaluation.agreement import agreement
from finetune.evaluation.sampling import sample_answers
from finetune.losses.distillation import Distillation
from finetune.losses.divergence import DistillLossWeights
from finetune.losses.teacher_targets import Teacher
from finetune.system.console import Log

_CANNOT_TEACH = (
    "recover brings back what quantization took from this base; it cannot teach a new task: for that, "
    "distill.objective=distill with a larger or tuned teacher, or sft+anchor"
)


@dataclass(frozen=True)
class DistillationSetup:
    """Whom a run learns from, and the ids that take part, from 0 on."""

    cfg: RunConfig
    teacher: Teacher
    vocabulary: int

    @property
    def has_teacher(self) -> bool:
        """Whether the run learns from the teacher, or is only measured against it."""
        return self.cfg.distill.objective != "none"

    def loss(self, model: PeftModel) -> Distillation:
        """The training loss as a module."""
        return Distillation(
            model, DistillLossWeights.of(self.cfg.distill), self.vocabulary, self.cfg.train.neftune_alpha
        )

    def recovery_loss(self, model: PeftModel) -> Distillation:
        """Forward KL from the teacher alone."""
        return Distillation(model, DistillLossWeights(), self.vocabulary)

    def before_step(self, loss: Distillation, total_steps: int) -> Callable[[int, Callable[[int], list[Batch]]], None]:
        """What the loop calls before a step's batches run: asks the teacher about them."""
        schedule = Schedule(self.teacher, self.cfg.distill.teacher.steps_ahead, total_steps)
        return lambda step, batches_of: loss.expect(schedule.targets_for(step, batches_of))

    def sampler(
        self, sampler: Sampler, model: PeftModel, chat: ChatTemplate, accelerator: Accelerator, log: Log
    ) -> Sampler:
        """The run's documents, with answers of the model's own in a share of them (`distill.on_policy`)."""
        distill = self.cfg.distill
        if not distill.on_policy:
            return sampler
        log(
            f"the student itself writes the answers of {distill.on_policy:.0%} of the rows, up to "
            f"{distill.on_policy_tokens} tokens at temperature {distill.on_policy_temperature:g}; the teacher alone "
            "judges those"
        )
        write = partial(
            sample_answers,
            model,
            stop_ids=chat.stop_ids(),
            vocabulary=self.vocabulary,
            temperature=distill.on_policy_temperature,
        )
        return OnPolicySampler(
            sampler,
            write,
            distill.on_policy,
            distill.on_policy_tokens,
            self.cfg.data.max_length,
            self.cfg.train.seed,
            accelerator.process_index,
            accelerator.num_processes,
            gather_object,
        )

    def figures(
        self, model: PeftModel, data: LoadedData, part: slice, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """`eval/NAME/teacher_kl` in nats a target and `eval/NAME/teacher_agreement`, a share, of every evaluation set.

        part: of each set's documents, what this rank looks at.
        """
        figures: dict[str, float] = {}
        for source in data.eval:
            found = agreement(
                model,
                self.teacher,
                source.documents[part],
                self.vocabulary,
                limit_tokens=max(4096, self.cfg.data.max_length),
                sum_over_ranks=sum_over_ranks,
            )
            figures[f"eval/{source.name}/teacher_kl"] = found.kl
            figures[f"eval/{source.name}/teacher_agreement"] = found.top1
        return figures


def check_distillation(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, data: LoadedData, log: Log) -> int:
    """Ids that student and teacher share; 0 for a run that learns from rows alone. Nothing is loaded yet.

    Raises: ConfigError if the teacher means something else by a token that is in use, or has another width where that
    matters.
    """
    if not cfg.asks_teacher:
        return 0
    if cfg.distill.objective == "recover":
        log(_CANNOT_TEACH)
    check_width(cfg)
    # A stream's rows are not known yet, and the student may write any token.
    unknown = cfg.data.stream_rows or cfg.distill.on_policy
    used = np.arange(len(tokenizer)) if unknown else used_ids(data)
    return check_vocabulary(cfg, tokenizer, used)


def build_distillation(
    cfg: RunConfig,
    base: PreTrainedModel,
    chat: ChatTemplate,
    data: LoadedData,
    vocabulary: int,
    accelerator: Accelerator,
    log: Log,
) -> DistillationSetup | None:
    """The teacher of a run; None for a run that learns from rows alone. base: before an adapter is on it.

    What a server says is written to `distill.cache` first, and then trained from.
    """
    if not cfg.asks_teacher:
        return None
    sources = [*data.train, *data.eval]
    documents = Documents.join(source.documents for source in sources) if sources else ()
    # Ranks do not wait for hours: several of them need a folder that `finetune cache` has finished.
    if cfg.distill.teacher.placement == "server" and accelerator.num_processes == 1:
        write_cache(cfg, chat, vocabulary, documents, accelerator.device, log)
    return DistillationSetup(
        cfg, build_teacher(cfg, base, chat, vocabulary, documents, accelerator.device, log), vocabulary
    )


def mean_teacher_kl(figures: Mapping[str, float]) -> float | None:
    """KL(teacher || model) in nats a target, mean over the evaluation sets; None if it was not measured."""
    found = [value for name, value in figures.items() if name.endswith("/teacher_kl")]
    return sum(found) / len(found) if found else None


def teacher_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """How far the model was from its teacher and is now, a line for each evaluation set, as markdown."""
    found = [name for name in after if name.endswith("/teacher_kl") and name in before]
    lines = [
        "| held-out rows | nats from the teacher before | after | of that gone | same first choice before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name in found:
        kl, kl_after = before[name], after[name]
        top1, top1_after = (figures[name.replace("/teacher_kl", "/teacher_agreement")] for figures in (before, after))
        gone = f"{1 - kl_after / kl:.1%}" if kl > 0 else ""
        label = name.removeprefix("eval/").removesuffix("/teacher_kl")
        lines.append(f"| {label} | {kl:.5f} | {kl_after:.5f} | {gone} | {top1:.2%} | {top1_after:.2%} |")
    return "\n".join(lines) + "\n"
