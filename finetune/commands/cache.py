"""usage: finetune cache config=X.yaml distill.cache=DIR [key=value …]

Runs the teacher of a config on every row of data.train and data.eval and writes its outputs to DIR. Training with
distill.teacher.placement=cached then needs no teacher. After an interruption, the same command continues; with more
rows, it adds the missing ones. The folder serves any order, packing, batch size, number of processes and seed.
  distill.cache_kind=sampled      the 32 most probable tokens and 16 sampled others: 178 bytes per target
  distill.cache_kind=hidden       the final hidden states: every divergence, exact; 2 bytes x width per target
  distill.teacher.placement=…     resident, streamed or server; cached: resident if it fits, else streamed

Examples
  finetune cache config=distill.yaml distill.cache=teacher data.train=rows.jsonl
  finetune train config=distill.yaml distill.cache=teacher data.train=rows.jsonl \\
    distill.teacher.placement=cached
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log
from finetune.system.errors import ConfigError
from finetune.system.format import format_bytes

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig


def run(arguments: Arguments) -> int:
    """Write the cache, then print its size and the next command."""
    from finetune.config.compose import load_config

    cfg = load_config(str(arguments.config), arguments.overrides)
    if not cfg.has_teacher:
        raise ConfigError(
            f"distill.objective: is none in {arguments.config}, so there is no teacher\n"
            "help: set distill.objective=recover, or guard.max to a limit"
        )
    training = _training_overrides(cfg, arguments.overrides)
    load_config(str(arguments.config), training)  # Refuses what the cache cannot serve before the cache is written.

    from finetune.data.loader import check_inputs

    check_inputs(cfg)

    from finetune.data.documents import Documents
    from finetune.data.loader import load_all_rows, used_ids
    from finetune.distill.filling import size_of, write_cache
    from finetune.distill.teacher import cache_path, check_vocabulary
    from finetune.models.load import default_device
    from finetune.system.machine import use_all_cores

    tokenizer, chat, data = load_all_rows(cfg, log)
    vocabulary = check_vocabulary(cfg, tokenizer, used_ids(data))
    device = default_device()
    use_all_cores(device.type)
    documents = Documents.join(source.documents for source in (*data.train, *data.eval))
    written = write_cache(cfg, chat, vocabulary, documents, device=device, log=log)
    folder = cache_path(cfg)
    print(f"{folder}: {written:,} documents written now, {format_bytes(size_of(folder))} in all")
    print(f"next: {shlex.join(['finetune', 'train', f'config={arguments.config}', *training])}")
    return 0


def _training_overrides(cfg: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a run that trains from the cache."""
    if cfg.distill.teacher.placement == "server":
        return list(overrides)
    replaced = ("distill.teacher.placement", "distill.teacher.steps_ahead")
    kept = [word for word in overrides if word.lstrip("+").partition("=")[0] not in replaced]
    one_step = ["distill.teacher.steps_ahead=1"] if cfg.distill.teacher.steps_ahead != 1 else []
    return [*kept, "distill.teacher.placement=cached", *one_step]


COMMAND = Command("cache", __doc__, run, config="required")
