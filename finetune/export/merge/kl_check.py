"""How far a merged model is from the one that was trained, on held-out rows.

The trained model, its base in 4 bit with the adapter beside it, is asked first and then leaves memory; what it said
stays, as the final hidden states of the targets.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from finetune.config.command_options import KlCheckOptions
from finetune.config.compose import saved_config
from finetune.config.schema import DataConfig, Dtype, ModelConfig, RunConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Document
from finetune.data.loader import load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.distill.resident import ResidentTeacher, load_resident
from finetune.evaluation.agreement import agreement
from finetune.evaluation.perplexity import Perplexity, evaluate
from finetune.losses.teacher_targets import TeacherHidden
from finetune.models.adapters.files import SavedAdapter, load_adapter
from finetune.models.adapters.trained import Trained
from finetune.models.fused import fuse_layers
from finetune.models.load import default_device, load_adapter_tokenizer, load_base
from finetune.system.errors import ConfigError, DataError

_LIMIT_TOKENS = 4096


@dataclass(frozen=True)
class HeldOut:
    """Rows to compare on. adapter: whose they are. vocabulary: ids that the tokenizer knows."""

    adapter: SavedAdapter
    source: str
    documents: Sequence[Document]
    vocabulary: int


@dataclass(frozen=True)
class Remembered:
    """What a trained model said about its rows."""

    rows: HeldOut
    targets_for: list[TeacherHidden]
    scored: Perplexity


class _Replay:
    """A teacher that says again what it said about the same batches, in the same order."""

    def __init__(self, said: Remembered):
        self._next = iter(said.targets_for)

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        return islice(self._next, len(batches))


@dataclass(frozen=True)
class KlCheck:
    """kl: KL(trained || merged) in nats a target token. top1: share of targets at which both prefer the same token.

    perplexity_*: exp of the loss on the rows' own tokens.
    """

    adapter: str
    rows: int
    tokens: int
    source: str
    kl: float
    top1: float
    perplexity_trained: float
    perplexity_merged: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        return (
            f"KL(trained || merged) {self.kl:.6f} nats a token, same first choice {self.top1:.2%}, perplexity "
            f"{self.perplexity_trained:.4f} trained and {self.perplexity_merged:.4f} merged ({self.tokens:,} targets "
            f"of {self.rows} rows, {self.source})"
        )


def held_out_rows(trained: Trained, adapter: SavedAdapter, options: KlCheckOptions) -> HeldOut | None:
    """The first rows of `kl_check.data`, else of the data.eval or the held-out part of the adapter's own run.

    Returns: None where nothing is to be measured, or nothing tells what to measure on.
    Raises: ConfigError if the rows cannot be read.
    """
    cfg = saved_config(adapter.folder)
    if options.num_examples == 0 or (options.data is None and not _has_rows(cfg)):
        return None
    tokenizer = load_adapter_tokenizer(trained.model, adapter.folder)
    try:
        data = load_data(Preparation(_data(cfg, options), ChatTemplate(tokenizer)))
    except DataError as error:
        raise ConfigError(
            f"the held-out rows of adapter={adapter.name} cannot be read: {error}\n"
            "name others with 'kl_check.data=[{path: rows.jsonl}]', or measure nothing with kl_check.num_examples=0"
        ) from error
    source = (data.eval or data.train)[0]
    count = min(options.num_examples, len(source.documents))
    return HeldOut(adapter, source.name, source.documents[:count], len(tokenizer))


def _has_rows(cfg: RunConfig | None) -> bool:
    return cfg is not None and bool(cfg.data.eval or cfg.data.held_out)


def _data(cfg: RunConfig | None, options: KlCheckOptions) -> DataConfig:
    """The run's data section, cut down to the rows that are wanted."""
    sources = options.data or (cfg.data.eval if cfg is not None else [])
    if cfg is None:
        return DataConfig(train=sources)
    changes: dict[str, Any] = {"stream_rows": None, "chat_template": None}
    if sources:  # training rows need not even be there any more
        changes |= {"train": sources, "eval": [], "held_out": 0.0}
    return cfg.data.model_copy(update=changes)


def ask_trained(trained: Trained, rows: HeldOut) -> Remembered:
    """Load the trained model as it was trained, and keep what it says."""
    device = default_device()
    model = load_adapter(load_base(trained.model, trained.quant, device), rows.adapter.folder)
    fuse_layers(model)
    teacher = ResidentTeacher(model.eval(), device)
    batches = [build_batch(group, share_prefixes=True) for group in groups_of(rows.documents, _LIMIT_TOKENS)]
    said = Remembered(
        rows, list(teacher.targets_for(batches)), evaluate(model, rows.documents, limit_tokens=_LIMIT_TOKENS)
    )
    del model, teacher
    gc.collect()
    return said


@torch.no_grad()
def compare_with(folder: Path, dtype: Dtype, said: Sequence[Remembered]) -> list[KlCheck]:
    """A merged model, loaded from its folder, against what trained ones have said."""
    model = load_resident(ModelConfig(name=str(folder), dtype=dtype), None, default_device()).model
    kl_checks = []
    for one in said:
        found = agreement(model, _Replay(one), one.rows.documents, one.rows.vocabulary, limit_tokens=_LIMIT_TOKENS)
        merged = evaluate(model, one.rows.documents, limit_tokens=_LIMIT_TOKENS)
        kl_checks.append(
            KlCheck(
                one.rows.adapter.name,
                len(one.rows.documents),
                found.tokens,
                one.rows.source,
                found.kl,
                found.top1,
                one.scored.perplexity,
                merged.perplexity,
            )
        )
    return kl_checks
