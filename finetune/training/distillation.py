"""Set up distillation for a run: the teacher, the loss, on-policy answers, and the distance from the teacher."""

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
from finetune.evaluation.sampling import sample_answers
from finetune.evaluation.scoring import agreement
from finetune.losses.distillation import Distillation, DistillLossWeights, Teacher
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.system.console import Log

_RECOVER_LIMITS = (
    "distill: objective=recover restores what quantization changed in this base; it cannot teach a new task\n"
    "help: for a new task, set distill.objective=distill with a larger or tuned teacher, or sft+anchor"
)


@dataclass(frozen=True)
class DistillationSetup:
    """The teacher of a run. vocabulary: ids below it take part in the divergence."""

    cfg: RunConfig
    teacher: Teacher
    vocabulary: int

    @property
    def trains_from_teacher(self) -> bool:
        """Return whether the teacher gives the loss; if not, it is only measured against."""
        return self.cfg.distill.objective != "none"

    def build_loss(self, model: PeftModel) -> Distillation:
        """Build the training loss."""
        return Distillation(
            model, DistillLossWeights.of(self.cfg.distill), self.vocabulary, self.cfg.train.neftune_alpha
        )

    def build_recovery_loss(self, model: PeftModel) -> Distillation:
        """Build the loss of a guard's recovery: forward KL from the teacher alone."""
        return Distillation(model, DistillLossWeights(), self.vocabulary)

    def before_step(self, loss: Distillation, total_steps: int) -> Callable[[int, Callable[[int], list[Batch]]], None]:
        """Build the hook that gives `loss` the teacher's targets for the batches of a step."""
        schedule = Schedule(self.teacher, self.cfg.distill.teacher.steps_ahead, total_steps)
        return lambda step, batches_of: loss.expect(schedule.targets_for(step, batches_of))

    def build_sampler(
        self, sampler: Sampler, model: PeftModel, chat: ChatTemplate, *, accelerator: Accelerator, log: Log
    ) -> Sampler:
        """Let the student write the answers of a share of the documents (`distill.on_policy`)."""
        distill = self.cfg.distill
        if not distill.on_policy:
            return sampler
        log(
            f"distill: on_policy={distill.on_policy:.0%} of the rows, max_tokens={distill.on_policy_tokens}, "
            f"temperature={distill.on_policy_temperature:g}; only the teacher scores these answers"
        )
        return OnPolicySampler(
            sampler,
            write=partial(
                sample_answers,
                model,
                stop_ids=chat.stop_ids(),
                vocabulary=self.vocabulary,
                temperature=distill.on_policy_temperature,
            ),
            share=distill.on_policy,
            tokens=distill.on_policy_tokens,
            max_length=self.cfg.data.max_length,
            seed=self.cfg.train.seed,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            gather=gather_object,
        )

    def figures(
        self, model: PeftModel, data: LoadedData, part: slice, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Measure the distance from the teacher on every held-out set.

        Args:
            part: documents of each set that this rank scores.

        Returns:
            `eval/NAME/teacher_kl` in nats per target, and `eval/NAME/teacher_agreement` in [0, 1].
        """
        figures: dict[str, float] = {}
        for source in data.eval:
            found = agreement(
                model,
                self.teacher,
                source.documents[part],
                self.vocabulary,
                limit_tokens=max(EVALUATION_TOKENS, self.cfg.data.max_length),
                sum_over_ranks=sum_over_ranks,
            )
            figures[f"eval/{source.name}/teacher_kl"] = found.kl
            figures[f"eval/{source.name}/teacher_agreement"] = found.top1
        return figures


def check_distillation(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, data: LoadedData, log: Log) -> int:
    """Compare student and teacher before any weight is loaded.

    Returns:
        The number of ids, from 0 on, that both share; 0 for a run without a teacher.

    Raises:
        ConfigError: a token in use means something else to the teacher, or the widths of the hidden states differ.
    """
    if not cfg.has_teacher:
        return 0
    if cfg.distill.objective == "recover":
        log(_RECOVER_LIMITS)
    check_width(cfg)
    # The rows of a stream are not known yet, and the student may write any token.
    any_id = cfg.data.stream_rows or cfg.distill.on_policy
    used = np.arange(len(tokenizer)) if any_id else used_ids(data)
    return check_vocabulary(cfg, tokenizer, used)


def build_distillation(
    cfg: RunConfig,
    *,
    base: PreTrainedModel,
    chat: ChatTemplate,
    data: LoadedData,
    vocabulary: int,
    accelerator: Accelerator,
    log: Log,
) -> DistillationSetup | None:
    """Build the teacher of a run; None without one. A server's answers are cached in `distill.cache` first.

    Args:
        base: the student, before an adapter is attached.
    """
    if not cfg.has_teacher:
        return None
    sources = [*data.train, *data.eval]
    documents = Documents.join(source.documents for source in sources) if sources else ()
    # Several ranks would time out while one of them queries the server: they need a finished cache.
    if cfg.distill.teacher.placement == "server" and accelerator.num_processes == 1:
        write_cache(cfg, chat, vocabulary, documents, device=accelerator.device, log=log)
    teacher = build_teacher(
        cfg, base=base, chat=chat, vocabulary=vocabulary, documents=documents, device=accelerator.device, log=log
    )
    return DistillationSetup(cfg, teacher, vocabulary)


def mean_teacher_kl(figures: Mapping[str, float]) -> float | None:
    """Return KL(teacher || model) in nats per target, averaged over the held-out sets; None if not measured."""
    found = [value for name, value in figures.items() if name.endswith("/teacher_kl")]
    return sum(found) / len(found) if found else None


def teacher_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Build a Markdown table of the distance from the teacher before and after training, one line per held-out set."""
    found = [name for name in after if name.endswith("/teacher_kl") and name in before]
    lines = [
        "| held-out set | KL from the teacher before (nats/target) | after | recovered | agreement before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name in found:
        kl, kl_after = before[name], after[name]
        top1, top1_after = (figures[name.replace("/teacher_kl", "/teacher_agreement")] for figures in (before, after))
        recovered = f"{1 - kl_after / kl:.1%}" if kl > 0 else ""
        label = name.removeprefix("eval/").removesuffix("/teacher_kl")
        lines.append(f"| {label} | {kl:.5f} | {kl_after:.5f} | {recovered} | {top1:.2%} | {top1_after:.2%} |")
    return "\n".join(lines) + "\n"
