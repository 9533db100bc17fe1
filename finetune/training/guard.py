"""Limit how far a run takes the model from its teacher, measured at each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from finetune.config.schema import GuardConfig
from finetune.system.console import Log
from finetune.training.checkpoint import TrainState
from finetune.training.distillation import mean_teacher_kl
from finetune.training.loop import Figures, StepInputs, train_step
from finetune.training.optim import build_optimizer
from finetune.training.run_context import RunContext


class Guard:
    """A hook of the loop: warn, recover or end the run when the KL from the teacher exceeds `guard.max`."""

    def __init__(self, cfg: GuardConfig, measure: Callable[[], Figures], recover: Callable[[int], None], log: Log):
        """Build a guard.

        Args:
            measure: evaluates the model as it is now.
            recover: trains from the teacher alone, after the step given.
        """
        self._cfg, self._measure, self._recover, self._log = cfg, measure, recover, log

    def __call__(self, state: TrainState, figures: Figures) -> tuple[Figures, bool]:
        """Return the figures, measured again after a recovery, and whether the run ends.

        A breach is added to `state.breaches`: step, teacher_kl (nats per target), action, and teacher_kl `after` it.
        """
        found, limit, action = mean_teacher_kl(figures), self._cfg.max, self._cfg.action
        if found is None or limit is None or found <= limit:
            return figures, False
        breach: dict[str, Any] = {"step": state.step, "teacher_kl": found, "action": action}
        state.breaches.append(breach)
        where = f"guard: step={state.step}, teacher_kl={found:.5f}, max={limit:g}"
        if action == "stop":
            self._log(f"{where}; the run ends here (guard.action=stop)")
        elif action == "recover":
            self._log(f"{where}; training from the teacher alone for {self._cfg.steps} steps")
            self._recover(state.step)
            figures = {**self._measure(), "guard/teacher_kl_before": found}
            breach["after"] = after = mean_teacher_kl(figures)
            assert after is not None, "the same sets are measured again"
            again = f"guard: step={state.step}, teacher_kl={after:.5f} after recovery"
            self._log(again if after <= limit else f"WARNING: {again}, still above guard.max")
        else:
            self._log(f"WARNING: {where}")
        return figures, action == "stop"


def build_guard(context: RunContext, inputs: StepInputs, measure: Callable[[], Figures], log: Log) -> Guard:
    """Build the guard of a run.

    A recovery repeats the latest `guard.steps` steps with forward KL from the teacher as the loss, and with a new
    optimizer: the run's moments point to where the model drifted. So it depends on the run's state alone, and a
    continued run recovers to the same bits.
    """
    distillation = context.distillation
    assert distillation is not None, "guard.max needs a teacher"
    loss = distillation.build_recovery_loss(context.model)
    wrapped = context.accelerator.prepare_model(loss, device_placement=False)

    def recover(step: int) -> None:
        recovery = replace(
            inputs,
            sampler=context.sampler,
            loss=wrapped,
            before_step=distillation.before_step(loss, step),
            optimizer=build_optimizer(inputs.cfg, context.model.named_parameters()),
        )
        for earlier in range(max(1, step - context.cfg.guard.steps + 1), step + 1):
            train_step(recovery, earlier)

    return Guard(context.cfg.guard, measure, recover, log)
