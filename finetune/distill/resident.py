"""A teacher in memory: mapped from its files on a CPU, sharing equal tables with the student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.batch import Batch
from finetune.losses.cross_entropy import head_of, target_rows
from finetune.losses.distillation import TeacherHidden
from finetune.losses.hidden_states import hidden_states
from finetune.models.adapters.files import load_adapter
from finetune.models.fused import fuse_layers
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config, weight_files
from finetune.models.load import load_base, quiet
from finetune.models.quant.four_bit import build_skeleton, fill_plain, holds_all
from finetune.ops import attention

_PLAIN = QuantConfig(type="none", double=False)


class ResidentTeacher:
    """A whole model in evaluation mode, computed batch by batch on demand."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model = model
        self.device = device

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        """Yield the hidden states of each batch's targets, with the teacher's head."""
        for batch in batches:
            with torch.no_grad():
                hidden_TD = hidden_states(self.model, batch.to(self.device))
                hidden_ND, _, _ = target_rows(hidden_TD, batch.to(self.device))
            yield TeacherHidden(hidden_ND, head_of(self.model))


def load_resident(
    cfg: ModelConfig, adapter: Path | None, device: torch.device, student: PreTrainedModel | None = None
) -> ResidentTeacher:
    """Load the teacher `cfg.name`, frozen, in `cfg.dtype`.

    Args:
        student: a base of the same weights without an adapter; its embedding and head are shared.

    Raises: as `load_base` and `load_adapter`.
    """
    model = _mapped(cfg, device, student) or load_base(cfg, _PLAIN, device)
    model.requires_grad_(False)
    teacher = model if adapter is None else load_adapter(model, adapter)
    fuse_layers(teacher)
    return ResidentTeacher(teacher.eval(), device)


def _mapped(cfg: ModelConfig, device: torch.device, student: PreTrainedModel | None) -> PreTrainedModel | None:
    """Map the model from its files; None if the tensors have other names."""
    source = fetch(cfg.name, cfg.revision, TEXT_FILES + WEIGHT_FILES, "distill.teacher.name")
    read_config(source.folder, cfg.name)
    files = weight_files(source.folder, cfg.name)
    attention.register()
    with quiet():
        model = build_skeleton(source.folder, getattr(torch, cfg.dtype), attention.SEGMENTED)
        if not holds_all(files, model):
            return None
        shared = {} if student is None else _shared_tables(student, getattr(torch, cfg.dtype))
        fill_plain(model, {name: file for name, file in files.items() if name not in shared}, device)
        for name, table in shared.items():
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, table)
        model.tie_weights()
    return model


def _shared_tables(student: PreTrainedModel, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Return the student's embedding and head by name, if they have the teacher's dtype."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tables = dict(student.named_parameters())
    return {name: tables[name] for name in names if name in tables and tables[name].dtype == dtype}  # type: ignore[misc]
