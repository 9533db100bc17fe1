"""Build the teacher in the config, and check that student and teacher share the meaning of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import ModelConfig, RunConfig
from finetune.data.documents import Document, Documents
from finetune.data.template.chat import ChatTemplate
from finetune.distill.cache import CachedTeacher
from finetune.distill.fingerprint import adapter_folder, fingerprint, teacher_adapter, teacher_weights
from finetune.distill.resident import Share, load_resident
from finetune.distill.shards import vocabulary_of
from finetune.distill.stream import StreamedModel
from finetune.losses.distillation import Teacher
from finetune.losses.hidden_states import base_of
from finetune.models.families import FAMILIES, text_settings
from finetune.models.hub import TEXT_FILES, fetch, read_config
from finetune.models.tokenizer import load_tokenizer
from finetune.system.console import Log
from finetune.system.errors import ConfigError
from finetune.system.format import first_lines
from finetune.towers.towers import build_towers, processor_of

_SHOWN = 8


def teacher_model(cfg: RunConfig) -> ModelConfig:
    """Return the teacher as a model to load: the student's base if the config names no other."""
    teacher = cfg.distill.teacher
    return ModelConfig(
        name=teacher.name or cfg.model.name,
        revision=teacher.revision or (cfg.model.revision if teacher.name is None else None),
        dtype=teacher.dtype,
    )


def teacher_is_base(cfg: RunConfig) -> bool:
    """Return whether the teacher is the student's base, with or without an adapter."""
    model = teacher_model(cfg)
    return (model.name, model.revision) == (cfg.model.name, cfg.model.revision)


def check_vocabulary(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, used: np.ndarray) -> int:
    """Return the number of ids, from 0 on, that student and teacher share, before any weight is loaded.

    Qwen2.5 models have tables of 151,936 or 152,064 rows for one tokenizer of 151,665 tokens: both are cut to the
    tokens. DeepSeek-R1-Distill-Qwen has the same tables with other control tokens, so it is refused.

    Args:
        used: unique ids of the rows.

    Raises:
        ConfigError: an id has another meaning for the teacher, or no row in its table.
    """
    model, teacher = teacher_model(cfg), cfg.distill.teacher
    if teacher_is_base(cfg):
        teacher_rows = text_settings(_config(model))["vocab_size"]
    elif teacher.placement == "server" and teacher.name is None:
        return len(tokenizer)
    else:
        try:
            teachers, teacher_rows = load_tokenizer(model), text_settings(_config(model))["vocab_size"]
        except ConfigError:
            if teacher.placement != "cached":
                raise
            # The cache was written with this check, and its fingerprint contains the tokenizer.
            return vocabulary_of(cache_path(cfg))
        check_same_tokens(tokenizer, teachers, used, model.name)
    vocabulary = min(len(tokenizer), int(teacher_rows))
    if unknown := [int(i) for i in used if i >= vocabulary]:
        raise ConfigError(
            f"distill.teacher: {model.name} has no embedding for {len(unknown):,} token ids of the rows, first "
            f"{unknown[0]}\nhelp: a teacher cannot be combined with lora.new_tokens"
        )
    return vocabulary


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase, used: np.ndarray, teacher: str
) -> None:
    """Compare the tokens of the ids in use. Raises: ConfigError naming the ids that differ, with both tokens."""

    def meanings(which: PreTrainedTokenizerBase) -> list[Any]:
        size = len(which)
        return [which.convert_ids_to_tokens(i) if i < size else None for i in used.tolist()]

    pairs = zip(used.tolist(), meanings(tokenizer), meanings(teachers), strict=True)
    different = [f"  {i}: {ours!r} here, {theirs!r} for the teacher" for i, ours, theirs in pairs if ours != theirs]
    if different:
        what = f"{len(different):,} of the {len(used):,} token ids in the rows have another meaning"
        help_line = (
            f"help: set model.tokenizer={teacher} and a matching data.chat_template, or choose a teacher with the "
            "student's tokenizer"
        )
        first = f"distill.teacher.name={teacher}: {what}:"
        raise ConfigError("\n".join([first, *first_lines(different, len(different), _SHOWN), help_line]))


def check_width(cfg: RunConfig) -> None:
    """Raises: ConfigError if distill.hidden_weight would compare hidden states of different widths."""
    if not cfg.distill.hidden_weight or teacher_is_base(cfg):
        return
    ours, theirs = (_config(model)["hidden_size"] for model in (cfg.model, teacher_model(cfg)))
    if ours != theirs:
        raise ConfigError(
            f"distill.hidden_weight: the hidden states have width {ours} here and {theirs} in the teacher\nhelp: set 0"
        )


def check_media(cfg: RunConfig) -> None:
    """Raises: ConfigError if the teacher cannot read the images, audio or video of the rows."""
    if (placement := cfg.distill.teacher.placement) != "resident":
        raise ConfigError(
            f"distill.teacher.placement={placement}: the rows hold media, which only a resident teacher reads\n"
            "help: set distill.teacher.placement=resident"
        )
    ours, theirs = (FAMILIES[_config(model)["model_type"]] for model in (cfg.model, teacher_model(cfg)))
    if {part.module for part in ours.towers.values()} != {part.module for part in theirs.towers.values()}:
        raise ConfigError(
            f"distill.teacher.name={cfg.distill.teacher.name}: the rows hold media for {ours.title}, found a teacher "
            f"of {theirs.title}\nhelp: choose a teacher of the student's family"
        )


def _config(model: ModelConfig) -> dict[str, Any]:
    return read_config(fetch(model.name, model.revision, TEXT_FILES, "model.name").folder, model.name)


def build_teacher(
    cfg: RunConfig,
    *,
    base: PreTrainedModel,
    chat: ChatTemplate,
    vocabulary: int,
    documents: Sequence[Document],
    device: torch.device,
    share: Share | None,
    log: Log,
) -> Teacher:
    """Build the teacher of a run.

    Args:
        base: the student without an adapter; a teacher of the same weights shares its tables.
        vocabulary: ids below it take part in the divergence.
        documents: all documents of the run, which a cache must contain.
        share: splits a resident teacher over the ranks; it then has tables of its own. None: each rank has a whole one.

    Raises:
        ConfigError: the teacher is not found or not supported.
        DataError: the cache lacks documents.
        IntegrityError: its files are corrupt.
    """
    model, teacher = teacher_model(cfg), cfg.distill.teacher
    if teacher.placement == "resident":
        student = base if teacher_is_base(cfg) else None
        found = load_resident(model, adapter_folder(teacher.lora), device, student, share)
        if towers := build_towers(base_of(found.model), model, processor_of(base)):
            towers.fill(documents.media() if isinstance(documents, Documents) else (), log)
            if not cfg.data.stream_rows:  # a stream brings media that are not known yet
                towers.release()
        return found
    if teacher.placement == "streamed":
        return streamed_teacher(cfg, device, log, _shared_head(cfg, base))
    origin = cache_fingerprint(cfg, chat, vocabulary, log, download=False)
    head = None
    if cfg.distill.cache_kind == "hidden":
        head = _shared_head(cfg, base) or StreamedModel(model, device).head
    cached = CachedTeacher(cache_path(cfg), origin, device, head=head, dtype=getattr(torch, model.dtype))
    cached.check_holds(documents)
    if cfg.distill.spot_check and origin["weights"] is not None:
        some = np.random.default_rng(cfg.train.seed).permutation(len(documents))[: cfg.distill.spot_check]
        online = streamed_teacher(cfg, device, lambda text: None)
        difference = cached.check_against(online, [documents[i] for i in some], vocabulary)
        log(f"teacher: spot check of {len(some)} cached documents, mean difference={difference:.2g} nats")
    return cached


def streamed_teacher(cfg: RunConfig, device: torch.device, log: Log, head: nn.Module | None = None) -> StreamedModel:
    """Build a streamed teacher. head: the teacher's head, if it is in memory already."""
    return StreamedModel(teacher_model(cfg), device, adapter_folder(cfg.distill.teacher.lora), head, log)


def _shared_head(cfg: RunConfig, base: PreTrainedModel) -> nn.Module | None:
    """Return the student's frozen head, if the teacher has the same."""
    head = base.get_output_embeddings()
    same = teacher_is_base(cfg) and head is not None and head.weight.dtype == getattr(torch, cfg.distill.teacher.dtype)
    return head if same else None


def cache_path(cfg: RunConfig) -> Path:
    """Return the folder of `distill.cache`."""
    if cfg.distill.cache is None:
        raise ConfigError("distill.cache: missing\nhelp: set the folder of the cache")
    return Path(cfg.distill.cache).expanduser()


def cache_fingerprint(
    cfg: RunConfig, chat: ChatTemplate, vocabulary: int, log: Log, download: bool = True
) -> dict[str, Any]:
    """Return the fingerprint that a cache must have for this config.

    Args:
        download: False skips weights that are not on this machine, because training from a cache needs no teacher.
    """
    model = teacher_model(cfg)
    weights, adapter = None, None
    if cfg.distill.teacher.placement != "server":
        try:
            weights = teacher_weights(model, download)
            adapter = teacher_adapter(cfg.distill.teacher.lora, download)
        except ConfigError as error:
            log(f"teacher: weights are not on this machine, so they are not compared with the cache's ({error})")
    return fingerprint(cfg.distill, model, chat, vocabulary, weights=weights, adapter=adapter)
