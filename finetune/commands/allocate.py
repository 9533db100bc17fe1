"""usage: finetune allocate config=X.yaml sensitivity=DIR budget_gb=N [out=FILE] [key=value …]

Chooses 4, 8 or 16 bits for each linear layer: the smallest error by the measurements of finetune sensitivity, within
the budget. Measures the choice on held-out rows beside simple choices of the same size, and writes the best of them.
Training, planning, merging and export use the file. The config must be the config of finetune sensitivity.

Examples
  finetune allocate config=quickstart.yaml sensitivity=sensitivity budget_gb=0.003
  finetune train config=quickstart.yaml quant=allocated
"""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Choose, write the file, then print its name and the next command."""
    from finetune.config.compose import load_config

    options = arguments.options
    cfg = load_config(str(arguments.config), arguments.overrides)

    from finetune.mixed_precision.journal import Sensitivities
    from finetune.models.hub import check_model

    # Before torch is imported, which takes ten times as long.
    check_model(cfg.model)
    Sensitivities.read(Path(options.sensitivity).expanduser())

    from finetune.mixed_precision.choose import check_place, choose, write_allocation

    file = Path(options.out).expanduser()
    check_place(file)
    allocation = choose(cfg, options, log)
    write_allocation(allocation, file, shlex.join(["finetune", "allocate", *arguments.words]), cfg.model.name)
    counts = ", ".join(f"{kind}={count}" for kind, count in Counter(allocation.storage.values()).items())
    log(
        f"allocation: storage={allocation.choice}, size={allocation.size_bytes / 1e9:.6g} GB of {options.budget_gb:.6g}"
        f", layers: {counts} (none is 16 bit), sum of single kl={allocation.predicted:.2e} nats per target"
    )
    print(options.out)
    words = ["finetune", "train", f"config={arguments.config}", *arguments.overrides, f"quant={file.stem}"]
    log(f"next: {shlex.join(words)}")
    return 0


COMMAND = Command("allocate", __doc__, run, options="AllocateOptions", config="required")
