"""Measure KL(trained || merged) on held-out examples.

The trained model (its base in 4 bit, the adapter beside it) runs first and is freed. The final hidden states of its
target tokens stay in memory as the reference.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.config.command_options import KlCheckOptions
from finetune.config.compose import saved_config
from finetune.config.schema import DataConfig, Dtype, ModelConfig, RunConfig, SourceConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Document
from finetune.data.loader import Source, load_data, load_media_processor
from finetune.data.media.processor import MediaProcessor
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.distill.resident import ResidentTeacher, load_resident
from finetune.evaluation.examples import read_for_scoring
from finetune.evaluation.scoring import Agreement, Perplexity, agreement, evaluate
from finetune.losses.distillation import TeacherHidden
from finetune.models.adapters.files import SavedAdapter, load_adapter
from finetune.models.adapters.names import PREFIX
from finetune.models.adapters.trained import Trained
from finetune.models.decoder import family_in
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.models.tokenizer import load_adapter_tokenizer
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.system.accelerator import default_device
from finetune.system.errors import ConfigError, DataError
from finetune.towers.towers import build_towers


@dataclass(frozen=True)
class HeldOutSet:
    """Examples to compare on; vocabulary: number of ids that the tokenizer knows. media: reads their media."""

    source: str
    documents: Sequence[Document]
    vocabulary: int
    media: MediaProcessor | None = None


@dataclass(frozen=True)
class Recorded:
    """A teacher that returns recorded outputs once, batch by batch."""

    outputs: Iterator[TeacherHidden]

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        return islice(self.outputs, len(batches))


@dataclass(frozen=True)
class Reference:
    """The outputs of a model on a held-out set, with which others are compared."""

    held_out: HeldOutSet
    outputs: list[TeacherHidden]

    def agreement(self, model: nn.Module) -> Agreement:
        """Compare a model with the reference."""
        held_out, teacher = self.held_out, Recorded(iter(self.outputs))
        return agreement(model, teacher, held_out.documents, held_out.vocabulary, limit_tokens=EVALUATION_TOKENS)


@dataclass(frozen=True)
class TrainedReference(Reference):
    """The outputs and the perplexity of a trained model."""

    adapter: str
    scored: Perplexity


@dataclass(frozen=True)
class KlCheck:
    """The distance of a merged from a trained model: KL in nats per target token, share of equal top tokens."""

    adapter: str
    rows: int
    tokens: int
    source: str
    kl: float
    top1: float
    perplexity_trained: float
    perplexity_merged: float

    def describe(self) -> str:
        return (
            f"kl_check: KL(trained || merged)={self.kl:.6f} nats per token, same top token={self.top1:.2%}, perplexity="
            f"{self.perplexity_trained:.4f} trained and {self.perplexity_merged:.4f} merged, "
            f"targets={self.tokens:,}, examples={self.rows}, source={self.source}"
        )


def held_out_sets(trained: Trained, options: KlCheckOptions) -> list[tuple[SavedAdapter, HeldOutSet]]:
    """Load for each adapter the examples of `kl_check.data`, else of the data.eval or the held-out part of its run.

    Adapters without examples are left out; with `kl_check.num_examples=0` all are.

    Raises:
        ConfigError: the examples cannot be read.
    """
    found = []
    for adapter in trained.adapters:
        cfg = saved_config(adapter.folder)
        if section := held_out_section(cfg, options):
            tokenizer = load_adapter_tokenizer(trained.model, adapter.folder)
            media = load_media_processor(trained.model, section)
            source = load_examples(section, tokenizer, f"adapter={adapter.name}", cfg, media=media)
            examples = source.documents[: options.num_examples]
            found.append((adapter, HeldOutSet(source.name, examples, len(tokenizer), media)))
    return found


def held_out_section(cfg: RunConfig | None, options: KlCheckOptions) -> DataConfig | None:
    """Return the data section of the held-out examples; None if there are none. cfg: of the adapter's run."""
    if options.num_examples == 0 or (options.data is None and not (cfg and (cfg.data.eval or cfg.data.held_out))):
        return None
    return data_section(cfg, options.data or (cfg.data.eval if cfg is not None else []))


def data_section(cfg: RunConfig | None, sources: list[SourceConfig]) -> DataConfig:
    """Return the data section that reads sources, or without any the run's own, with the settings of a run."""
    changes: dict[str, Any] = {"stream_rows": None, "chat_template": None, **read_for_scoring(cfg)[1]}
    if sources:  # The training data may be gone.
        changes |= {"train": sources, "eval": [], "held_out": 0.0}
    return DataConfig(train=sources) if cfg is None else cfg.data.model_copy(update=changes)


def load_examples(
    section: DataConfig,
    tokenizer: Any,
    owner: str,
    cfg: RunConfig | None,
    *,
    media: MediaProcessor | None = None,
) -> Source:
    """Load the held-out examples of a data section, else those of its first source.

    Args:
        owner: `adapter=NAME` or `model=NAME`, for messages.
        cfg: of the run.
        media: as in `Preparation`.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        objective = read_for_scoring(cfg)[0]
        data = load_data(Preparation(section, ChatTemplate(tokenizer), objective=objective, media=media))
    except DataError as error:
        raise ConfigError(
            f"{owner}: its held-out examples cannot be read: {error}\n"
            "help: name others with 'kl_check.data=[{path: rows.jsonl}]', or skip the check: kl_check.num_examples=0"
        ) from error
    return (data.eval or data.train)[0]


def measure_trained(trained: Trained, adapter: SavedAdapter, held_out: HeldOutSet) -> TrainedReference:
    """Load the model as it was trained, and keep its outputs on the held-out set."""
    device = default_device()
    base = load_base(trained.model, trained.quant, device)
    towers = tuple(f"{PREFIX}{tower.module}." for tower in family_in(base).towers.values())
    frozen = not any(name.startswith(towers) for name in adapter.tensors)
    build_towers(base, trained.model, held_out.media, cached=frozen)
    model = load_adapter(base, adapter.folder)
    fuse_layers(model)
    documents = held_out.documents
    outputs = outputs_of(model.eval(), documents)
    scored = evaluate(model, documents, limit_tokens=EVALUATION_TOKENS)
    del model, base
    gc.collect()
    return TrainedReference(held_out, outputs, adapter.name, scored)


def outputs_of(model: nn.Module, documents: Sequence[Document]) -> list[TeacherHidden]:
    """Return a model's outputs on the batches in which `agreement` compares documents."""
    batches = [build_batch(group, share_prefixes=True) for group in groups_of(documents, EVALUATION_TOKENS)]
    return list(ResidentTeacher(model, next(model.parameters()).device).targets_for(batches))


@torch.no_grad()
def measure_merged(folder: Path, dtype: Dtype, references: Sequence[TrainedReference]) -> list[KlCheck]:
    """Compare the merged model in a folder with the references of trained models."""
    cfg = ModelConfig(name=str(folder), dtype=dtype)
    model: Any = load_resident(cfg, None, default_device()).model
    checks = []
    for reference in references:
        held_out = reference.held_out
        # No other run would read embeddings of these weights from the cache.
        build_towers(model, cfg, held_out.media, cached=False)
        found = reference.agreement(model)
        merged = evaluate(model, held_out.documents, limit_tokens=EVALUATION_TOKENS)
        checks.append(
            KlCheck(
                adapter=reference.adapter,
                rows=len(held_out.documents),
                tokens=found.tokens,
                source=held_out.source,
                kl=found.kl,
                top1=found.top1,
                perplexity_trained=reference.scored.perplexity,
                perplexity_merged=merged.perplexity,
            )
        )
    return checks
