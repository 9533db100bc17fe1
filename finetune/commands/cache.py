"""usage: finetune cache config=X.yaml distill.cache=DIR [key=value …]

Runs the teacher of a config on every row of data.train and data.eval and writes its outputs to DIR. Training with
distill.teacher.placement=cached then needs no teacher. After an interruption, the same command continues; with more
rows, it adds the missing ones. The folder serves any order, packing, batch size, number of processes and seed.
With preference.cache=DIR it writes what the reference of a preference says of every answer, for
preference.reference=cached: 24 bytes per answer, and the reference is not computed while training.
  distill.cache_kind=sampled      the 32 most probable tokens and 16 sampled others: 178 bytes per target
  distill.cache_kind=hidden       the final hidden states: every divergence, exact; 2 bytes x width per target
  distill.teacher.placement=…     resident, streamed or server; cached: resident if it fits, else streamed

Examples
  finetune cache config=distill.yaml distill.cache=teacher data.train=rows.jsonl
  finetune train config=distill.yaml distill.cache=teacher data.train=rows.jsonl \\
    distill.teacher.placement=cached
  finetune cache config=dpo.yaml preference.cache=reference
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
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
    from finetune.config.preference_rules import NEEDS_REFERENCE

    cfg = load_config(str(arguments.config), arguments.overrides)
    learns_preferences = cfg.preference.objective in NEEDS_REFERENCE
    if not cfg.has_teacher and not learns_preferences:
        raise ConfigError(
            f"distill.objective: is none in {arguments.config}, so there is no teacher\n"
            "help: set distill.objective=recover, guard.max to a limit, or preference.objective=dpo"
        )
    if learns_preferences:
        training = _replaced(arguments.overrides, {"preference.reference": "cached"})
    else:
        training = _training_overrides(cfg, arguments.overrides)
    # Refuses what the cache cannot serve before the cache is written.
    training_cfg = load_config(str(arguments.config), training)

    from finetune.data.early_checks import check_inputs

    check_inputs(cfg)

    from finetune.data.loader import load_all_rows
    from finetune.system.accelerator import default_device
    from finetune.system.machine import use_all_cores

    tokenizer, chat, data = load_all_rows(cfg, log)
    device = default_device()
    use_all_cores(device.type)
    if learns_preferences:
        from finetune.objectives.preference import answers_of
        from finetune.objectives.reference_cache import FILE, reference_folder, write_reference_cache

        written = write_reference_cache(cfg, chat, answers_of(data.every_document), device, log)
        folder, what = reference_folder(cfg), "answers"
        size = (folder / FILE).stat().st_size
    else:
        from finetune.data.loader import used_ids
        from finetune.distill.filling import size_of, write_cache
        from finetune.distill.teacher import cache_path, check_media, check_vocabulary

        if any(store.has_media.any() for store in data.stores):
            check_media(training_cfg)
        vocabulary = check_vocabulary(cfg, tokenizer, used_ids(data))
        written = write_cache(cfg, chat, vocabulary, data.every_document, device=device, log=log)
        folder, what = cache_path(cfg), "documents"
        size = size_of(folder)
    print(f"{folder}: {written:,} {what} written now, {format_bytes(size)} in all")
    print(f"next: {shlex.join(['finetune', 'train', f'config={arguments.config}', *training])}")
    return 0


def _training_overrides(cfg: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a run that trains from the cache of a teacher."""
    if cfg.distill.teacher.placement == "server":
        return list(overrides)
    one_step = {"distill.teacher.steps_ahead": "1"} if cfg.distill.teacher.steps_ahead != 1 else {}
    kept = _without(overrides, ["distill.teacher.steps_ahead"])
    return _replaced(kept, {"distill.teacher.placement": "cached", **one_step})


def _without(overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [word for word in overrides if word.lstrip("+").partition("=")[0] not in keys]


def _replaced(overrides: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    """Return the overrides with these settings in place of others of the same keys."""
    return [*_without(overrides, list(settings)), *(f"{key}={value}" for key, value in settings.items())]


COMMAND = Command("cache", __doc__, run, config="required")
