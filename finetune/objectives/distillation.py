"""Set up distillation for a run: the teacher, the loss, on-policy answers, and the distance from the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import RunConfig
from finetune.data.batch import Batch
from finetune.data.documents import Documents
from finetune.data.encoded import Prompt
from finetune.data.loader import LoadedData, used_ids
from finetune.data.packing import Sampler
from finetune.data.template.chat import ChatTemplate
from finetune.distill.filling import write_cache
from finetune.distill.on_policy import OnPolicySampler
from finetune.distill.resident import Share
from finetune.distill.teacher import build_teacher, check_media, check_vocabulary, check_width
from finetune.evaluation.generation import sample_answers
from finetune.losses.distillation import Distillation, Teacher, TeacherTargets
from finetune.system.console import Log


class Schedule:
    """Request a teacher's targets for `steps_ahead` steps at a time, up to `total_steps`.

    A resident teacher still computes batch by batch, because it returns an iterator.
    """

    def __init__(self, teacher: Teacher, steps_ahead: int, total_steps: int):
        self.teacher, self.steps_ahead, self.total_steps = teacher, steps_ahead, total_steps
        self._counts: dict[int, int] = {}  # batches of each requested step that is still to come
        self._targets: Iterator[TeacherTargets] = iter(())

    def targets_for(self, step: int, batches_of: Callable[[int], list[Batch]]) -> Iterable[TeacherTargets]:
        """Return the targets of a step's batches, in order. Callers take all targets of each step, step by step.

        A step whose number of batches changed was split anew: its targets, and those of the steps after it, are
        requested again.
        """
        if self._counts.get(step) != len(batches_of(step)):
            self._targets = iter(())
            steps = range(step, min(step + self.steps_ahead, self.total_steps + 1))
            batches = {later: batches_of(later) for later in steps}
            self._counts = {later: len(some) for later, some in batches.items()}
            self._targets = iter(self.teacher.targets_for([batch for some in batches.values() for batch in some]))
        return islice(self._targets, self._counts.pop(step))


@dataclass(frozen=True)
class DistillationSetup:
    """The teacher of a run. vocabulary: ids below it take part in the divergence."""

    cfg: RunConfig
    teacher: Teacher
    vocabulary: int

    def before_step(self, loss: Distillation, total_steps: int) -> Callable[[int, Callable[[int], list[Batch]]], None]:
        """Build the hook that gives `loss` the teacher's targets for the batches of a step."""
        schedule = Schedule(self.teacher, self.cfg.distill.teacher.steps_ahead, total_steps)

        def before_step(step: int, batches_of: Callable[[int], list[Batch]]) -> None:
            loss.expect(())  # frees what is left of targets that a repeated step requests again
            loss.expect(schedule.targets_for(step, batches_of))

        return before_step

    def build_sampler(
        self, sampler: Sampler, model: PeftModel, chat: ChatTemplate, accelerator: Accelerator, log: Log
    ) -> Sampler:
        """Let the student write the answers of a share of the documents (`distill.on_policy`)."""
        distill = self.cfg.distill

        def write(prompts: Sequence[Prompt], draws: Sequence[np.ndarray]) -> list[np.ndarray]:
            answers = sample_answers(
                model,
                prompts,
                [each[None] for each in draws],
                stop_ids=chat.stop_ids(),
                vocabulary=self.vocabulary,
                temperature=distill.on_policy_temperature,
            )
            return [answer.ids for [answer] in answers]

        log(
            f"distill: on_policy={distill.on_policy:.0%} of the rows, max_tokens={distill.on_policy_tokens}, "
            f"temperature={distill.on_policy_temperature:g}; only the teacher scores these answers"
        )
        return OnPolicySampler(
            sampler,
            write=write,
            share=distill.on_policy,
            tokens=distill.on_policy_tokens,
            max_length=self.cfg.data.max_length,
            seed=self.cfg.train.seed,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            gather=gather_object,
        )


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
        log(
            "distill: objective=recover restores what quantization changed in this base; it cannot teach a new task\n"
            "help: for a new task, set distill.objective=distill with a larger or tuned teacher, or sft+anchor"
        )
    check_width(cfg)
    if any(store.has_media.any() for store in data.stores):
        check_media(cfg)
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
    share: Share | None,
    log: Log,
) -> DistillationSetup | None:
    """Build the teacher of a run; None without one. A server's answers are cached in `distill.cache` first.

    Args:
        base: the student, before an adapter is attached.
        share: as for `build_teacher`.
    """
    if not cfg.has_teacher:
        return None
    sources = [*data.train, *data.eval]
    documents = Documents.join(source.documents for source in sources) if sources else ()
    # Several ranks would time out while one of them queries the server: they need a finished cache.
    if cfg.distill.teacher.placement == "server" and accelerator.num_processes == 1:
        write_cache(cfg, chat, vocabulary, documents, device=accelerator.device, log=log)
    teacher = build_teacher(
        cfg,
        base=base,
        chat=chat,
        vocabulary=vocabulary,
        documents=documents,
        device=accelerator.device,
        share=share,
        log=log,
    )
    return DistillationSetup(cfg, teacher, vocabulary)


def mean_teacher_kl(figures: Mapping[str, float]) -> float | None:
    """Return KL(teacher || model) in nats per target, averaged over the held-out sets; None if not measured."""
    found = [value for name, value in figures.items() if name.endswith("/teacher_kl")]
    return sum(found) / len(found) if found else None


def teacher_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Build a Markdown table of the distance from the teacher before and after training, one line per held-out set."""
    lines = [
        "| held-out set | KL from the teacher before (nats/target) | after | recovered | agreement before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name in after:
        if not name.endswith("/teacher_kl") or name not in before:
            continue
        kl, kl_after = before[name], after[name]
        top1, top1_after = (figures[name.replace("/teacher_kl", "/teacher_agreement")] for figures in (before, after))
        recovered = f"{1 - kl_after / kl:.1%}" if kl > 0 else ""
        label = name.removeprefix("eval/").removesuffix("/teacher_kl")
        lines.append(f"| {label} | {kl:.5f} | {kl_after:.5f} | {recovered} | {top1:.2%} | {top1_after:.2%} |")
    return "\n".join(lines) + "\n"
