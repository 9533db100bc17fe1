"""`finetune merge`: an adapter into its base's weights, with the distance from what was trained."""

from __future__ import annotations

import shlex

from finetune.system.arguments import Arguments
from finetune.system.errors import InputError

USAGE = """\
usage: finetune merge adapter=RUN_OR_ADAPTER out=DIR [key=value …]

Writes a complete model folder: the base's weights with the adapter's update in them, added in fp32 and rounded once.
A block of a matrix is in memory at a time, whatever the model's size. Then the trained model (4-bit base, adapter
beside it) and the merged one are compared on held-out rows. Interrupted, the same command goes on where it stopped.

Examples
  finetune merge adapter=outputs/quickstart out=merged
  finetune merge adapter=outputs/lora out=merged base=dequantized compare=true kl_check.max_kl=0.01
  finetune merge 'adapter=[runs/a, runs/b]' 'weights=[0.6, 0.4]' combination=ties density=0.3 out=both
"""


def merge_help() -> str:
    """The usage and every setting."""
    from finetune.config.command_options import MergeOptions
    from finetune.config.options import options_help

    return f"{USAGE}\n{options_help(MergeOptions)}"


def run_merge(arguments: Arguments) -> int:
    """`finetune merge`. Raises: InputError for what cannot be meant; what reading and writing raise."""
    from finetune.config.command_options import MergeOptions
    from finetune.config.options import read_options

    if arguments.config is not None:
        raise InputError("finetune merge takes no config; the adapter's run has its own: adapter=outputs/NAME out=DIR")
    options = read_options(MergeOptions, arguments.overrides, "finetune merge")

    from finetune.export.merge.merge import merge
    from finetune.system.console import log

    merge(options)
    print(options.out)
    log(f"next: finetune export model={shlex.quote(options.out)} format=gguf out=DIR, or serve it as it is")
    return 0
