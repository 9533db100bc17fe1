"""usage: finetune sweep config=X.yaml key=value,value … [key=value …] [sweep.key=value …] [--dry-run]

Trains with every combination of the values, one process after another, and writes a table (best run first), a plot and
a page. The syntax is Hydra's: several values (lora.rank=8,16), range(1,5), choice(a,b), glob(*) for config groups; a
list in brackets is one value. With sweep.trials=N Optuna searches, and also draws from interval(0,0.1) and
tag(log,interval(1e-5,1e-3)).
With sweep.space=auto the search varies ranks, targets, bits, learning rate and packing length around the config, within
the planner's limits, for a low held-out loss and few stored bytes; it ends in best.yaml.
After Ctrl+C, SIGTERM or kill -9, the same command continues: it keeps finished runs, resumes the interrupted run from
its checkpoint, and tries failed runs again.
  --dry-run   check every combination, list the runs, and stop

Examples
  finetune sweep config=lora.yaml data.train=rows.jsonl train.learning_rate=1e-4,2e-4 lora.rank=8,16
  finetune sweep config=mine.yaml 'train.learning_rate=tag(log,interval(1e-5,1e-3))' lora.rank=8,16,32 sweep.trials=20
  finetune sweep config=mine.yaml 'lora.target_modules=[q_proj,v_proj],all-linear' sweep.metric=exact_match_after
  finetune sweep config=mine.yaml train.max_steps=400 sweep.space=auto sweep.budget=12 sweep.memory_gb=24
"""

from __future__ import annotations

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Check every combination, then run the sweep and print its table."""
    from finetune.report.compare import text_table
    from finetune.sweep import sweep
    from finetune.sweep.outcome import BEST, PAGE, table
    from finetune.sweep.plan import plan_sweep

    plan = plan_sweep(str(arguments.config), arguments.overrides, arguments.options.sweep, log)
    if "--dry-run" in arguments.flags:
        print("\n".join(plan.describe()))
        return 0

    from finetune.data.early_checks import check_inputs

    check_inputs(plan.first)
    log(f"sweep: {plan.size}, folder={plan.folder}")
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
    if plan.search is not None:
        log(f"{plan.headline(record)}\nnext: finetune train config={plan.folder / BEST}")
    log(f"page: {plan.folder / PAGE}")
    return 0


COMMAND = Command("sweep", __doc__, run, options="SweepOptions", flags=("--dry-run",), config="required")
