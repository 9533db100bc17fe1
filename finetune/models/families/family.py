"""What a record of a model family holds. Checks and plans read it before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# Keys of config.json; head_dim is hidden_size // num_attention_heads where the file has none.
SHAPE_KEYS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size tie_word_embeddings head_dim"
).split()
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Linears that are part of attention; the others are part of the MLP.
ATTENTION = LINEARS[:4]


@dataclass(frozen=True)
class Tower:
    """The part of a model that turns media into embeddings.

    module: its full name in the model. blocks: the full name of its layers. linears: of a layer: targets of
        `lora.towers`.
    placeholders: by kind of media, the token that stands for one embedding.
    settings: its nested settings in config.json. sizes: of the published towers, by key of these settings; None is the
        decoder's hidden size. changed_sizes: those that differ, by the size of the model.
    """

    module: str
    blocks: str
    linears: tuple[str, ...]
    placeholders: Mapping[str, str]
    settings: str
    sizes: Mapping[str, Any]
    changed_sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def shape(self, hidden_size: int, size: str = "", settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the tower's sizes.

        Args:
            hidden_size: of the decoder.
            size: of the model, as in its hub id.
            settings: of the tower in config.json; keys that it lacks are those of the published tower.
        """
        sizes = {**self.sizes, **self.changed_sizes.get(size, {})}
        sizes |= {key: found for key in sizes if (found := (settings or {}).get(key)) is not None}
        return {key: hidden_size if value is None else value for key, value in sizes.items()}


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp holds a family.

    architecture: its name in GGUF. splits: regex of a byte-level tokenizer, by the name of its pre-tokenizer in GGUF.
    rope_types: scalings of positions that it computes. interleaved: in queries and keys the two values that rotate
    together are neighbors; in transformers they are half a head apart. any_head_dim: heads may have another width than
    hidden_size // num_attention_heads.
    """

    architecture: str
    splits: Mapping[str, str]
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    interleaved: bool = False
    any_head_dim: bool = False


@dataclass(frozen=True, slots=True)
class PositionRule:
    """How positions of three axes (time, height, width) count media.

    steps_per_second: of the time axis in a video.
    text_follows_time: text after media continues after the largest position of all axes; else of height and width, so
        that it may go back in time.
    """

    steps_per_second: float
    text_follows_time: bool


@dataclass(frozen=True)
class ModelFamily:
    """One supported architecture.

    To add a family, add a file with its record, and a tiny random model to tests/families/.

    title: for people. model_type: in config.json, and of its text settings where they are a part of their own.
    classes: module of transformers with the classes of the model, of a decoder layer, and of its norms.
    """

    title: str
    model_type: str
    modeling: str
    model: str
    layer: str
    norm: str
    # Sizes by the part of a hub id that names them, in the order of SHAPE_KEYS; hub_id has a group `size`.
    hub_id: str
    sizes: Mapping[str, tuple[Any, ...]]
    biased: tuple[str, ...] = ()  # linears with a bias
    head_norms: bool = False  # queries and keys are normed per head
    # Whether `sliding_window` in config.json limits how far attention reaches back.
    window: Literal["never", "always", "if use_sliding_window"] = "never"
    linear_modules: tuple[str, ...] = LINEARS  # of a decoder layer: the targets of `lora.target_modules=all-linear`
    decoder: str = "model"  # full name of the module with embedding, layers and final norm
    head: str = "lm_head"  # full name of the output layer, which is never quantized
    end_of_turn: str = "<|im_end|>"
    # Nested settings in config.json: of the model that is loaded, and within it of its decoder.
    loaded_settings: tuple[str, ...] = ()
    decoder_settings: tuple[str, ...] = ()
    # From names in files to names in the model, in this order; None leaves a tensor out.
    renamed: tuple[tuple[str, str | None], ...] = ()
    opened_by: str = "AutoModelForCausalLM"  # class of transformers for a whole checkpoint
    task: str = "text-generation"  # on the hub
    # From names in the model to those that vLLM maps to its own; names without a rule it knows as they are.
    served: tuple[tuple[str, str], ...] = ()
    serves_towers: bool = False  # vLLM adapts the towers too, with --enable-tower-connector-lora
    companions: tuple[str, ...] = ()  # other files of a checkpoint, which are copied and never opened
    towers: Mapping[str, Tower] = field(default_factory=dict)  # by the word in `lora.towers`
    axes: int = 1  # of a position: 3 are time, height and width
    # Of media; steps_per_second as in transformers, unless config.json has them under this key.
    positions: PositionRule = PositionRule(steps_per_second=1, text_follows_time=True)
    steps_setting: tuple[str, ...] = ()
    gguf: Gguf | None = None  # None: llama.cpp has no such architecture

    def shapes(self) -> dict[str, dict[str, Any]]:
        """Return the shape of each size: the keys of SHAPE_KEYS, model_type, and `towers` if it has any."""
        known = {}
        for size, row in self.sizes.items():
            shape: dict[str, Any] = {"model_type": self.model_type, **dict(zip(SHAPE_KEYS, row, strict=True))}
            known[size] = shape | self.tower_shapes(shape["hidden_size"], size)
        return known

    def tower_shapes(
        self, hidden_size: int, size: str = "", config: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Return {"towers": sizes by name}, as `Tower.shape` does; {} without towers. config: from `text_settings`."""
        found = {
            name: tower.shape(hidden_size, size, (config or {}).get(tower.settings))
            for name, tower in self.towers.items()
        }
        return {"towers": found} if found else {}

    def shape_of_hub_id(self, name: str) -> dict[str, Any] | None:
        """Return the shape of a hub id of this family; None for another name."""
        match = re.fullmatch(rf"(?:.*/)?{self.hub_id}", name, re.IGNORECASE)
        return self.shapes().get(match["size"].upper()) if match else None

    def name_in_model(self, name: str) -> str | None:
        """Return the name in the model of a tensor in its files; None if the model leaves it out."""
        for pattern, replacement in self.renamed:
            if re.match(pattern, name):
                if replacement is None:
                    return None
                name = re.sub(pattern, replacement, name, count=1)
        return name

    def name_for_servers(self, name: str) -> str:
        """Return the name under which vLLM finds a module of the model in an adapter."""
        for pattern, replacement in self.served:
            name = re.sub(pattern, replacement, name, count=1)
        return name

    @property
    def tower_prefixes(self) -> tuple[str, ...]:
        """How the full names of all modules in towers begin."""
        return tuple(f"{tower.module}." for tower in self.towers.values())

    @property
    def tower_settings(self) -> tuple[str, ...]:
        """Nested settings of the towers in config.json."""
        return tuple(tower.settings for tower in self.towers.values())

    @property
    def placeholders(self) -> dict[str, str]:
        """The token that stands for one embedding, by kind of media."""
        return {kind: token for tower in self.towers.values() for kind, token in tower.placeholders.items()}

    def positions_of(self, config: Mapping[str, Any]) -> PositionRule:
        """Return how a model with this config.json counts media."""
        found: Any = config if self.steps_setting else None
        for key in (*self.loaded_settings, *self.steps_setting):
            found = found.get(key) if isinstance(found, Mapping) else None
        return self.positions if found is None else replace(self.positions, steps_per_second=found)

    @property
    def embedding(self) -> str:
        """The full name of the input embedding."""
        return f"{self.decoder}.embed_tokens"

    @property
    def final_norm(self) -> str:
        """The full name of the norm after the last decoder layer."""
        return f"{self.decoder}.norm"

    def layer_name(self, number: int) -> str:
        """Return the full name of a decoder layer."""
        return f"{self.decoder}.layers.{number}"

    def linear_path(self, number: int, linear: str) -> str:
        """Return the full name of a linear of a decoder layer."""
        return f"{self.layer_name(number)}.{'self_attn' if linear in ATTENTION else 'mlp'}.{linear}"
