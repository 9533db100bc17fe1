"""The teacher that a config names, where it says it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import ModelConfig, RunConfig
from finetune.data.batch import Batch
from finetune.data.documents import Document
from finetune.data.template.chat import ChatTemplate
from finetune.distill.cache import CachedTeacher
from finetune.distill.fingerprint import adapter_folder, fingerprint, teacher_adapter, teacher_weights
from finetune.distill.resident import load_resident
from finetune.distill.shards import vocabulary_of
from finetune.distill.stream import StreamedModel
from finetune.distill.vocabulary import check_same_tokens, shared_vocabulary
from finetune.losses.teacher_targets import Teacher, TeacherHidden
from finetune.models.hub import TEXT_FILES, fetch, read_config
from finetune.models.load import load_tokenizer
from finetune.system.console import Log
from finetune.system.errors import ConfigError


class StreamedTeacher:
    """A model that is read layer by layer, once for all batches it is asked about. say: told how fast the first was."""

    def __init__(self, model: StreamedModel, device: torch.device, log: Log):
        self.model, self.device = model, device
        self._say: Log | None = log

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        states = self.model.hidden_states(batches)
        if self._say is not None:
            figures = self.model.last_pass
            self._say(
                f"teacher: read {figures.read_bytes / 2**30:.2f} GiB in {figures.read_seconds:.1f} s beside "
                f"{figures.compute_seconds:.1f} s of computing, {figures.wall_seconds:.1f} s in all: "
                f"{figures.achieved_share:.0%} of what the slower of both allows"
            )
            self._say = None
        return (TeacherHidden(hidden_ND, self.model.head) for hidden_ND in states)


def teacher_model(cfg: RunConfig) -> ModelConfig:
    """The teacher as a model to load: the student's own base where no other is named."""
    teacher = cfg.distill.teacher
    own = teacher.name is None
    return ModelConfig(
        name=teacher.name or cfg.model.name,
        revision=teacher.revision or (cfg.model.revision if own else None),
        dtype=teacher.dtype,
    )


def teacher_is_base(cfg: RunConfig) -> bool:
    """Whether the teacher is made of the student's own weights, with an adapter or without."""
    model = teacher_model(cfg)
    return (model.name, model.revision) == (cfg.model.name, cfg.model.revision)


def check_vocabulary(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, used: np.ndarray) -> int:
    """How many ids, from 0 on, both sides know, before any weight is loaded.

    used: ids that the rows hold, each once.
    Raises: ConfigError if the teacher means something else by one of them, or has no row for it.
    """
    model, server = teacher_model(cfg), cfg.distill.teacher.placement == "server"
    student_rows = max(_rows(cfg.model), len(tokenizer))
    if teacher_is_base(cfg):
        return _enough(shared_vocabulary(tokenizer, student_rows, _rows(cfg.model)), used, model.name)
    if server and cfg.distill.teacher.name is None:
        return shared_vocabulary(tokenizer, student_rows, student_rows)
    try:
        teachers, teacher_rows = load_tokenizer(model), _rows(model)
    except ConfigError:
        if cfg.distill.teacher.placement != "cached":
            raise
        # Whoever wrote the folder had the teacher and compared; the fingerprint ties it to this tokenizer.
        return vocabulary_of(cache_of(cfg))
    check_same_tokens(tokenizer, teachers, used, model.name)
    return _enough(shared_vocabulary(tokenizer, student_rows, teacher_rows), used, model.name)


def check_width(cfg: RunConfig) -> None:
    """Raises: ConfigError if hidden states of different widths are to be compared."""
    if not cfg.distill.hidden_weight or teacher_is_base(cfg):
        return
    ours, theirs = (_config(model)["hidden_size"] for model in (cfg.model, teacher_model(cfg)))
    if ours != theirs:
        raise ConfigError(
            f"distill.hidden_weight compares hidden states, which are {ours} wide here and {theirs} in the teacher; "
            "set it to 0"
        )


def _rows(model: ModelConfig) -> int:
    """Rows of a model's embedding."""
    return int(_config(model)["vocab_size"])


def _config(model: ModelConfig) -> dict[str, Any]:
    return read_config(fetch(model.name, model.revision, TEXT_FILES, "model.name").folder, model.name)


def _enough(vocabulary: int, used: np.ndarray, teacher: str) -> int:
    if unknown := [int(i) for i in used if i >= vocabulary]:
        raise ConfigError(
            f"distill.teacher: {teacher} has no row for {len(unknown):,} of the tokens that the rows hold, first "
            f"{unknown[0]}; it cannot teach lora.new_tokens"
        )
    return vocabulary


def build_teacher(
    cfg: RunConfig,
    base: PreTrainedModel,
    chat: ChatTemplate,
    vocabulary: int,
    documents: Sequence[Document],
    device: torch.device,
    log: Log,
) -> Teacher:
    """The teacher of a run, ready to be asked.

    base: the student's, as loaded and before an adapter is on it: a teacher of the same weights shares its tables.
    documents: all that it will be asked about, where it answers from a folder.
    Raises: ConfigError, DataError, IntegrityError: see the parts.
    """
    model, teacher = teacher_model(cfg), cfg.distill.teacher
    if teacher.placement == "resident":
        adapter = None if teacher.lora is None else adapter_folder(teacher.lora)
        return load_resident(model, adapter, device, base if teacher_is_base(cfg) else None)
    if teacher.placement == "streamed":
        return streamed_teacher(cfg, device, log, _own_head(cfg, base))
    origin = signal_fingerprint(cfg, chat, vocabulary, log, download=False)
    cached = CachedTeacher(cache_of(cfg), origin, device, _head(cfg, base, device), getattr(torch, model.dtype))
    cached.check_holds(documents)
    if cfg.distill.spot_check and origin["weights"] is not None:
        _spot_check(cfg, cached, documents, vocabulary, device, log)
    return cached


def streamed_teacher(cfg: RunConfig, device: torch.device, log: Log, head: nn.Module | None = None) -> StreamedTeacher:
    """The teacher, read layer by layer. head: its own, where it is in memory already."""
    name = cfg.distill.teacher.lora
    adapter = None if name is None else adapter_folder(name)
    return StreamedTeacher(StreamedModel(teacher_model(cfg), device, adapter, head), device, log)


def _own_head(cfg: RunConfig, base: PreTrainedModel) -> nn.Module | None:
    """The student's head, where the teacher has the same; before an adapter is on it, and frozen ever after."""
    own = base.get_output_embeddings()
    same = teacher_is_base(cfg) and own is not None and own.weight.dtype == getattr(torch, cfg.distill.teacher.dtype)
    return own if same else None


def cache_of(cfg: RunConfig) -> Path:
    """The folder of `distill.cache`."""
    if cfg.distill.cache is None:
        raise ConfigError("distill.cache is missing: name the folder of the teacher's signal")
    return Path(cfg.distill.cache).expanduser()


def signal_fingerprint(
    cfg: RunConfig, chat: ChatTemplate, vocabulary: int, log: Log, download: bool = True
) -> dict[str, Any]:
    """What a folder of signals must come from for this config. download: False compares no weights that are not here:
    whoever trains from a folder needs no teacher.
    """
    model = teacher_model(cfg)
    weights, adapter = None, None
    if cfg.distill.teacher.placement != "server":
        try:
            weights = teacher_weights(model, download)
            adapter = teacher_adapter(cfg.distill.teacher.lora, download)
        except ConfigError as error:
            log(f"teacher: not all of it is here, so its weights are not compared with the cache's ({error})")
    return fingerprint(cfg.distill, model, chat, vocabulary, weights, adapter)


def _head(cfg: RunConfig, base: PreTrainedModel, device: torch.device) -> nn.Module | None:
    """What makes logits of cached hidden states."""
    if cfg.distill.cache_kind != "hidden":
        return None
    return _own_head(cfg, base) or StreamedModel(teacher_model(cfg), device).head


def _spot_check(
    cfg: RunConfig,
    cached: CachedTeacher,
    documents: Sequence[Document],
    vocabulary: int,
    device: torch.device,
    log: Log,
) -> None:
    """Ask the teacher itself about some documents."""
    some = np.random.default_rng(cfg.train.seed).permutation(len(documents))[: cfg.distill.spot_check]
    teacher = streamed_teacher(cfg, device, lambda text: None)
    difference = cached.check_against(teacher, [documents[i] for i in some], vocabulary)
    log(f"teacher: {len(some)} cached document(s) agree with it within {difference:.2g} nats")
