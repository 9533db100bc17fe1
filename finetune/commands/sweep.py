"""`finetune sweep`: one config with many settings, run by run, to a table with the best first."""

from __future__ import annotations

from finetune.system.arguments import Arguments
from finetune.system.errors import InputError

USAGE = """\
usage: finetune sweep config=X.yaml key=value,value … [key=value …] [sweep.key=value …] [--dry-run]

Trains with every combination of the values given, one run after another, each in a process of its own, and ends in a
table with the best run first, a plot and a page. Hydra's sweep syntax: a list of values (lora.rank=8,16), range(1,5),
choice(a,b), glob(*) for config groups; a list in brackets is one value. With sweep.trials=N Optuna searches instead,
and also draws from interval(0,0.1) and tag(log,interval(1e-5,1e-3)).
Interrupted by Ctrl+C, SIGTERM or kill -9, the same command goes on: finished runs are kept, the one that was going on
continues from its checkpoint, failed ones are tried again.
  --dry-run   check every combination, list the runs, and stop

Examples
  finetune sweep config=lora.yaml train.learning_rate=1e-4,2e-4 lora.rank=8,16
  finetune sweep config=lora.yaml 'train.learning_rate=tag(log,interval(1e-5,1e-3))' lora.rank=8,16,32 sweep.trials=20
  finetune sweep config=lora.yaml 'lora.target_modules=[q_proj,v_proj],all-linear' sweep.metric=exact_match_after
"""


def sweep_help() -> str:
    """The usage and every setting of the sweep itself."""
    from finetune.config.command_options import SweepOptions
    from finetune.config.options import options_help

    return f"{USAGE}\n{options_help(SweepOptions)}\n\nEvery other key is a run's: finetune train --help lists them."


def run_sweep(arguments: Arguments) -> int:
    """`finetune sweep`. Raises: InputError for what cannot be meant, before anything runs; see sweeping.sweep."""
    from finetune.config.command_options import SweepOptions
    from finetune.config.options import read_options
    from finetune.report.compare import text_table
    from finetune.sweep import sweep
    from finetune.sweep.outcome import PAGE, table
    from finetune.system.console import log

    if arguments.config is None:
        raise InputError("finetune sweep needs config=X.yaml, as finetune train does")
    own = [word for word in arguments.overrides if word.startswith("sweep.")]
    words = [word for word in arguments.overrides if not word.startswith("sweep.")]
    settings = read_options(SweepOptions, own, "finetune sweep").sweep
    plan = sweep.plan_sweep(arguments.config, words, settings)
    if "--dry-run" in arguments.flags:
        for values in plan.space.grid() if settings.trials is None else []:
            print(" ".join(f"{key}={value}" for key, value in values.items()))
        if settings.trials is not None:
            print(f"{settings.trials} runs, drawn from {' '.join(p.word for p in plan.space.parameters)}")
        return 0
    log(f"{plan.runs} runs into {plan.folder}")
    record = sweep.run_sweep(plan, log)
    print(text_table(table(plan.folder, record)))
    failed = [trial for trial in record.trials if trial.status == "failed"]
    for error in dict.fromkeys(trial.error for trial in failed):
        names = [trial.folder_name for trial in failed if trial.error == error]
        log(f"{', '.join(dict.fromkeys(names))} failed: {error}")
    if failed:
        log(f"{len(failed)} of {len(record.trials)} runs failed; the same command tries them again")
    best = record.ranked()[0]
    if best.metric is not None:
        log(f"best: {best.described}; its adapter is in {plan.folder / best.folder_name}")
    log(f"page: {plan.folder / PAGE}")
    return 0
