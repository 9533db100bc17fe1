"""Settings that make a run fit, the fastest of them, and the longest sequence per device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.models.families import QWEN25_SHAPES
from finetune.planning.activations import plan_activations
from finetune.planning.auto_batch import estimate_memory, largest_micro_batch, recomputed_layers
from finetune.planning.flops import step_work
from finetune.planning.inputs import PlanInputs
from finetune.planning.peak_memory import PeakMemory, predict_peak
from finetune.planning.timing import Rates, assumed_effort, step_seconds
from finetune.system.format import format_bytes

BUDGETS_GB = (8, 12, 16, 24, 48, 80)
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


@dataclass(frozen=True, slots=True)
class Settings:
    """overrides: as on the command line. seconds_per_token: None without measured rates."""

    overrides: tuple[str, ...]
    memory: PeakMemory
    seconds_per_token: float | None


def describe_change(change: Change) -> str:
    """Return a change as one line of text."""
    alone = "" if change.fits else " (not enough by itself)"
    return f"  {' '.join(change.overrides)} saves {format_bytes(change.saved_bytes)}{alone}"


def changes_that_fit(inputs: PlanInputs, free_bytes: float) -> list[Change]:
    """Find the smallest changes that make a run fit, the one that alters least first.

    Returns: changes that fit alone; if there are none, all that fit together, then what each saves.
    """
    needed = estimate_memory(inputs, free_bytes).needed_bytes
    singles: list[Change] = []
    together, combined, joint = inputs, (), None
    for overrides, changed in _candidates(inputs, free_bytes):
        left = estimate_memory(changed, free_bytes).needed_bytes
        if left >= needed:
            continue
        singles.append(Change(overrides, needed - left, left <= free_bytes))
        if joint is None:
            together, combined = _merged(together, changed, overrides), (*combined, *overrides)
            left = estimate_memory(together, free_bytes).needed_bytes
            if left <= free_bytes and len(singles) > 1:
                joint = Change(combined, needed - left, True)
    if found := [change for change in singles if change.fits]:
        return found[:_SHOWN_CHANGES]
    joint = joint or _smaller_model(inputs, free_bytes, needed)
    return [*([joint] if joint else []), *sorted(singles, key=lambda change: -change.saved_bytes)[:_SHOWN_CHANGES]]


def _smaller_model(inputs: PlanInputs, free_bytes: float, needed: float) -> Change | None:
    """The largest packaged model that fits with these settings. needed: bytes of the run as it is."""
    instruct = "-instruct" if "instruct" in inputs.model.name.lower() else ""
    for size, shape in reversed(QWEN25_SHAPES.items()):
        left = estimate_memory(replace(inputs, shape=shape), free_bytes).needed_bytes
        if left <= free_bytes:
            return Change((f"model=qwen2.5-{size.lower()}{instruct}",), needed - left, True)
    return None


def _candidates(inputs: PlanInputs, free_bytes: float) -> Iterator[tuple[tuple[str, ...], PlanInputs]]:
    """Changes, from those that do not alter the result to those that do."""
    quant, train, lora, length = inputs.quant, inputs.train, inputs.lora, inputs.data.max_length

    def change(section: str, key: str, value: Any, text: str | None = None) -> tuple[tuple[str, ...], PlanInputs]:
        return (text or f"{section}.{key}={value}",), inputs.with_settings(**{section: {key: value}})

    if quant.keep_dequantized:
        yield change("quant", "keep_dequantized", False, "quant.keep_dequantized=false")
    if train.micro_batch_size not in (None, 1):
        yield change("train", "micro_batch_size", 1)
    if train.gradient_checkpointing not in ("auto", "all", "offload"):
        yield change("train", "gradient_checkpointing", "all")
    if train.kernels == "peft":
        yield change("train", "kernels", "fused")
    if train.gradient_checkpointing != "offload" and inputs.device_type == "cuda":
        yield change("train", "gradient_checkpointing", "offload")
    if inputs.has_teacher and inputs.distill.teacher.placement == "resident":
        streamed = inputs.distill.teacher.model_copy(update={"placement": "streamed"})
        yield change("distill", "teacher", streamed, "distill.teacher.placement=streamed")
    if not quant.double and quant.type == "nf4":
        yield change("quant", "double", True, "quant.double=true")
    if quant.type in ("none", "int8"):
        yield change("quant", "type", "nf4")
    shorter = longest_that_fits(inputs, free_bytes)
    if shorter and shorter < length:
        yield change("data", "max_length", shorter)
    elif length > 2 * _STEP_TOKENS:
        yield change("data", "max_length", length // 2)
    if lora.modules_to_save:
        yield change("lora", "modules_to_save", [])
    if lora.rank > 8:
        yield change("lora", "rank", 8)
    if lora.target_modules != ["q_proj", "v_proj"]:
        yield change("lora", "target_modules", ["q_proj", "v_proj"], "'lora.target_modules=[q_proj,v_proj]'")


def _merged(before: PlanInputs, change: PlanInputs, overrides: tuple[str, ...]) -> PlanInputs:
    """`before` with the settings that a change touches."""
    for override in overrides:
        section, key = override.strip("'").partition("=")[0].split(".")[:2]
        before = before.with_settings(**{section: {key: getattr(getattr(change, section), key)}})
    return before


def longest_that_fits(inputs: PlanInputs, free_bytes: float) -> int:
    """Return the tokens of the longest sequence that fits, a multiple of 64; 0 if none does.

    One sequence per forward pass, with the most gradient checkpointing that the config allows.
    """

    def needed(steps: int) -> float:
        tried = inputs.with_settings(data={"max_length": steps * _STEP_TOKENS}, train={"micro_batch_size": 1})
        count = recomputed_layers(tried, plan_activations(tried, 1), free_bytes=0.0)
        return predict_peak(tried, 1, count).needed_bytes

    return _STEP_TOKENS * bisect_right(range(1, LONGEST // _STEP_TOKENS + 1), free_bytes, key=needed)


def length_table(inputs: PlanInputs) -> dict[str, dict[int, int]]:
    """Return the longest packed sequence per packaged model size and memory in GB."""
    return {
        size: {gb: longest_that_fits(replace(inputs, shape=shape), gb * 1e9) for gb in BUDGETS_GB}
        for size, shape in QWEN25_SHAPES.items()
    }


def fastest_that_fits(inputs: PlanInputs, free_bytes: float, rates: Rates | None) -> Settings | None:
    """Find the settings with the least time per token that fit.

    Gradient checkpointing, micro-batch and `quant.keep_dequantized` may change; the length only if nothing else fits.

    Returns: None if nothing fits.
    """
    fitting = []
    for tried in _ways(inputs, free_bytes):
        memory = estimate_memory(tried, free_bytes)
        if memory.needed_bytes <= free_bytes:
            fitting.append((cost_of_token(tried, memory, rates), tried, memory))
    if not fitting:
        return None
    cost, chosen, memory = min(fitting, key=lambda way: way[0])
    length, recompute = chosen.data.max_length, chosen.train.gradient_checkpointing
    overrides = [f"data.max_length={length}"] if length != inputs.data.max_length else []
    overrides.append(f"train.micro_batch_size={memory.micro_batch}")
    overrides.append(
        f"train.gradient_checkpointing={(memory.recomputed or 'none') if recompute == 'auto' else recompute}"
    )
    if inputs.quant.type == "nf4":
        overrides.append(f"quant.keep_dequantized={str(chosen.quant.keep_dequantized).lower()}")
    return Settings(tuple(overrides), memory, None if rates is None else cost)


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


def cost_of_token(inputs: PlanInputs, memory: PeakMemory, rates: Rates | None) -> float:
    """Return the cost of a training token: seconds with measured rates, else operations."""
    work = step_work(inputs, memory.micro_batch, memory.recomputed)
    tokens = inputs.rank_sequences * inputs.data.max_length
    if rates is None:
        return assumed_effort(inputs, work) / tokens
    return sum(step_seconds(inputs, work, rates, inputs.data.max_length).values()) / tokens
