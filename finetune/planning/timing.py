"""Time of a training step and of a run, from the step's work and the machine's rates.

Rates are measured once (`finetune plan calibrate=true`), given (`tflops=N`), or assumed from data sheets.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.command_options import PlanOptions
from finetune.config.schema import SourceConfig
from finetune.planning.communication import link_of, sent_bytes, waiting_seconds
from finetune.planning.flops import StepWork, step_work
from finetune.planning.gpus import link_bytes_of, peak_of
from finetune.planning.inputs import PlanInputs
from finetune.planning.peak_memory import PeakMemory
from finetune.planning.sampling import sampling_work
from finetune.planning.towers import TowerWork, cached_bytes, first_passes
from finetune.system.atomic import write_text
from finetune.system.console import log_once
from finetune.system.machine import usable_cores
from finetune.system.resources import cache_home
from finetune.system.sealed import seal, unseal

# Share of a data sheet's peak that products reach: an assumption, named in the output.
_ASSUMED_SHARE = 0.45
_ASSUMED_GPU_PEAK = 100e12
# bf16 operations per second of one CPU core with AVX-512 and without AMX: an assumption. A core with AVX2 reaches
# 8.5e10 in fp32 (measured).
_ASSUMED_CORE = 1e11
# Time of everything else per second of products: an assumption (benchmarks/NOTES.md: products are two thirds of a step
# on two cores).
_ASSUMED_REST = {"cpu": 0.5, "gpu": 0.2}
# Assumed cost of a dequantized weight and of a layer's pass, in operations of products: the operations of 100 tokens
# with that weight; 0.2 ms of launches at 45 TFLOP/s, 1 ms of Python at 100 GFLOP/s.
_ASSUMED_DEQUANTIZED, _ASSUMED_PASS = 200.0, {"gpu": 1e10, "cpu": 1e8}
# Rows of a product that take as long as reading its matrix in 16 bit: a pass of fewer rows is not faster. Assumed, by
# data sheets of GPUs.
_READING_ROWS = {"cpu": 8, "gpu": 200}
_LAYOUT = 2
# Bytes of a text file per token: English chat rows in JSON with Qwen2.5's vocabulary (GSM8K: 4.3).
BYTES_PER_TOKEN = 4.3
_TEXT_FILES = (".jsonl", ".json", ".csv")


@dataclass(frozen=True, slots=True)
class Rates:
    """Work per second of a machine.

    device: name of what was measured. products: [weights of the matrix, rows, operations], on a grid of both.
    attention: [document tokens, operations]. elementwise: values [T, I] of a layer, forward and backward.
    dequantized: [weights of the matrix, weights]. logits: values. trained: values of the optimizer.
    layer_seconds: fixed cost of one pass of a layer.
    """

    device: str
    products: list[list[float]]
    attention: list[list[float]]
    elementwise: float
    dequantized: list[list[float]]
    logits: float
    trained: float
    layer_seconds: float
    layout: int = _LAYOUT


def estimate_time(
    inputs: PlanInputs, memory: PeakMemory, *, rates: Rates | None, options: PlanOptions, gpu_name: str | None
) -> dict[str, Any]:
    """Estimate the time of a run.

    Args:
        memory: the run's prediction, with the micro-batch and the number of recomputed layers.
        rates: measured rates; None if there are none or the options replace them.
        gpu_name: None for a CPU or an unknown GPU.

    Returns:
        Figures of `finetune plan --json`. "steps" and "total_seconds" are None if the number of tokens is unknown;
        "media_seconds" of frozen towers, which run once before the first step, is part of the total.
    """
    work = step_work(inputs, memory.micro_batch, memory.recomputed)
    epoch_tokens = options.tokens or tokens_in_files(inputs.data.train)
    media = first_passes(inputs, epoch_tokens)
    if rates is not None:
        media_seconds = sum(tower_seconds(each, rates) for each in media)
        ceiling, source = 0.0, f"measured on {rates.device}"
    else:
        ceiling, source = assumed_ceiling(inputs.device_kind, gpu_name)
        here = options.gpu is None and options.gpu_gb is None
        source += f"; {'finetune plan calibrate=true measures it, ' if here else ''}tflops=N sets it"
        if options.tflops:
            ceiling, source = options.tflops * 1e12, f"given: {options.tflops:g} TFLOP/s"
        media_seconds = sum(each.flops for each in media) / ceiling * (1 + _ASSUMED_REST[inputs.device_kind])
    seconds = _computing_seconds(inputs, work, rates, ceiling)
    link = link_of(inputs, options.link_gbps, link_bytes_of(gpu_name))
    seconds |= waiting_seconds(inputs, memory, _layer_seconds(inputs, memory, work, seconds), link)
    total = sum(seconds.values())
    # One rank that does all of it, with the same passes.
    alone = replace(inputs, ranks=1, nodes=1, shard_ranks=1)
    work_alone = step_work(alone, memory.micro_batch, memory.recomputed)
    alone_seconds = sum(_computing_seconds(alone, work_alone, rates, ceiling).values())
    media_seconds /= inputs.ranks
    steps, steps_source = steps_of(inputs, options.tokens)
    return {
        "step_flops": work.flops * inputs.ranks,
        "rates": source,
        "step_seconds": total,
        "efficiency": alone_seconds / (inputs.ranks * total),
        "sent_bytes": sent_bytes(inputs, memory.micro_batch),
        "link": link.source,
        "seconds_shares": {name: part / total for name, part in seconds.items()},
        "tokens_per_second": inputs.train.batch_size / inputs.sequence.prompts * inputs.sequence.places / total,
        "steps": steps,
        "steps_from": steps_source,
        "media_seconds": media_seconds,
        "media_bytes": cached_bytes(inputs, epoch_tokens),
        "total_seconds": None if steps is None else steps * total + media_seconds,
    }


def _computing_seconds(inputs: PlanInputs, work: StepWork, rates: Rates | None, ceiling: float) -> dict[str, float]:
    """Return the seconds of a step per purpose on one rank. ceiling: operations per second, if there are no rates."""
    if rates is not None:
        return step_seconds(inputs, work, rates)
    products = work.flops / ceiling
    seconds = {"products": products, "all else": products * _ASSUMED_REST[inputs.device_kind]}
    if inputs.samples_answers:
        seconds["sampling answers"] = sum(_sampling_operations(inputs).values()) / ceiling
    return seconds


def _layer_seconds(inputs: PlanInputs, memory: PeakMemory, work: StepWork, seconds: Mapping[str, float]) -> float:
    """Return the seconds of a layer's pass in one direction: a share of training's time, by operations."""
    training = sum(size for name, size in seconds.items() if name != "sampling answers")
    share = (work.flops - work.products["head"]) / work.flops
    passes = math.ceil(inputs.step_sequences / memory.micro_batch)
    layers = len(inputs.adapted)
    return training * share / passes / (2 * layers - inputs.first_trained_layer + memory.recomputed)


def steps_of(inputs: PlanInputs, tokens: int | None) -> tuple[int | None, str]:
    """Return the optimizer steps of a run and their source; None if the number of tokens is unknown.

    tokens: of an epoch; None estimates them from the size of local files.
    """
    if inputs.train.max_steps is not None:
        return inputs.train.max_steps, ""
    source = ""
    if tokens is None:
        tokens, source = tokens_in_files(inputs.data.train), " (estimated from the size of the files)"
    if tokens is None:
        return None, ""
    step_tokens = inputs.train.batch_size * inputs.data.max_length
    if inputs.learns_from_rewards:
        if inputs.document_tokens is None:
            return None, ""
        step_tokens = inputs.train.batch_size * inputs.document_tokens
    steps = max(1, math.ceil((inputs.train.epochs or 1) * tokens / step_tokens))
    return steps * inputs.updates, source


def tokens_in_files(sources: Sequence[SourceConfig]) -> int | None:
    """Estimate the tokens of an epoch; None unless all sources (at least one) are local text files without a limit."""
    total = 0.0
    for source in sources:
        file = Path(source.path).expanduser()
        if not file.is_file() or file.suffix not in _TEXT_FILES or source.limit is not None:
            return None
        total += file.stat().st_size / BYTES_PER_TOKEN * source.weight
    return round(total) or None


def step_seconds(inputs: PlanInputs, work: StepWork, rates: Rates) -> dict[str, float]:
    """Compute the seconds of one step per purpose, from measured rates."""
    sizes = {name: math.prod(linear) for name, linear in inputs.linears.items()}
    sizes["head"] = inputs.shape["vocab_size"] * inputs.shape["hidden_size"]
    grid = rates.products
    seconds = {
        "products": sum(n / _rate_of_product(grid, sizes[name], work.rows) for name, n in work.products.items()),
        # Two thin products per pass, which move as much as they compute: at the rate of the smallest matrix.
        "adapters": work.adapters / _rate_of_product(grid, 0, work.rows),
        "attention": work.attention / _interpolate(rates.attention, inputs.sequence.document),
        "elementwise steps": work.elementwise / rates.elementwise,
        "dequantizing": sum(n / _interpolate(rates.dequantized, sizes[name]) for name, n in work.dequantized.items()),
        "loss": work.logits / rates.logits,
        "optimizer": work.trained / rates.trained,
        "calls": work.layer_passes(inputs.shape["intermediate_size"]) * rates.layer_seconds,
    }
    if work.towers:
        seconds["towers"] = sum(tower_seconds(each, rates) for each in work.towers)
    if inputs.samples_answers:
        seconds["sampling answers"] = _sampling_seconds(inputs, rates, sizes)
    return seconds


def tower_seconds(work: TowerWork, rates: Rates) -> float:
    """Return the seconds of a tower's passes. Elementwise steps are counted with the calls of its layers."""
    attention = work.attention / _interpolate(rates.attention, work.reach)
    products = work.products / _rate_of_product(rates.products, work.linear, work.rows)
    return products + attention + work.layer_passes * rates.layer_seconds


def _sampling_operations(inputs: PlanInputs) -> dict[str, float]:
    """Return the operations per linear, and of the head, that take as long as sampling the answers of a step."""
    work = sampling_work(inputs)
    rows = max(work.rows, _READING_ROWS[inputs.device_kind])
    return {name: 2.0 * weights * work.passes * rows for name, weights in work.weights.items()}


def _sampling_seconds(inputs: PlanInputs, rates: Rates, sizes: Mapping[str, int]) -> float:
    """Return the seconds of sampling the answers of a step. sizes: weights of each linear, and of the head."""
    work, operations = sampling_work(inputs), _sampling_operations(inputs)
    products = sum(n / _rate_of_product(rates.products, sizes[name], work.rows) for name, n in operations.items())
    drawn = work.rows * work.passes * inputs.shape["vocab_size"] / rates.logits
    calls = work.passes * len(inputs.adapted) * rates.layer_seconds
    dequantized = 0.0
    if inputs.quant.type == "nf4" and not inputs.quant.keep_dequantized:
        linears = ((size, sizes[name]) for name, size in work.weights.items() if name != "head")
        dequantized = work.passes * sum(size / _interpolate(rates.dequantized, matrix) for size, matrix in linears)
    return products + drawn + calls + dequantized


def cost_of_token(inputs: PlanInputs, memory: PeakMemory, rates: Rates | None) -> float:
    """Return the cost of a training token: seconds with measured rates, else operations of products."""
    work = step_work(inputs, memory.micro_batch, memory.recomputed)
    if rates is not None:
        cost = sum(step_seconds(inputs, work, rates).values())
    else:
        passes = work.layer_passes(inputs.shape["intermediate_size"]) * _ASSUMED_PASS[inputs.device_kind]
        cost = work.flops + _ASSUMED_DEQUANTIZED * sum(work.dequantized.values()) + passes
    return cost / (inputs.step_sequences * inputs.sequence.places)


def assumed_ceiling(device_kind: str, gpu_name: str | None) -> tuple[float, str]:
    """Return assumed operations per second, and the assumption as text."""
    if device_kind == "cpu":
        cores = usable_cores()
        return cores * _ASSUMED_CORE, f"assumed: {_ASSUMED_CORE / 1e9:.0f} GFLOP/s per core, cores={cores}"
    peak, source = _ASSUMED_GPU_PEAK, f"{_ASSUMED_GPU_PEAK / 1e12:g} TFLOP/s"
    if known := peak_of(gpu_name):
        peak, source = known, f"the {known / 1e12:g} TFLOP/s of {gpu_name}'s data sheet"
    return peak * _ASSUMED_SHARE, f"assumed: {_ASSUMED_SHARE:.0%} of {source}"


def _rate_of_product(grid: Sequence[Sequence[float]], weights: float, rows: float) -> float:
    """Operations per second of a product: linear between neighbors in the logarithms of weights and rows."""
    by_size: dict[float, list[list[float]]] = {}
    for size, count, rate in grid:
        by_size.setdefault(size, []).append([count, rate])
    return _interpolate([[size, _interpolate(line, rows)] for size, line in by_size.items()], weights)


def _interpolate(points: Sequence[Sequence[float]], x: float) -> float:
    """Interpolate between points [x, value]: linear in the logarithm of x, constant outside."""
    points = sorted(points, key=lambda point: point[0])
    xs = [point[0] for point in points]
    i = bisect_left(xs, x)
    if i == 0 or i == len(xs):
        return points[min(i, len(xs) - 1)][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)


def calibration_file() -> Path:
    """Return the file of this machine's rates."""
    return cache_home("rates") / "calibration.json"


def read_rates(device_type: str) -> Rates | None:
    """Read the rates that `finetune plan calibrate=true` measured; None if there are none, or no valid ones."""
    try:
        rates = Rates(**_calibrations()[device_type])
    except (OSError, KeyError):
        return None
    except (ValueError, TypeError) as error:
        log_once(f"plan: {calibration_file()} is corrupt ({error}); using assumed rates")
        return None
    return rates if rates.layout == _LAYOUT else None


def _calibrations() -> dict[str, Any]:
    """Return the rates by device type. Raises: OSError, or ValueError if the file is corrupt."""
    return unseal(json.loads(calibration_file().read_text(encoding="utf-8")))


def write_rates(device_type: str, rates: Rates) -> Path:
    """Write the rates of a device type into the calibration file, and return the file."""
    file = calibration_file()
    try:
        known = _calibrations()
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(seal({**known, device_type: asdict(rates)}), indent=1) + "\n")
    return file
