"""Which settings make a run fit, which of those are fastest, and how long a sequence may be on which device."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.activations import plan_activations
from finetune.planning.auto_batch import derive_micro_batch, foresee, recomputed_layers_of
from finetune.planning.flops import step_work
from finetune.planning.peak_memory import Footprint, predict
from finetune.planning.timing import Rates, assumed_effort, step_seconds
from finetune.system.format import format_bytes

BUDGETS_GB = (8, 12, 16, 24, 48, 80)
_STEP_TOKENS = 64
# Beyond it no Qwen2.5 reads (YaRN); a plan says that so many fit, not how many more would.
LONGEST = 131_072
_SHOWN_CHANGES = 4


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that lower what a run needs. overrides: as on the command line. saved_bytes: of what is needed."""

    overrides: tuple[str, ...]
    saved_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """overrides: as on the command line, ready to paste. seconds_per_token: predicted; None where nothing is known."""

    overrides: tuple[str, ...]
    footprint: Footprint
    seconds_per_token: float | None


def describe_change(change: Change) -> str:
    """One line."""
    alone = "" if change.fits else " (not enough by itself)"
    return f"  {' '.join(change.overrides)} saves {format_bytes(change.saved_bytes)}{alone}"


def changes_that_fit(
    cfg: RunConfig, shape: Mapping[str, Any], ranks: int, device_type: str, free_bytes: float
) -> list[Change]:
    """The smallest changes that make a run fit, the one that alters least first; where none does alone, what each saves
    and all that it takes together.
    """
    needed = foresee(cfg, shape, ranks, device_type, free_bytes).needed_bytes
    singles, together = [], cfg
    combined: list[str] = []
    joint: Change | None = None
    for overrides, changed in _candidates(cfg, shape, ranks, device_type, free_bytes):
        left = foresee(changed, shape, ranks, device_type, free_bytes).needed_bytes
        if left < needed:
            singles.append(Change(overrides, needed - left, left <= free_bytes))
            if joint is None:
                together, combined = _merged(together, changed, overrides), [*combined, *overrides]
                left = foresee(together, shape, ranks, device_type, free_bytes).needed_bytes
                if left <= free_bytes and len(singles) > 1:
                    joint = Change(tuple(combined), needed - left, True)
    found = [change for change in singles if change.fits][:_SHOWN_CHANGES]
    if found:
        return found
    if joint is None:
        smaller = _smaller_model(cfg, ranks, device_type, free_bytes)
        joint = None if smaller is None else Change(smaller[0], needed - smaller[1], True)
    return [*([joint] if joint else []), *sorted(singles, key=lambda change: -change.saved_bytes)[:_SHOWN_CHANGES]]


def _smaller_model(
    cfg: RunConfig, ranks: int, device_type: str, free_bytes: float
) -> tuple[tuple[str, ...], float] | None:
    """The largest Qwen2.5 that fits with these settings, as an override, and what it needs."""
    instruct = "-instruct" if "instruct" in cfg.model.name.lower() else ""
    for size, shape in reversed(QWEN25_SHAPES.items()):
        needed = foresee(cfg, shape, ranks, device_type, free_bytes).needed_bytes
        if needed <= free_bytes:
            return (f"model=qwen2.5-{size.lower()}{instruct}",), needed
    return None


def _candidates(
    cfg: RunConfig, shape: Mapping[str, Any], ranks: int, device_type: str, free_bytes: float
) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Changes from what costs nothing in the result to what does."""
    if cfg.quant.keep_dequantized:
        yield ("quant.keep_dequantized=false",), _with(cfg, quant={"keep_dequantized": False})
    if cfg.train.micro_batch_size not in (None, 1):
        yield ("train.micro_batch_size=1",), _with(cfg, train={"micro_batch_size": 1})
    if cfg.train.gradient_checkpointing not in ("auto", "all", "offload"):
        yield ("train.gradient_checkpointing=all",), _with(cfg, train={"gradient_checkpointing": "all"})
    if cfg.train.kernels == "peft":
        yield ("train.kernels=fused",), _with(cfg, train={"kernels": "fused"})
    if cfg.train.gradient_checkpointing != "offload" and device_type == "cuda":
        yield ("train.gradient_checkpointing=offload",), _with(cfg, train={"gradient_checkpointing": "offload"})
    teacher = cfg.distill.teacher
    if cfg.asks_teacher and teacher.placement == "resident":
        streamed = cfg.distill.model_copy(update={"teacher": teacher.model_copy(update={"placement": "streamed"})})
        yield ("distill.teacher.placement=streamed",), cfg.model_copy(update={"distill": streamed})
    if not cfg.quant.double and cfg.quant.type == "nf4":
        yield ("quant.double=true",), _with(cfg, quant={"double": True})
    if cfg.quant.type in ("none", "int8"):
        yield ("quant.type=nf4",), _with(cfg, quant={"type": "nf4"})
    shorter = longest_that_fits(cfg, shape, device_type, free_bytes, ranks)
    if shorter and shorter < cfg.data.max_length:
        yield (f"data.max_length={shorter}",), _with(cfg, data={"max_length": shorter})
    elif cfg.data.max_length > 2 * _STEP_TOKENS:
        half = cfg.data.max_length // 2
        yield (f"data.max_length={half}",), _with(cfg, data={"max_length": half})
    if cfg.lora.modules_to_save:
        yield ("lora.modules_to_save=[]",), _with(cfg, lora={"modules_to_save": []})
    if cfg.lora.rank > 8:
        yield ("lora.rank=8",), _with(cfg, lora={"rank": 8})
    if cfg.lora.target_modules != ["q_proj", "v_proj"]:
        narrow = {"target_modules": ["q_proj", "v_proj"]}
        yield ("'lora.target_modules=[q_proj,v_proj]'",), _with(cfg, lora=narrow)


def _with(cfg: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """The config with some settings changed; they are legal, so nothing is validated again."""
    changed = {name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    return cfg.model_copy(update=changed)


def _merged(before: RunConfig, change: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """`before` with the sections' settings that a change touches."""
    for override in overrides:
        section, key = override.strip("'").partition("=")[0].split(".")[:2]
        value = getattr(getattr(change, section), key)
        before = _with(before, **{section: {key: value}})
    return before


def longest_that_fits(
    cfg: RunConfig, shape: Mapping[str, Any], device_type: str, free_bytes: float, ranks: int = 1
) -> int:
    """Tokens of the longest sequence, a multiple of 64, when as much is recomputed as the config allows; 0 if none."""

    def needed(steps: int) -> float:
        tokens = steps * _STEP_TOKENS
        changed = _with(cfg, data={"max_length": tokens}, train={"micro_batch_size": 1})
        return _leanest(changed, shape, device_type, ranks).needed_bytes

    return _STEP_TOKENS * bisect_right(range(1, LONGEST // _STEP_TOKENS + 1), free_bytes, key=needed)


def _leanest(cfg: RunConfig, shape: Mapping[str, Any], device_type: str, ranks: int) -> Footprint:
    """One sequence a forward pass, with the number of recomputed layers that takes least."""
    count = recomputed_layers_of(cfg, plan_activations(shape, cfg, 1, device_type), free_bytes=0.0)
    return predict(cfg, shape, device_type, 1, count, ranks=ranks)


def length_table(cfg: RunConfig, device_type: str = "cuda") -> dict[str, dict[int, int]]:
    """Longest packed sequence for each Qwen2.5 size and budget in GB, with the config's adapter and quantization."""
    return {
        size: {budget: longest_that_fits(cfg, shape, device_type, budget * 1e9) for budget in BUDGETS_GB}
        for size, shape in QWEN25_SHAPES.items()
    }


def fastest_that_fits(
    cfg: RunConfig, shape: Mapping[str, Any], ranks: int, device_type: str, free_bytes: float, rates: Rates | None
) -> Settings | None:
    """The settings that take the least time a token of those that fit, the config's own among them: recomputed layers,
    sequences a forward pass, a resident base; and a shorter sequence where the one asked for does not fit. None if
    nothing does.
    """
    fitting = []
    for tried in _ways(cfg, shape, ranks, device_type, free_bytes):
        found = foresee(tried, shape, ranks, device_type, free_bytes)
        if found.needed_bytes <= free_bytes:
            fitting.append((cost_of_token(tried, shape, found, ranks, rates), tried, found))
    if not fitting:
        return None
    cost, chosen, found = min(fitting, key=lambda way: way[0])
    length, recompute = chosen.data.max_length, chosen.train.gradient_checkpointing
    overrides = (
        *((f"data.max_length={length}",) if length != cfg.data.max_length else ()),
        f"train.micro_batch_size={found.micro_batch}",
        f"train.gradient_checkpointing={(found.recomputed or 'none') if recompute == 'auto' else recompute}",
        *((f"quant.keep_dequantized={str(chosen.quant.keep_dequantized).lower()}",) if cfg.quant.type == "nf4" else ()),
    )
    return Settings(overrides, found, None if rates is None else cost)


def _ways(
    cfg: RunConfig, shape: Mapping[str, Any], ranks: int, device_type: str, free_bytes: float
) -> Iterator[RunConfig]:
    """What could be fastest: the config as it is, and what changes how it computes but not what it learns, at its
    length or, where nothing of that fits, the longest that does.
    """
    yield cfg
    freely = _with(cfg, train={"gradient_checkpointing": "auto"})
    longest = longest_that_fits(freely, shape, device_type, free_bytes, ranks)
    freely = _with(freely, data={"max_length": min(cfg.data.max_length, longest or _STEP_TOKENS)})
    # Without a micro-batch of its own; derive_micro_batch gives the most that is of use.
    most = derive_micro_batch(_with(freely, train={"micro_batch_size": None}), ranks, device_type)
    for resident in (False, True) if cfg.quant.type == "nf4" else (False,):
        for micro in sorted({most, *(2**power for power in range(most.bit_length()))}):
            yield _with(freely, quant={"keep_dequantized": resident}, train={"micro_batch_size": micro})


def cost_of_token(cfg: RunConfig, shape: Mapping[str, Any], found: Footprint, ranks: int, rates: Rates | None) -> float:
    """What a training token costs with the settings of a footprint: seconds by measured rates, or else operations."""
    work = step_work(cfg, shape, found.micro_batch, found.recomputed, ranks=ranks)
    tokens = math.ceil(cfg.train.batch_size / ranks) * cfg.data.max_length
    if rates is None:
        return assumed_effort(work, shape, found.device_type) / tokens
    return sum(step_seconds(work, shape, rates, cfg.data.max_length).values()) / tokens
