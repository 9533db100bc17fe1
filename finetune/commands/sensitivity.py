"""`finetune sensitivity`: what each layer of a model loses when it is stored in 4 or 8 bit."""

from __future__ import annotations

import shlex

from finetune.system.arguments import Arguments
from finetune.system.errors import InputError

USAGE = """\
usage: finetune sensitivity config=X.yaml [out=DIR] [rows=N] [key=value …]

Measures, for every linear layer, how far the model's probabilities move from the 16-bit model's when that layer alone
is stored in 4 or 8 bit: KL in nats a target token, on rows of the config's data. finetune allocate makes a choice for
each layer from it. One copy of the weights is in memory, and one layer of it in fp32. Killed, it goes on where it
stopped. DIR gets sensitivity.json, sensitivity.md and sensitivity.png. Any key of a config can be given as well.

Examples
  finetune sensitivity config=quickstart.yaml
  finetune sensitivity config=lora.yaml model=qwen2.5-0.5b-instruct 'data.train=[{path: rows.jsonl}]' rows=64
"""


def sensitivity_help() -> str:
    """The usage and every setting."""
    from finetune.config.command_options import SensitivityOptions
    from finetune.config.options import options_help

    return f"{USAGE}\n{options_help(SensitivityOptions)}"


def run_sensitivity(arguments: Arguments) -> int:
    """`finetune sensitivity`. Raises: InputError for what cannot be meant; what loading and measuring raise."""
    from finetune.config.command_options import SensitivityOptions
    from finetune.config.compose import load_config
    from finetune.config.options import read_beside_config

    if arguments.config is None:
        raise InputError("finetune sensitivity needs config=X.yaml, as in: finetune sensitivity config=quickstart.yaml")
    options, overrides = read_beside_config(SensitivityOptions, arguments, "finetune sensitivity")
    cfg = load_config(arguments.config, overrides)

    from finetune.mixed_precision.measure import measure_sensitivity
    from finetune.mixed_precision.sensitivity import ALL
    from finetune.system.console import log

    found = measure_sensitivity(cfg, options, log)
    for kind in found.kinds:
        log(f"all layers in {kind}: KL {found.measured[ALL, kind].kl:.2e} nats a target")
    print(options.out)
    words = ["finetune", "allocate", f"config={arguments.config}", f"sensitivity={options.out}", *overrides]
    log(f"next: {shlex.join(words)} budget_gb=…")
    return 0
