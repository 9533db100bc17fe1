"""A teacher in memory: mapped from its files on a CPU, sharing equal tables with the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.batch import Batch
from finetune.losses.cross_entropy import head_of
from finetune.losses.distillation import TeacherHidden
from finetune.losses.hidden_states import target_states
from finetune.models.adapters.files import load_adapter
from finetune.models.decoder import family_in
from finetune.models.embedding import HostEmbedding
from finetune.models.families import family_of
from finetune.models.fused import fuse_layers
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, TensorFile, fetch, named_in_model, read_config, weight_files
from finetune.models.load import load_base
from finetune.models.skeleton import build_skeleton, fill_plain, holds_all
from finetune.models.tokenizer import quiet
from finetune.ops import attention

# Keeps this rank's part of a model in main memory, and moves the rest to the device.
Share = Callable[[PreTrainedModel], None]


@dataclass(frozen=True)
class ResidentTeacher:
    """A whole model in evaluation mode, computed batch by batch on demand."""

    model: nn.Module
    device: torch.device

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        """Yield the hidden states of each batch's targets, with the teacher's head."""
        for batch in batches:
            with torch.no_grad():
                hidden_ND = target_states(self.model, batch).hidden_ND
            yield TeacherHidden(hidden_ND, head_of(self.model))


def load_resident(
    cfg: ModelConfig,
    adapter: Path | None,
    device: torch.device,
    student: PreTrainedModel | None = None,
    share: Share | None = None,
) -> ResidentTeacher:
    """Load the teacher `cfg.name`, frozen, in `cfg.dtype`.

    Args:
        student: a base of the same weights without an adapter; a teacher that ranks do not share uses its embedding and
            head.
        share: splits the teacher over the ranks; None: each rank has a whole one.

    Raises: as `load_base` and `load_adapter`.
    """
    unquantized = QuantConfig(type="none", double=False)
    if share is not None:
        model = load_base(cfg, unquantized, device, mapped=True)
    else:
        model = _mapped(cfg, device, student) or load_base(cfg, unquantized, device)
    model.requires_grad_(False)
    teacher = model if adapter is None else load_adapter(model, adapter)
    fuse_layers(teacher)
    if share is not None:
        share(model)
    return ResidentTeacher(teacher.eval(), device)


def open_skeleton(cfg: ModelConfig) -> tuple[dict[str, TensorFile], PreTrainedModel | None]:
    """Return the file of each tensor, and the model without storage; None if its tensors have other names or shapes."""
    source = fetch(cfg.name, cfg.revision, TEXT_FILES + WEIGHT_FILES, "distill.teacher.name")
    family = family_of(read_config(source.folder, cfg.name)["model_type"], f"distill.teacher.name={cfg.name}")
    files = named_in_model(weight_files(source.folder, cfg.name), family)
    attention.register()
    with quiet():
        model = build_skeleton(source.folder, getattr(torch, cfg.dtype), attention.SEGMENTED)
    return files, model if holds_all(files, model) else None


def _mapped(cfg: ModelConfig, device: torch.device, student: PreTrainedModel | None) -> PreTrainedModel | None:
    """Map the model from its files, with the student's embedding and head if they have the teacher's dtype."""
    files, model = open_skeleton(cfg)
    if model is None:
        return None
    tables: dict[str, Any] = {} if student is None else dict(student.named_parameters())
    family = family_in(model)
    names = (f"{family.embedding}.weight", f"{family.head}.weight")
    shared = [name for name in names if name in tables and tables[name].dtype == getattr(torch, cfg.dtype)]
    files = {name: file for name, file in files.items() if name not in shared}
    embedding = None if student is None else student.get_input_embeddings()
    with quiet():
        if isinstance(embedding, HostEmbedding) and embedding.weight.dtype == model.dtype:
            model.set_input_embeddings(embedding)
            del files[names[0]]
        fill_plain(model, files, device)
        for name in shared:
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, tables[name])
        model.tie_weights()
    return model
