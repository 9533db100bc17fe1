"""usage: finetune clip adapter=RUN_OR_ADAPTER out=DIR [start=ADAPTER] [key=value …]

Writes the adapter that a party of federated learning sends: the start of the round plus its update, scaled down to
max_norm, and with noise if noise= is given. The folder holds no rows or figures of the party's run.
With noise and delta=, prints epsilon of the rounds= updates that the party sends: client-level differential privacy.

Examples
  finetune clip adapter=outputs/party out=sent
  finetune clip adapter=outputs/party start=round-1 out=sent max_norm=0.5
  finetune clip adapter=outputs/party start=round-1 out=sent max_norm=0.5 noise=5 rounds=10 delta=1e-5
"""

from __future__ import annotations

from pathlib import Path

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Clip, then print the folder."""
    from finetune.models.adapters.folder import find_adapter
    from finetune.system.atomic import refuse_existing

    options = arguments.options
    # Before torch is imported, which takes ten times as long.
    refuse_existing(Path(options.out).expanduser())
    for key in ("adapter", "start"):
        if (name := getattr(options, key)) is not None:
            find_adapter(name, key)

    from finetune.federation.clip import clip

    clip(options, log)
    print(options.out)
    return 0


COMMAND = Command("clip", __doc__, run, options="ClipOptions")
