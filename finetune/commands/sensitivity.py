"""usage: finetune sensitivity config=X.yaml [out=DIR] [rows=N] [key=value …]

Measures, for every linear layer, KL(16-bit model || model with that layer alone in 4 or 8 bit), in nats per target
token, on rows of the config's data. finetune allocate chooses the bits of each layer from it. Memory holds one copy of
the weights and one layer in fp32. After an interruption, the same command continues.
DIR gets sensitivity.json, sensitivity.md and sensitivity.png.

Examples
  finetune sensitivity config=quickstart.yaml
  finetune sensitivity config=lora.yaml model=qwen2.5-0.5b-instruct data.train=rows.jsonl rows=64
"""

from __future__ import annotations

import shlex

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Measure, then print the folder and the next command."""
    from finetune.config.compose import load_config

    options = arguments.options
    cfg = load_config(str(arguments.config), arguments.overrides)

    from finetune.data.early_checks import check_inputs

    check_inputs(cfg)

    from finetune.mixed_precision.journal import ALL
    from finetune.mixed_precision.measure import measure_sensitivity

    found = measure_sensitivity(cfg, options, log)
    for kind in found.kinds:
        log(f"sensitivity: layers=all, storage={kind}, kl={found.measured[ALL, kind]} nats per target")
    print(options.out)
    words = [f"config={arguments.config}", f"sensitivity={options.out}", *arguments.overrides]
    log(f"next: {shlex.join(['finetune', 'allocate', *words])} budget_gb=…")
    return 0


COMMAND = Command("sensitivity", __doc__, run, options="SensitivityOptions", config="required")
