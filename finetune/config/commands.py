"""The settings of commands that take no run's config: every key, its type, its range and one line about it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.schema import Count, Index, NotNegative, Number, Section, SourceConfig, Text

Base = Literal["auto", "original", "dequantized"]
MergedType = Literal["auto", "bf16", "fp16", "fp32"]
Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]


class GateOptions(Section):
    """How far the merged model may be from the trained one."""

    data: list[SourceConfig] | None = Field(None, description="Rows to measure on; null is the run's data.eval.")
    rows: Index = Field(64, description="Held-out rows to compare on, the first so many; 0 measures nothing.")
    max_kl: NotNegative | None = Field(
        None, description="Fail above this KL(trained || merged) in nats a target token; null only reports it."
    )


class MergeOptions(Section):
    """`finetune merge`."""

    adapter: list[Text] | Text = Field(description="Run folder, checkpoint, adapter folder or hub id; or a list.")
    out: Text = Field(description="Folder to write; it must not exist.")
    base: Base = Field(
        "auto",
        description="Weights to add the update to: original 16-bit ones, or those that 4-bit training saw (dequantized)"
        "; auto is dequantized for adapters that learned to make up for quantisation, original for all others.",
    )
    dtype: MergedType = Field("auto", description="Type to round to; auto is the base's.")
    shard_size: Text = Field("4GB", description="Most that one safetensors file holds, as 4GB or 500MB.")
    model: Text | None = Field(None, description="Base model, where the adapter's own entry is not to be used.")
    weights: list[Number] | None = Field(None, description="Factor of each adapter; null is 1 for each.")
    combination: Combination = Field("linear", description="How several adapters are added up.")
    density: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None, description="Share of each update that ties or dare keep."
    )
    seed: Index = Field(0, description="Seed of what dare drops.")
    compare: bool = Field(False, description="Measure the other base as well, without keeping it.")
    gate: GateOptions = Field(GateOptions(), description="The comparison of what was trained with what is written.")


class ExportOptions(Section):
    """`finetune export`."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint, adapter folder or hub id to merge first.")
    model: Text | None = Field(None, description="Base of the adapter; without one, the model folder to export.")
    format: Literal["safetensors", "adapter", "gguf", "onnx", "ollama"] = Field(description="What to write.")
    out: Text = Field(description="Folder to write; it must not exist.")
    type: Text | None = Field(None, description="Number format within the format; --help lists them.")
    merge: bool = Field(True, description="false writes the adapter itself, not the merged model (gguf).")
    base: Base = Field("auto", description="As for merge.")
    shard_size: Text = Field("4GB", description="Most that one safetensors file holds.")
    verify: bool = Field(True, description="Read what was written with its own reader and compare.")
    prompts: Count = Field(4, description="Prompts to compare on.")
    tokens: Count = Field(64, description="Tokens that the source model answers each of them with.")
