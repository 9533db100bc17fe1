"""Settings that make a run fit, the fastest of them, and the longest sequence per device."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from finetune.models.families import QWEN25_SHAPES, ModelFamily
from finetune.planning.activations import plan_activations
from finetune.planning.auto_batch import estimate_memory, largest_micro_batch, place_embedding, recomputed_layers
from finetune.planning.inputs import PlanInputs
from finetune.planning.peak_memory import PeakMemory, predict_peak
from finetune.planning.static_memory import parameters_of
from finetune.planning.timing import Rates, cost_of_token
from finetune.system.format import format_bytes
from finetune.system.resources import packaged

BUDGETS_GB = (8, 12, 16, 24, 48, 80, 141)
_STEP_TOKENS = 64
# The longest sequence that the models support (YaRN): the search ends here.
LONGEST = 131_072
_SHOWN_CHANGES = 4


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that lower the needed memory. overrides: as on the command line. saved_bytes: of the needed bytes."""

    overrides: tuple[str, ...]
    saved_bytes: float
    fits: bool

    def __str__(self) -> str:
        alone = "" if self.fits else " (not enough by itself)"
        return f"{' '.join(self.overrides)} saves {format_bytes(self.saved_bytes)}{alone}"


def changes_that_fit(inputs: PlanInputs, free_bytes: float) -> list[Change]:
    """Find the smallest changes that make a run fit, the one that alters least first.

    Returns: changes that fit alone; if there are none, all that fit together, then what each saves.
    """
    needed = estimate_memory(inputs, free_bytes).needed_bytes
    singles: list[Change] = []
    together, joint = inputs, None
    for override in _candidates(inputs, free_bytes):
        left = estimate_memory(_changed(inputs, override), free_bytes).needed_bytes
        if left >= needed:
            continue
        singles.append(Change((override,), needed - left, left <= free_bytes))
        if joint is None:
            together = _changed(together, override)
            left = estimate_memory(together, free_bytes).needed_bytes
            if left <= free_bytes and len(singles) > 1:
                joint = Change(tuple(word for single in singles for word in single.overrides), needed - left, True)
    if found := [change for change in singles if change.fits]:
        return found[:_SHOWN_CHANGES]
    joint = joint or _smaller_model(inputs, free_bytes, needed)
    return [*([joint] if joint else []), *sorted(singles, key=lambda change: -change.saved_bytes)[:_SHOWN_CHANGES]]


def _smaller_model(inputs: PlanInputs, free_bytes: float, needed: float) -> Change | None:
    """The largest packaged model of the series that fits with these settings. needed: bytes of the run as it is."""
    models = packaged_models(inputs.family)
    title = _series(inputs.family.title) | ({"instruct"} & _series(inputs.model.name))
    wanted = next((series for series in map(_series, models) if series == _series(inputs.model.name)), title)
    for option, shape in models.items():
        left = estimate_memory(replace(inputs, shape=shape), free_bytes).needed_bytes
        if _series(option) == wanted and left <= free_bytes:
            return Change((f"model={option}",), needed - left, True)
    return None


def packaged_models(family: ModelFamily) -> dict[str, Mapping[str, Any]]:
    """Return the shapes of the packaged models of a family by their option of `model`, the largest first."""
    files = packaged("configs").glob("model/*.yaml")
    names = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["name"] for file in sorted(files)}
    shapes = {option: shape for option, name in names.items() if (shape := family.shape_of_hub_id(name)) is not None}
    return dict(sorted(shapes.items(), key=lambda item: -parameters_of(item[1])))


def _series(name: str) -> set[str]:
    """Return the words of a model's name without its size and version."""
    words = re.split(r"[ -]", name.lower().rstrip("/").rpartition("/")[2])
    return {word for word in words if not re.fullmatch(r"v?[\d.]+b?", word)}


def _candidates(inputs: PlanInputs, free_bytes: float) -> list[str]:
    """Return the overrides that may help, from those that do not alter the result to those that do."""
    quant, train, lora, length = inputs.quant, inputs.train, inputs.lora, inputs.data.max_length
    recompute, on_gpu = train.gradient_checkpointing, inputs.on_gpu
    resident = inputs.has_teacher and inputs.distill.teacher.placement == "resident"
    longest = longest_that_fits(inputs, free_bytes)
    shorter = longest if 0 < longest < length else length // 2
    overrides = {
        "quant.keep_dequantized=false": quant.keep_dequantized,
        "train.micro_batch_size=1": train.micro_batch_size not in (None, 1),
        "train.gradient_checkpointing=all": recompute not in ("auto", "all", "offload"),
        "train.kernels=fused": train.kernels == "peft",
        "model.embedding=host": inputs.model.embedding == "device" and inputs.can_move_embedding,
        "train.gradient_checkpointing=offload": recompute != "offload" and on_gpu,
        "distill.teacher.placement=streamed": resident,
        "quant.double=true": not quant.double and quant.type == "nf4",
        "quant.type=nf4": quant.type in ("none", "int8"),
        "parallel.offload=true": inputs.shard_ranks > 1 and inputs.parallel.shard != "auto" and not inputs.base_on_host,
        f"data.max_length={shorter}": 0 < longest < length or length > 2 * _STEP_TOKENS,
        "lora.modules_to_save=[]": lora.modules_to_save,
        "lora.rank=8": lora.rank > 8,
        "'lora.target_modules=[q_proj,v_proj]'": lora.target_modules != ["q_proj", "v_proj"],
    }
    return [override for override, helps in overrides.items() if helps]


def _changed(inputs: PlanInputs, override: str) -> PlanInputs:
    key, _, text = override.strip("'").partition("=")
    section, name, *inner = key.split(".")
    value = yaml.safe_load(text)
    if inner:
        value = getattr(getattr(inputs, section), name).model_copy(update={inner[0]: value})
    return inputs.with_settings(**{section: {name: value}})


def longest_that_fits(inputs: PlanInputs, free_bytes: float) -> int:
    """Return the tokens of the longest sequence that fits, a multiple of 64; 0 if none does.

    One sequence per forward pass, with the most gradient checkpointing that the config allows.
    """

    def needed(steps: int) -> float:
        tried = inputs.with_settings(data={"max_length": steps * _STEP_TOKENS}, train={"micro_batch_size": 1})
        count = recomputed_layers(tried, plan_activations(tried, 1), free_bytes=0.0)
        return predict_peak(place_embedding(tried, 0.0), 1, count).needed_bytes

    return _STEP_TOKENS * bisect_right(range(1, LONGEST // _STEP_TOKENS + 1), free_bytes, key=needed)


def length_table(inputs: PlanInputs) -> dict[str, dict[int, int]]:
    """Return the longest packed sequence per packaged model size and memory in GB."""
    return {
        size: {gb: longest_that_fits(replace(inputs, shape=shape), gb * 1e9) for gb in BUDGETS_GB}
        for size, shape in QWEN25_SHAPES.items()
    }


def fastest_that_fits(
    inputs: PlanInputs, free_bytes: float, rates: Rates | None
) -> tuple[tuple[str, ...], PeakMemory, PlanInputs] | None:
    """Find the settings with the least time per token that fit.

    Gradient checkpointing, micro-batch and `quant.keep_dequantized` may change; the length only if nothing else fits.

    Returns: overrides as on the command line, the memory with them, and the run with them; None if nothing fits.
    """
    fitting = []
    for tried in _ways(inputs, free_bytes):
        memory = estimate_memory(tried, free_bytes)
        if memory.needed_bytes <= free_bytes:
            fitting.append((cost_of_token(tried, memory, rates), tried, memory))
    if not fitting:
        return None
    _, chosen, memory = min(fitting, key=lambda way: way[0])
    length, recompute = chosen.data.max_length, chosen.train.gradient_checkpointing
    if recompute == "auto":
        recompute = memory.recomputed or "none"
    overrides = [f"data.max_length={length}"] if length != inputs.data.max_length else []
    overrides += [f"train.micro_batch_size={memory.micro_batch}", f"train.gradient_checkpointing={recompute}"]
    if inputs.quant.type == "nf4":
        overrides.append(f"quant.keep_dequantized={str(chosen.quant.keep_dequantized).lower()}")
    return tuple(overrides), memory, chosen


def _ways(inputs: PlanInputs, free_bytes: float) -> Iterator[PlanInputs]:
    """The run as it is, then variants that compute the same in other ways; shorter sequences if none of those fits."""
    yield inputs
    auto = inputs.with_settings(train={"gradient_checkpointing": "auto"})
    longest = longest_that_fits(auto, free_bytes)
    auto = auto.with_settings(data={"max_length": min(inputs.data.max_length, longest or _STEP_TOKENS)})
    most = largest_micro_batch(auto.with_settings(train={"micro_batch_size": None}))
    for keep_dequantized in (False, True) if inputs.quant.type == "nf4" else (False,):
        for micro in sorted({most, *(2**power for power in range(most.bit_length()))}):
            yield auto.with_settings(quant={"keep_dequantized": keep_dequantized}, train={"micro_batch_size": micro})
