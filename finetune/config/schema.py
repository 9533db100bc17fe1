"""RunConfig, the schema of a whole run: every section, and the rules between them."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from finetune.config.rules import contradictions
from finetune.config.sections import (
    DataConfig,
    DistillConfig,
    Dtype,
    GenerationConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    Name,
    QuantConfig,
    Section,
    SourceConfig,
    TeacherConfig,
    Text,
    TrackConfig,
    TrainConfig,
)

# Other rooms import every section from here.
__all__ = [
    "DataConfig",
    "DistillConfig",
    "Dtype",
    "GenerationConfig",
    "GuardConfig",
    "LoraConfig",
    "ModelConfig",
    "QuantConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "TeacherConfig",
    "TrackConfig",
    "TrainConfig",
]


class RunConfig(Section):
    """One whole run."""

    name: Name = Field("", description="Name of the run; the config file's stem when empty.")
    output_dir: Text = Field(
        default_factory=lambda fields: f"outputs/{fields.get('name') or 'run'}",
        description="Folder of the adapter, the checkpoints and the metrics.",
    )
    model: ModelConfig = Field(description="The base model.")
    quant: QuantConfig = Field(QuantConfig(), description="How the frozen base is stored.")
    lora: LoraConfig = Field(LoraConfig(), description="The adapter that is trained.")
    data: DataConfig = Field(description="What is trained and evaluated on.")
    train: TrainConfig = Field(TrainConfig(), description="The optimization, its length, its checkpoints.")
    distill: DistillConfig = Field(DistillConfig(), description="Learning from a teacher's probabilities.")
    guard: GuardConfig = Field(GuardConfig(), description="A limit to how far the model may drift from its teacher.")
    generation: GenerationConfig = Field(GenerationConfig(), description="Answers to held-out rows.")
    track: TrackConfig = Field(TrackConfig(), description="Where the metrics go besides metrics.jsonl.")

    @property
    def asks_teacher(self) -> bool:
        """Whether the run has a teacher: to learn from, or to be measured against."""
        return self.distill.objective != "none" or self.guard.max is not None

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := contradictions(dict(self)):
            text = "; ".join(f"{problem.key}: {problem.text}" for problem in problems)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "problems": problems})
        return self
