"""The inputs of a plan: one frozen record, built once per run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from finetune.config import schema
from finetune.config.preference_rules import NEEDS_REFERENCE
from finetune.models.families import FAMILIES, SHAPE_KEYS, ModelFamily, family_of, shape_of, text_settings
from finetune.planning.media import MediaLoad, largest_media
from finetune.planning.sequences import FullSequence, plain_sequence, sequence_of_groups, sequence_of_pairs
from finetune.planning.static_memory import DTYPE_BYTES, StaticMemory, adapted_linears, linear_shapes, plan_memory
from finetune.planning.tower_shapes import TowerShape, tower_shapes
from finetune.system.accelerator import on_gpu, table_key
from finetune.system.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GpuTraits:
    """What the memory of attention depends on. The defaults are those of an H100 and an H200.

    flash_attention: whether torch has flash attention for this GPU, from NVIDIA's Ampere on.
    """

    flash_attention: bool = True
    multiprocessors: int = 132


@dataclass(frozen=True, eq=False)
class PlanInputs:
    """Everything that the plan of one rank depends on. Records compare by identity, so results can be cached.

    shape: sizes of the student; keys as in config.json; empty if they are unknown without a download.
    model to generation: sections of the config.
    device_type: one of torch's device types: cpu, cuda, xpu.
    document_tokens: of an example; None takes each sequence as one. target_share: the trained part of them.
    media: of known rows, by tower; None: the largest files, with `media_share` of all tokens.
    nodes: machines of the run. shard_ranks: ranks that hold one copy of the base together (`sharded_base.shard_group`).
    """

    shape: Mapping[str, Any]
    model: schema.ModelConfig
    quant: schema.QuantConfig
    lora: schema.LoraConfig
    data: schema.DataConfig
    train: schema.TrainConfig
    distill: schema.DistillConfig
    preference: schema.PreferenceConfig
    reward: schema.RewardConfig
    guard: schema.GuardConfig
    generation: schema.GenerationConfig
    parallel: schema.ParallelConfig
    has_teacher: bool
    device_type: str
    ranks: int
    gpu: GpuTraits = GpuTraits()
    document_tokens: int | None = None
    target_share: float = 1.0
    media: Mapping[str, MediaLoad] | None = None
    media_share: float = 1.0
    nodes: int = 1
    shard_ranks: int = 1

    def with_settings(self, **sections: Mapping[str, Any]) -> PlanInputs:
        """Return a copy with some settings changed. Nothing is validated again."""
        return replace(self, **{name: getattr(self, name).model_copy(update=new) for name, new in sections.items()})

    def with_rows(self, document_tokens: int | None, target_share: float, media_share: float = 1.0) -> PlanInputs:
        """Return the inputs of a run whose examples have so many tokens, so many of them trained, so many media."""
        return replace(self, document_tokens=document_tokens, target_share=target_share, media_share=media_share)

    def with_model_config(self, config: Mapping[str, Any]) -> PlanInputs:
        """Return the inputs of a loaded model (config.json), whose vocabulary may be larger; `self` if it is equal."""
        config = text_settings(config)
        shape = {key: config[key] for key in ("model_type", *SHAPE_KEYS) if key != "head_dim"}
        shape["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        shape |= FAMILIES[shape["model_type"]].tower_shapes(shape["hidden_size"], config=config)
        same = all(self.shape.get(key) == value for key, value in shape.items())
        return self if same else replace(self, shape={**self.shape, **shape})

    @property
    def device_kind(self) -> str:
        """The key of tables with one value for the CPU and one for GPUs."""
        return table_key(self.device_type)

    @property
    def on_gpu(self) -> bool:
        """Whether the run computes on a GPU."""
        return on_gpu(self.device_type)

    @property
    def family(self) -> ModelFamily:
        """The record of the model's family."""
        return FAMILIES[self.shape["model_type"]]

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) features of each linear of a layer."""
        return linear_shapes(self.shape)

    @property
    def value_bytes(self) -> int:
        """Bytes of a value in the compute dtype."""
        return DTYPE_BYTES[self.model.dtype]

    @property
    def flash_attention(self) -> bool:
        """Whether attention is torch's flash attention: 16 bits, on a GPU that has it."""
        return self.on_gpu and self.gpu.flash_attention and self.value_bytes == 2

    @property
    def attention_in_fp32(self) -> bool:
        """Whether a GPU without flash attention computes attention of bf16 values in fp32."""
        return self.on_gpu and not self.flash_attention and self.model.dtype == "bfloat16"

    @property
    def rank_sequences(self) -> int:
        """Sequences per rank and optimizer step."""
        return ceil(self.train.batch_size / self.ranks)

    @property
    def step_sequences(self) -> float:
        """Full sequences per rank and optimizer step: with rewards, `train.batch_size` counts prompts."""
        return self.rank_sequences / self.sequence.prompts

    @property
    def evaluates(self) -> bool:
        return bool(self.data.eval or self.data.held_out)

    @cached_property
    def static(self) -> StaticMemory:
        """Memory of the device that does not depend on the batch."""
        memory = plan_memory(
            self.shape, self.model, self.quant, self.lora, self.train.optimizer, shard_ranks=self.shard_ranks
        )
        elsewhere = {"embedding"} if self.embedding_on_host else set()
        if self.base_on_host:
            elsewhere = memory.parts.keys() - {"adapter", "gradients", "optimizer"}
        parts = {name: size for name, size in memory.parts.items() if name not in elsewhere}
        return replace(memory, parts=parts | self.tower_bytes if self.towers_stay else parts)

    @cached_property
    def adapted(self) -> tuple[frozenset[str], ...]:
        """Names of the linears with an adapter, per layer."""
        return tuple(adapted_linears(self.family, layer, self.lora) for layer in range(self.shape["num_hidden_layers"]))

    @cached_property
    def towers(self) -> dict[str, TowerShape]:
        """The towers of the model by name."""
        return tower_shapes(self.shape)

    @property
    def tower_bytes(self) -> dict[str, float]:
        """The bytes of the towers' weights, which are never quantized, by part."""
        return {f"{name} tower": float(tower.parameters * self.value_bytes) for name, tower in self.towers.items()}

    @property
    def trained_towers(self) -> list[str]:
        """The towers with an adapter."""
        return [name for name in self.towers if name in self.lora.towers]

    @property
    def towers_stay(self) -> bool:
        """Whether the towers run during training; otherwise they compute all media before, and are freed."""
        data = self.data
        return bool(self.towers and (self.trained_towers or not data.media_cache or data.stream_rows))

    @cached_property
    def media_load(self) -> Mapping[str, MediaLoad]:
        """What each tower reads."""
        known = self.media
        return largest_media(self.towers, self.data, self.lora, self.media_share) if known is None else known

    @property
    def table_values(self) -> int:
        """Values of the embedding, and of the head."""
        return self.shape["vocab_size"] * self.shape["hidden_size"]

    @property
    def trains_head(self) -> bool:
        return any("lm_head" in name for name in self.lora.modules_to_save)

    @property
    def trains_embedding(self) -> bool:
        return bool(self.lora.new_tokens) or any("embed" in name for name in self.lora.modules_to_save)

    @property
    def can_move_embedding(self) -> bool:
        """Whether the input embedding of a GPU run may stay in main memory."""
        tied = self.shape.get("tie_word_embeddings")
        whole = self.shard_ranks == 1
        return self.on_gpu and whole and not tied and not self.trains_embedding

    @property
    def embedding_on_host(self) -> bool:
        return self.model.embedding == "host" and self.can_move_embedding

    @property
    def base_on_host(self) -> bool:
        """Whether the rank's part of a sharded base of a GPU run stays in main memory."""
        return self.parallel.offload and self.shard_ranks > 1 and self.on_gpu

    @property
    def first_trained_layer(self) -> int:
        """The lowest layer that backward reaches: no graph is built below the first trained weight."""
        if self.trains_embedding or self.trained_towers:
            return 0
        return next((layer for layer, names in enumerate(self.adapted) if names), len(self.adapted))

    @property
    def may_recover(self) -> bool:
        """Whether a drift guard may train on the teacher alone for some steps."""
        return self.guard.max is not None and self.guard.action == "recover"

    @property
    def trains_on_teacher(self) -> bool:
        """Whether training steps need the teacher: in distillation, and in a guard's recovery."""
        return self.distill.objective != "none" or self.may_recover

    @property
    def learns_from_rewards(self) -> bool:
        return self.reward.loss != "none"

    @property
    def row_objective(self) -> str:
        """As that of the config."""
        return "reward" if self.learns_from_rewards else self.preference.objective

    @property
    def updates(self) -> int:
        """Optimizer steps on the same rows, or on the same answers to them."""
        return self.reward.updates if self.learns_from_rewards else 1

    @property
    def samples_answers(self) -> bool:
        """Whether answers to learn from are sampled in this process."""
        return self.learns_from_rewards and self.reward.engine == "process"

    @property
    def runs_reference(self) -> bool:
        """Whether a training step runs the model once more, as the reference of a preference or of rewards."""
        if self.learns_from_rewards:
            return self.reward.beta > 0
        preference = self.preference
        return preference.objective in NEEDS_REFERENCE and preference.reference != "cached"

    @property
    def copies_adapter(self) -> bool:
        """Whether the reference is the adapter that training starts from, kept in a copy."""
        named = (self.reward if self.learns_from_rewards else self.preference).reference
        return self.runs_reference and named != "base" and self.lora.init_adapter is not None

    @property
    def shares_prompts(self) -> bool:
        """Whether answers to the same prompt compute it once: noise is drawn anew for each of them."""
        train = self.train
        return train.kernels == "fused" and train.share_prefixes and not (self.lora.dropout or train.neftune_alpha)

    @cached_property
    def sequence(self) -> FullSequence:
        """A full sequence. Without a share of trained tokens, all tokens of an example can be prompt, or none."""
        length, document, share = self.data.max_length, self.document_tokens, self.target_share
        if self.learns_from_rewards:
            most = self.train.batch_size if self.data.packing else 1
            shared = self.shares_prompts
            return sequence_of_groups(self.reward, length, self._prompt_tokens, shared=shared, most_prompts=most)
        if self.row_objective in ("none", "kto"):
            return plain_sequence(length, document, share)
        return sequence_of_pairs(length, document, share, self.shares_prompts)

    @property
    def _prompt_tokens(self) -> int | None:
        """Tokens of a prompt that answers are sampled to; None if they are unknown."""
        document, share = self.document_tokens, self.target_share
        return document if document is None or share == 1 else ceil(document * (1 - share))

    @property
    def answered_tokens(self) -> int:
        """Tokens of a prompt with its longest sampled answer."""
        prompt = self._prompt_tokens
        return self.data.max_length if prompt is None else prompt + self.reward.max_new_tokens

    @property
    def places_of_a_row(self) -> float:
        """Places that attention has per row of a full sequence."""
        return self.sequence.places / self.sequence.rows

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher's layers run in this process."""
        return self.has_teacher and self.distill.teacher.placement in ("resident", "streamed")

    @property
    def teacher_is_sampled(self) -> bool:
        """Whether the teacher gives some probabilities per target, in place of hidden states."""
        placement = self.distill.teacher.placement
        return placement == "server" or (placement == "cached" and self.distill.cache_kind == "sampled")

    @cached_property
    def teacher_shape(self) -> Mapping[str, Any] | None:
        """The teacher's shape, the student's own for the same base; None if unknown without a download."""
        name = self.distill.teacher.name
        return self.shape if name in (None, self.model.name) else shape_of(str(name))


def plan_inputs(
    cfg: schema.RunConfig,
    shape: Mapping[str, Any] | None,
    *,
    device_type: str,
    ranks: int = 1,
    gpu: GpuTraits = GpuTraits(),
    nodes: int = 1,
) -> PlanInputs:
    """Build the inputs of a run's plan; shape is None if the student's sizes are unknown without a download.

    Every rank holds a whole base: `sharded_base.shard_group` decides about sharing it.
    """
    sections = ("model", "quant", "lora", "data", "train", "distill", "preference", "reward", "guard", "generation")
    parts = {name: getattr(cfg, name) for name in (*sections, "parallel", "has_teacher")}
    return PlanInputs(shape=shape or {}, **parts, device_type=device_type, ranks=ranks, gpu=gpu, nodes=nodes)


def known_shape(model_name: str) -> Mapping[str, Any]:
    """Return the shapes of a model from its local config.json or from the table of known sizes.

    Raises: ConfigError, since a plan downloads nothing.
    """
    where, shape = f"model.name={model_name}", shape_of(model_name)
    if shape is None and (Path(model_name).expanduser() / "config.json").is_file():
        raise ConfigError(f"{where}: its config.json is corrupt or lacks one of {', '.join(SHAPE_KEYS)}")
    if shape is None:
        advice = "help: name a local folder with its config.json, or a hub id of a size on docs/models.md"
        raise ConfigError(f"{where}: has unknown shapes, and a plan downloads nothing\n{advice}")
    family_of(shape["model_type"], where)
    sizes = [key for key in SHAPE_KEYS if key != "tie_word_embeddings"]
    if wrong := [key for key in sizes if not isinstance(shape[key], int) or shape[key] < 1]:
        raise ConfigError(f"{where}: config.json: {wrong[0]} must be a positive integer, found {shape[wrong[0]]!r}")
    return shape
