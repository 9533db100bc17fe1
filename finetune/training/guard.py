"""A limit to how far a run may take the model from its teacher, looked at whenever held-out rows are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from finetune.config.schema import GuardConfig
from finetune.system.console import Log
from finetune.training.checkpoint import TrainState
from finetune.training.distillation import DistillationSetup, mean_teacher_kl
from finetune.training.loop import Job, train_step
from finetune.training.optim import build_optimizer
from finetune.training.run_context import Parts

Figures = dict[str, float]


class Guard:
    """What happens beyond the limit: a warning, a recovery, or the end of the run.

    measure: the evaluations' figures as they are now. recover: learns from the teacher alone; told the step after which
    it happens.
    """

    def __init__(
        self,
        cfg: GuardConfig,
        measure: Callable[[], Figures],
        recover: Callable[[int], None],
        log: Log,
    ):
        self._cfg, self._measure, self._recover, self._say = cfg, measure, recover, log

    def __call__(self, state: TrainState, figures: Figures) -> tuple[Figures, bool]:
        """The figures of an evaluation, measured again after a recovery; and whether the run ends here.

        A breach is noted in `state.breaches`: step, teacher_kl in nats a target, action, and what was measured `after`.
        """
        found, limit = mean_teacher_kl(figures), self._cfg.max
        if found is None or limit is None or found <= limit:
            return figures, False
        where = f"step {state.step}: {found:.5f} nats a target from the teacher, above guard.max={limit:g}"
        breach: dict[str, Any] = {"step": state.step, "teacher_kl": found, "action": self._cfg.action}
        state.breaches.append(breach)
        if self._cfg.action == "recover":
            self._say(f"{where}; learning from the teacher alone for {self._cfg.steps} steps")
            self._recover(state.step)
            figures = {**self._measure(), "guard/teacher_kl_before": found}
            after = mean_teacher_kl(figures)
            assert after is not None, "what was measured before is measured again"
            breach["after"] = after
            again = f"step {state.step}: {after:.5f} nats a target from the teacher"
            self._say(again if after <= limit else f"WARNING: {again}, still above the limit")
        elif self._cfg.action == "stop":
            self._say(f"{where}; the run ends here (guard.action=stop)")
            return figures, True
        else:
            self._say(f"WARNING: {where}")
        return figures, False


def build_guard(job: Job, parts: Parts, lesson: DistillationSetup, measure: Callable[[], Figures]) -> Job:
    """The job, watched as `guard` says.

    A recovery takes the run's latest `guard.steps` steps again, with forward KL from the teacher in place of the run's
    loss, and with moments of its own: the run's point to where the model drifted. So it is a function of the run's
    state: continued after a kill, a run recovers to the same bits.
    """
    loss = lesson.recovery_loss(parts.model)
    wrapped = parts.accelerator.prepare_model(loss, device_placement=False)

    def recover(step: int) -> None:
        recovering = replace(
            job,
            sampler=parts.sampler,
            loss=wrapped,
            before_step=lesson.before_step(loss, step),
            optimizer=build_optimizer(job.cfg, parts.model.named_parameters()),
        )
        for earlier in range(max(1, step - parts.cfg.guard.steps + 1), step + 1):
            train_step(recovering, earlier)

    return replace(job, guard=Guard(parts.cfg.guard, measure, recover, job.tracker.message))
