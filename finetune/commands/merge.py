"""usage: finetune merge adapter=RUN_OR_ADAPTER out=DIR [key=value …]

Writes a complete model folder: the weights of the base plus the update of the adapter, added in fp32 and rounded once.
One block of a matrix is in memory at a time, for models of any size. Then the trained model (4-bit base with adapter)
and the merged model are compared on held-out rows. After an interruption, the same command continues.

Examples
  finetune merge adapter=outputs/quickstart out=merged
  finetune merge adapter=outputs/lora out=merged base=dequantized kl_check.max_kl=0.01
  finetune merge 'adapter=[runs/a, runs/b]' 'weights=[0.6, 0.4]' combination=ties density=0.3 out=both
"""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Merge, then print the folder and the next command."""
    from finetune.models.adapters.folder import find_adapter
    from finetune.system.atomic import refuse_existing
    from finetune.system.format import parse_size

    options = arguments.options
    # Before torch is imported, which takes ten times as long.
    parse_size("shard_size", options.shard_size)
    refuse_existing(Path(options.out).expanduser())
    for name in [options.adapter] if isinstance(options.adapter, str) else options.adapter:
        find_adapter(name, "adapter")

    from finetune.export.merge.merge import merge

    merge(options)
    print(options.out)
    model = f"model={shlex.quote(options.out)}"
    log(f"next: finetune export {model} format=gguf out=DIR, or finetune serve {model} quant.type=none")
    return 0


COMMAND = Command("merge", __doc__, run, options="MergeOptions")
