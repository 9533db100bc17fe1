"""A tiny random model of a family on disk, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.families import FAMILIES, ModelFamily
from finetune.models.load import load_base
from finetune.models.skeleton import model_class
from finetune.models.tokenizer import quiet
from tests.families.tokenizers import save_tokenizer
from tests.models import save_tiny_base

PLAIN = QuantConfig(type="none", double=False)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TinyFamily:
    """A saved model of two layers in fp32."""

    name: str
    folder: Path
    rows: int  # of its embedding

    @property
    def family(self) -> ModelFamily:
        return FAMILIES[self.name]

    def config(self, **settings: Any) -> ModelConfig:
        return ModelConfig(**{"name": str(self.folder), "dtype": "float32", **settings})

    def ours(self, **settings: Any) -> Any:
        return load_base(self.config(**settings), PLAIN, CPU)

    def stock(self, folder: Path | None = None, **options: Any) -> Any:
        """Load a folder with transformers alone, by default its own."""
        with quiet():
            found = model_class(self.family).from_pretrained(
                folder or self.folder, dtype=torch.float32, local_files_only=True, **options
            )
        return found.eval()

    def lora(self) -> peft.LoraConfig:
        """Return an adapter on all linear layers of the decoder."""
        targets = rf"{self.family.decoder}\.layers\.\d+\..*_proj"
        return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")

    def adapted(self, base: Any) -> peft.PeftModel:
        """Attach an adapter with PEFT; B is random, because at zero A has no gradient."""
        torch.manual_seed(1)
        model = peft.get_peft_model(base, self.lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model


def save(name: str, folder: Path, tokenizer: str | None = None, **settings: Any) -> TinyFamily:
    rows = save_tokenizer(tokenizer or name, folder)
    save_tiny_base(folder, family=name, dtype=torch.float32, noise=0.1, vocab_size=rows, **settings)
    return TinyFamily(name, folder, rows)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    """Return the logits [T, V] of one text."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()
