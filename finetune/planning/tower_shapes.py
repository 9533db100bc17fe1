"""Parameters and operations of towers, from their sizes.

A unit is what a tower reads: a patch of an image or video, or a column of a spectrogram. A position is one of a layer.

Names: D width, I intermediate width, O hidden width of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.models.families import FAMILIES, Tower

# Of both towers: a token is 2 x 2 patches, or two strided steps over columns.
UNITS_PER_TOKEN = 4
_STRIDE, _KERNEL = 2, 3  # of the audio tower's convolutions


@dataclass(frozen=True)
class TowerShape:
    """Sizes of one tower.

    blocks: full name of its layers. linears: (out, in) features by name in a layer, of all that `lora.towers` adapts.
    layer_parameters, outer_parameters: of a layer, and of everything but layers.
    outer_flops: operations per unit outside the layers. values: that a unit has.
    units_per_position: 2 where a convolution halves the length. window: positions that attention reaches.
    full_layers: layers whose attention reaches all positions of a frame.
    """

    name: str
    blocks: str
    layers: int
    width: int
    inner: int
    heads: int
    linears: Mapping[str, tuple[int, int]]
    layer_parameters: int
    outer_parameters: int
    outer_flops: float
    values: int
    units_per_position: int
    window: int
    full_layers: int

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outer_parameters

    def products_per_unit(self) -> float:
        """Return the operations of a forward pass per unit, without attention."""
        weights = sum(map(math.prod, self.linears.values()))
        return self.outer_flops + self.layers * 2.0 * weights / self.units_per_position

    def attention_per_unit(self, reach: float) -> float:
        """Return the operations of attention in a forward pass per unit. reach: positions of a frame."""
        keys = self.full_layers * reach + (self.layers - self.full_layers) * min(self.window, reach)
        return 4.0 * self.width * keys / self.units_per_position


def tower_shapes(shape: Mapping[str, Any]) -> dict[str, TowerShape]:
    """Return the towers of a model by name; {} if it has none. shape: from `shape_of`."""
    known = FAMILIES[shape["model_type"]].towers if shape else {}
    build = {"vision": _vision, "audio": _audio}
    return {name: build[name](known[name], sizes) for name, sizes in shape.get("towers", {}).items()}


def _vision(tower: Tower, sizes: Mapping[str, Any]) -> TowerShape:
    width, inner, out = sizes["hidden_size"], sizes["intermediate_size"], sizes["out_hidden_size"]
    side, merged = sizes["patch_size"], sizes["hidden_size"] * sizes["spatial_merge_size"] ** 2
    linears = {
        "attn.qkv": (3 * width, width),
        **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.proj"), (width, width)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, width)),
        "mlp.down_proj": (width, inner),
    }
    linears = _of_tower(tower, linears)
    values = sizes["in_channels"] * sizes["temporal_patch_size"] * side**2
    merger = merged**2 + merged * out
    return TowerShape(
        name="vision",
        blocks=tower.blocks,
        layers=sizes["depth"],
        width=width,
        inner=inner,
        heads=sizes["num_heads"],
        linears=linears,
        layer_parameters=sum(n * (size + 1) for n, size in linears.values()) + 2 * width,  # biases and two norms
        outer_parameters=values * width + width + merger + merged + out,
        outer_flops=2.0 * (values * width + merger / sizes["spatial_merge_size"] ** 2),
        values=values,
        units_per_position=1,
        window=(sizes["window_size"] // side) ** 2,
        full_layers=len(sizes["fullatt_block_indexes"]),
    )


def _audio(tower: Tower, sizes: Mapping[str, Any]) -> TowerShape:
    width, inner, out, bins = (sizes[key] for key in ("d_model", "encoder_ffn_dim", "output_dim", "num_mel_bins"))
    linears = {
        **dict.fromkeys((f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")), (width, width)),
        "fc1": (inner, width),
        "fc2": (width, inner),
    }
    linears = _of_tower(tower, linears)
    convolutions = _KERNEL * width * (bins + width)
    # Keys have no bias; two norms of a layer and one after them have one.
    layer = sum(n * (size + 1) for n, size in linears.values()) - width + 4 * width
    return TowerShape(
        name="audio",
        blocks=tower.blocks,
        layers=sizes["encoder_layers"],
        width=width,
        inner=inner,
        heads=sizes["encoder_attention_heads"],
        linears=linears,
        layer_parameters=layer,
        # With the embeddings of the start and the end of sound.
        outer_parameters=convolutions + 2 * width + 2 * width + width * out + out + 2 * out,
        outer_flops=2.0 * (_KERNEL * width * (bins + width / _STRIDE) + width * out / UNITS_PER_TOKEN),
        values=bins,
        units_per_position=_STRIDE,
        window=sizes["n_window"],
        full_layers=0,
    )


def _of_tower(tower: Tower, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name: size for name, size in linears.items() if name.rpartition(".")[2] in tower.linears}
