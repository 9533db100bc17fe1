"""Memory and operations of towers, from the media that they read.

Frozen towers compute every file before training, are freed, and training reads their embeddings from a cache. Trained
ones, and all with `data.media_cache=false` or `data.stream_rows`, stay and run in each pass.

Tests compare the bytes with those of tensors that are alive in transformers' towers with PEFT's adapters.
Names: D width, I intermediate width, W head width, R rank, w bytes of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.planning.inputs import PlanInputs
from finetune.planning.static_memory import rank_of
from finetune.planning.tower_shapes import UNITS_PER_TOKEN, TowerShape

# numpy on the CPU: bytes per value of a patch, of bytes that become fp32; and per column, of a spectrum in fp64.
_READING_PATCH, _READING_COLUMN = 6.5, 7400.0


@dataclass(frozen=True, slots=True)
class TowerWork:
    """Operations of one tower.

    linear: weights of its largest linear. rows: positions of a file. reach: positions that full attention reaches.
    layer_passes: how often a layer runs, on one file at a time.
    """

    products: float
    attention: float
    linear: int
    rows: float
    reach: float
    layer_passes: float

    @property
    def flops(self) -> float:
        return self.products + self.attention


def work_bytes(inputs: PlanInputs) -> float:
    """Return the bytes alive while the largest file goes through its tower without gradients."""
    sizes = [inputs.media_load[name].largest * _forward_bytes(inputs, t) for name, t in inputs.towers.items()]
    return max(sizes, default=0.0)


def embeddings_bytes(inputs: PlanInputs, tokens: int) -> float:
    """Return the bytes of the embeddings of media among so many tokens."""
    share = min(1.0, sum(load.share(tokens) for load in inputs.media_load.values()))
    return share * tokens * inputs.shape["hidden_size"] * inputs.value_bytes


def activation_bytes(inputs: PlanInputs, tokens: int) -> float:
    """Return the bytes that trained towers keep for backward, of the media among so many tokens."""
    return sum(
        inputs.media_load[name].share(tokens) * tokens * UNITS_PER_TOKEN * kept_per_unit(inputs, inputs.towers[name])
        for name in inputs.trained_towers
    )


def backward_bytes(inputs: PlanInputs) -> float:
    """Return the temporaries of a trained tower's backward pass of the largest file: of attention, or of an MLP."""
    sizes = [0.0]
    for name in inputs.trained_towers:
        tower = inputs.towers[name]
        positions = inputs.media_load[name].largest / tower.units_per_position
        sizes.append(positions * max(18 * tower.width, 4 * tower.inner))
    return max(sizes)


def _forward_bytes(inputs: PlanInputs, tower: TowerShape) -> float:
    """Return the bytes alive per unit in a pass without gradients, or while numpy reads the file."""
    width, w, inner, values = tower.width, inputs.value_bytes, tower.inner, tower.values
    on_cpu = inputs.device_type == "cpu"
    if tower.name == "audio":  # in 16 bit, the mask and both convolutions of a column included
        computed = 3 * w * values + 14 + w * max(5.44 * width, 2.44 * width + inner)
        return max(computed, _READING_COLUMN if on_cpu else 0.0)
    # Pixels in fp32 and their copy; cosine and sine in fp32. Queries and keys rotate in fp32.
    pixels = (4 + (w if w < 4 else 0)) * values
    rotating = (5 * w + (24 if w < 4 else 16)) * width
    computed = pixels + 8 * width / tower.heads + max(rotating, 3 * w * (width + inner))
    return max(computed, _READING_PATCH * values if on_cpu else 0.0)


def kept_per_unit(inputs: PlanInputs, tower: TowerShape) -> float:
    """Return the bytes per unit that a tower with adapters keeps for backward, as PEFT's modules do.

    Each adapted linear keeps its input in fp32, unless A is frozen; in an fp32 model, linears share it.
    """
    width, inner, w, lora = tower.width, tower.inner, inputs.value_bytes, inputs.lora
    vision = tower.name == "vision"
    of_width = len(tower.linears) - 1  # all but the second one of the MLP
    inputs_kept = 0.0 if lora.freeze_a else 4 * width * (of_width if w < 4 else 2) + 4 * inner
    if lora.dropout:  # masks, and in an fp32 model copies that are not shared
        mask = 1 if inputs.on_gpu else 4
        inputs_kept = ((0 if lora.freeze_a else 4) + mask) * (width * of_width + inner)
    norms = (8 if vision else 2 * w) * width
    # One product for queries, keys and values is kept whole beside the rotated ones.
    attention = (6 if "attn.qkv" in tower.linears else 4) * w * width
    mlp = (3 if vision else 1) * w * inner
    factors = 4 * sum(rank_of(f"{tower.blocks}.0.{name}", lora) for name in tower.linears)
    layer = inputs_kept + norms + attention + mlp + factors + 4 * tower.heads + 8
    # The merger, and cosine and sine.
    rest = (4 + w) * width + 8 * width / tower.heads if vision else w * width / 2
    return (tower.layers * layer + rest) / tower.units_per_position


def step_passes(inputs: PlanInputs) -> list[TowerWork]:
    """Return the work of towers in an optimizer step on one rank; [] if they run before training.

    The backward pass of a trained tower costs as much as forward: gradients of inputs, and thin adapters.
    """
    if not inputs.towers_stay:
        return []
    tokens = inputs.step_sequences * inputs.sequence.rows
    return [
        _work(inputs, name, load.mean_share * tokens * (2 if name in inputs.trained_towers else 1))
        for name, load in inputs.media_load.items()
        if load.mean_share
    ]


def first_passes(inputs: PlanInputs, epoch_tokens: int | None) -> list[TowerWork]:
    """Return the work of frozen towers before training; [] if they run in each step. Arguments as `media_tokens`."""
    if inputs.towers_stay:
        return []
    return [_work(inputs, name, tokens) for name, tokens in media_tokens(inputs, epoch_tokens).items() if tokens]


def cached_bytes(inputs: PlanInputs, epoch_tokens: int | None) -> float:
    """Return the bytes on disk of the embeddings that frozen towers compute. Arguments as `media_tokens`."""
    if inputs.trained_towers or not inputs.data.media_cache:
        return 0.0
    return sum(media_tokens(inputs, epoch_tokens).values()) * inputs.shape["hidden_size"] * inputs.value_bytes


def media_tokens(inputs: PlanInputs, epoch_tokens: int | None) -> dict[str, float]:
    """Return the tokens of distinct files by tower; {} if they are unknown.

    epoch_tokens: of all rows, if these are unknown; None if their number is unknown too. All files are different.
    """
    found: dict[str, float] = {}
    for name, load in inputs.media_load.items():
        if load.tokens is not None:
            found[name] = load.tokens
        elif epoch_tokens is not None:
            found[name] = load.mean_share * epoch_tokens
    return found


def _work(inputs: PlanInputs, name: str, tokens: float) -> TowerWork:
    """Return the operations of a forward pass of media with so many tokens."""
    tower, load = inputs.towers[name], inputs.media_load[name]
    units = tokens * UNITS_PER_TOKEN
    return TowerWork(
        products=units * tower.products_per_unit(),
        attention=units * tower.attention_per_unit(load.reach),
        linear=tower.width * tower.inner,
        rows=max(1.0, load.largest / tower.units_per_position),
        reach=load.reach,
        layer_passes=tower.layers * units / max(1, load.largest),
    )
