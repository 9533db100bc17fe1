"""usage: finetune aggregate adapters=[A,B,…] out=DIR [key=value …]

Averages the adapters that several parties trained from one start, without their rows, and writes an adapter that
lora.init_adapter= of the next round takes. The result has the same bits in whatever order the parties are named.

Examples
  finetune aggregate 'adapters=[a/sent, b/sent, c/sent]' out=round-1
  finetune aggregate 'adapters=[a/sent, b/sent]' 'weights=[1200, 300]' start=round-1 max_norm=0.5 out=round-2
  finetune aggregate 'adapters=[a/sent, b/sent, c/sent]' on_bad_party=leave_out out=round-1
"""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Average, then print the folder and the next command."""
    from finetune.system.atomic import refuse_existing

    options = arguments.options
    refuse_existing(Path(options.out).expanduser())  # before torch is imported, which takes ten times as long

    from finetune.federation.aggregate import aggregate

    aggregate(options, log)
    print(options.out)
    log(f"next: finetune train config=X.yaml lora.init_adapter={shlex.quote(options.out)}, or finetune merge")
    return 0


COMMAND = Command("aggregate", __doc__, run, options="AggregateOptions")
