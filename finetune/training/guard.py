"""Limit how far a run takes the model from its teacher, measured at each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from finetune.losses.distillation import Distillation, DistillLossWeights
from finetune.objectives.distillation import mean_teacher_kl
from finetune.system.console import Log
from finetune.training.checkpoint import TrainState
from finetune.training.loop import Figures, StepInputs, train_step
from finetune.training.optimizer import build_optimizer
from finetune.training.run_context import RunContext, evaluate_run


def build_guard(context: RunContext, inputs: StepInputs, log: Log) -> Callable[[TrainState], tuple[Figures, bool]]:
    """Build the evaluation of a run that warns, recovers or ends when the KL from the teacher exceeds `guard.max`.

    A recovery repeats the latest `guard.steps` steps with forward KL from the teacher as the loss, and with a new
    optimizer: the run's moments point to where the model drifted. So it depends on the run's state alone, and a
    continued run recovers to the same bits.

    Returns:
        A function of the run's state that returns the figures, measured again after a recovery, and whether the run
        ends. It adds each breach to `state.breaches`: step, teacher_kl (nats per target), action, and teacher_kl
        `after` it.
    """
    cfg, distillation = context.cfg.guard, context.distillation
    assert distillation is not None and cfg.max is not None, "guard.max needs a teacher"
    limit = cfg.max
    loss = Distillation(context.model, DistillLossWeights(), distillation.vocabulary)

    def recover(step: int) -> None:
        recovery = replace(
            inputs,
            sampler=context.sampler,
            loss=loss,
            before_step=distillation.before_step(loss, step),
            optimizer=build_optimizer(inputs.cfg, context.model.named_parameters()),
        )
        for earlier in range(max(1, step - cfg.steps + 1), step + 1):
            train_step(recovery, earlier)

    def evaluate(state: TrainState) -> tuple[Figures, bool]:
        figures = evaluate_run(context)
        found = mean_teacher_kl(figures)
        if found is None or found <= limit:
            return figures, False
        breach: dict[str, Any] = {"step": state.step, "teacher_kl": found, "action": cfg.action}
        state.breaches.append(breach)
        where = f"guard: step={state.step}, teacher_kl={found:.5f}, max={limit:g}"
        if cfg.action == "stop":
            log(f"{where}; the run ends here (guard.action=stop)")
        elif cfg.action == "recover":
            log(f"{where}; training from the teacher alone for {cfg.steps} steps")
            recover(state.step)
            figures = {**evaluate_run(context), "guard/teacher_kl_before": found}
            breach["after"] = after = mean_teacher_kl(figures)
            assert after is not None, "the same sets are measured again"
            again = f"guard: step={state.step}, teacher_kl={after:.5f} after recovery"
            log(again if after <= limit else f"WARNING: {again}, still above guard.max")
        else:
            log(f"WARNING: {where}")
        return figures, cfg.action == "stop"

    return evaluate
