"""`finetune allocate`: which layer gets 4, 8 or 16 bits, within a budget of bytes."""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.system.arguments import Arguments
from finetune.system.errors import InputError

USAGE = """\
usage: finetune allocate config=X.yaml sensitivity=DIR budget_gb=N [out=FILE] [key=value …]

Chooses how each linear layer is stored, in 4, 8 or 16 bit, so that the base takes no more than so many GB and loses as
little as can be, by what finetune sensitivity measured. The choice is measured as a run computes, beside all layers
alike and the outer layers in more bits; the best of them is written. Training, planning, merging and export honor it.
Any key of a config can be given as well; it must be the config that sensitivity was measured with.

Examples
  finetune allocate config=quickstart.yaml sensitivity=sensitivity budget_gb=0.003
  finetune train config=quickstart.yaml quant=allocated
"""


def allocate_help() -> str:
    """The usage and every setting."""
    from finetune.config.command_options import AllocateOptions
    from finetune.config.options import options_help

    return f"{USAGE}\n{options_help(AllocateOptions)}"


def run_allocate(arguments: Arguments) -> int:
    """`finetune allocate`. Raises: InputError for what cannot be meant; what loading and measuring raise."""
    from finetune.config.command_options import AllocateOptions
    from finetune.config.compose import load_config
    from finetune.config.options import read_beside_config

    if arguments.config is None:
        raise InputError("finetune allocate needs config=X.yaml, the one that finetune sensitivity was given")
    options, overrides = read_beside_config(AllocateOptions, arguments, "finetune allocate")
    cfg = load_config(arguments.config, overrides)

    from finetune.mixed_precision.choose import check_place, choose, write_allocation
    from finetune.system.console import log

    file = Path(options.out).expanduser()
    check_place(file)
    allocation = choose(cfg, options, log)
    words = ["finetune", "allocate", f"config={arguments.config}", *arguments.overrides]
    write_allocation(allocation, file, shlex.join(words), cfg.model.name)
    counts = {
        kind: list(allocation.storage.values()).count(kind) for kind in dict.fromkeys(allocation.storage.values())
    }
    log(
        f"{allocation.choice}: {allocation.size_bytes / 1e9:.6g} GB of {options.budget_gb:.6g}; layers: "
        f"{', '.join(f'{count} in {kind}' for kind, count in counts.items())} (none is 16 bit); "
        f"KL by single layers {allocation.predicted:.2e} nats a target"
    )
    print(options.out)
    log(f"next: {shlex.join(['finetune', 'train', f'config={arguments.config}', *overrides, f'quant={file.stem}'])}")
    return 0
