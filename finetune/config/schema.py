"""RunConfig, the schema of a whole run: every section, and the rules between them."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from finetune.config.rules import contradictions
from finetune.config.sections import (
    DataConfig,
    DistillConfig,
    GenerationConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    Name,
    QuantConfig,
    Section,
    Text,
    TrackConfig,
    TrainConfig,
)
from finetune.config.sections import Dtype as Dtype
from finetune.config.sections import SourceConfig as SourceConfig


class RunConfig(Section):
    """One whole run."""

    name: Name = Field("", description="Name of the run; empty: the name of the config file without .yaml.")
    output_dir: Text = Field(
        default_factory=lambda fields: f"outputs/{fields.get('name') or 'run'}",
        description="Folder for the adapter, the checkpoints and the metrics.",
    )
    model: ModelConfig = Field(description="The base model.")
    quant: QuantConfig = Field(QuantConfig(), description="Storage of the frozen base model.")
    lora: LoraConfig = Field(LoraConfig(), description="The adapter to train.")
    data: DataConfig = Field(description="Training and evaluation data.")
    train: TrainConfig = Field(TrainConfig(), description="Optimizer, length of training, checkpoints.")
    distill: DistillConfig = Field(DistillConfig(), description="Knowledge distillation.")
    guard: GuardConfig = Field(GuardConfig(), description="Limit on the divergence between the model and its teacher.")
    generation: GenerationConfig = Field(GenerationConfig(), description="Generated answers to held-out examples.")
    track: TrackConfig = Field(TrackConfig(), description="Experiment trackers; metrics.jsonl is always written.")

    @property
    def has_teacher(self) -> bool:
        """Return whether the run learns from a teacher or is measured against one."""
        return self.distill.objective != "none" or self.guard.max is not None

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := contradictions(dict(self)):
            text = "; ".join(f"{problem.key}: {problem.text}" for problem in problems)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "problems": problems})
        return self
