"""`finetune cache`: the teacher's signal for every row of a config, written once."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.system.arguments import Arguments
from finetune.system.console import log
from finetune.system.errors import ConfigError, InputError

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig

HELP = """\
usage: finetune cache config=X.yaml distill.cache=DIR [key=value …]

Asks the teacher of a config about every row of data.train and data.eval and writes what it says to DIR. Training with
distill.teacher.placement=cached then needs no teacher. Killed, it goes on where it stopped; with more rows, it adds
what is missing. The folder serves any order, packing, batch size, number of ranks and seed of training.
  distill.cache_kind=sampled                the 32 most probable tokens and 16 drawn of the others: 180 bytes a target
  distill.cache_kind=hidden                 the final hidden states: every divergence, exact; 2 bytes x width a target
  distill.teacher.placement=…         resident, streamed or server; cached: resident where it fits, else streamed

Examples
  finetune cache config=distill.yaml distill.cache=teacher 'data.train=[{path: rows.jsonl}]'
  finetune train config=distill.yaml distill.cache=teacher 'data.train=[{path: rows.jsonl}]' \\
    distill.teacher.placement=cached"""


def run_cache(arguments: Arguments) -> int:
    """`finetune cache`. Raises: InputError for what cannot be meant; what the teacher and the folder raise."""
    from finetune.config.compose import load_config

    if arguments.config is None:
        raise InputError(
            "finetune cache needs config=X.yaml, as in finetune cache config=distill.yaml distill.cache=DIR"
        )
    cfg = load_config(arguments.config, arguments.overrides)
    if not cfg.asks_teacher:
        raise ConfigError(
            f"distill.objective is none in {arguments.config}: there is no teacher to ask; set it to recover, or "
            "guard.max to a limit"
        )
    training = _training(cfg, arguments.overrides)
    load_config(arguments.config, training)  # what the folder cannot serve is refused before it is written

    from finetune.data.loader import check_sources

    check_sources(cfg.data)

    import torch

    from finetune.data.documents import Documents
    from finetune.data.loader import load_chat_template, load_data, used_ids
    from finetune.data.tokens.prepare import Preparation, console_progress
    from finetune.distill.filling import size_of, write_cache
    from finetune.distill.teacher import cache_of, check_vocabulary
    from finetune.models.load import default_device, load_tokenizer
    from finetune.models.tokens import extend_tokenizer
    from finetune.system.machine import pick_threads, usable_cores

    tokenizer = load_tokenizer(cfg.model)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    chat = load_chat_template(cfg.data, tokenizer)
    data = load_data(Preparation(cfg.data, chat, progress=console_progress(log)))
    vocabulary = check_vocabulary(cfg, tokenizer, used_ids(data))
    device = default_device()
    if device.type == "cpu" and (threads := pick_threads(os.environ, usable_cores())):
        torch.set_num_threads(threads)
    documents = Documents.join(source.documents for source in (*data.train, *data.eval))
    written = write_cache(cfg, chat, vocabulary, documents, device, log)
    folder = cache_of(cfg)
    print(f"{folder}: {written:,} documents written now, {size_of(folder) / 1e6:,.1f} MB in all")
    print(f"next: {shlex.join(['finetune', 'train', f'config={arguments.config}', *training])}")
    return 0


def _training(cfg: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Overrides with which a run trains from the folder: the given ones, but those about how the teacher is asked."""
    if cfg.distill.teacher.placement == "server":
        return list(overrides)
    how = ("distill.teacher.placement", "distill.teacher.steps_ahead")
    kept = [word for word in overrides if word.lstrip("+").partition("=")[0] not in how]
    one_step = ["distill.teacher.steps_ahead=1"] if cfg.distill.teacher.steps_ahead != 1 else []
    return [*kept, "distill.teacher.placement=cached", *one_step]
