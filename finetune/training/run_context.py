"""What the steps of a run are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from finetune.config.schema import RunConfig
from finetune.data.loader import LoadedData
from finetune.data.sampler import Sampler
from finetune.data.tokens.prepare import Preparation
from finetune.training.autotune import BatchPlan
from finetune.training.distillation import DistillationSetup

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """One run, loaded. fit: to this machine's memory. lesson: None for a run without a teacher."""

    cfg: RunConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    preparation: Preparation
    data: LoadedData
    sampler: Sampler
    model: PeftModel
    fit: BatchPlan
    lesson: DistillationSetup | None

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process
