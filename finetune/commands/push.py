"""usage: finetune push adapter=RUN|model=FOLDER repo=USER/NAME [private=false]

Uploads an adapter with its model card, or a merged or exported model, to the model hub in one commit. Checkpoints,
metrics and the training data stay here. The repository is made if it does not exist, and is private unless you say so.
The token is that of `hf auth login`, or HF_TOKEN.

Examples
  finetune push adapter=outputs/mine repo=USER/NAME
  finetune push model=merged repo=USER/NAME private=false
"""

from __future__ import annotations

from finetune.commands.base import Command
from finetune.system.arguments import Arguments


def run(arguments: Arguments) -> int:
    """Upload, and print the address of the repository."""
    from finetune.export.push import push

    print(push(arguments.options))
    return 0


COMMAND = Command("push", __doc__, run, options="PushOptions")
