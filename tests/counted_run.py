"""Train as `finetune/train.py` does, and write what this rank's collectives carried: a process that torchrun starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from finetune import load_config, train

# What FSDP2 calls: torch renamed it in 2.13.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
# Smaller ones carry counts, not weights or gradients.
_LEAST_BYTES = 256


def main(config: str, counts: str, *overrides: str) -> None:
    """Train `config`, and write `counts`-RANK.json: the result bytes of gathers and of sums."""
    carried = {"gathered": 0, "summed": 0}

    def counting(collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(result: Tensor, *arguments: Any, **options: Any) -> Any:
            carried[name] += result.nbytes if result.nbytes >= _LEAST_BYTES else 0
            return collective(result, *arguments, **options)

        return run

    with (
        mock.patch.object(dist, _GATHER, counting(getattr(dist, _GATHER), "gathered")),
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, "summed")),
    ):
        train(load_config(config, overrides))
    Path(f"{counts}-{os.environ['RANK']}.json").write_text(json.dumps(carried))


if __name__ == "__main__":
    main(*sys.argv[1:])
