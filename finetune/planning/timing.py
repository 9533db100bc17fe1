"""Seconds of a training step from its work and a machine's rates, measured once (`plan calibrate=true`) or assumed."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.planning.flops import StepWork, layer_passes
from finetune.planning.static_memory import linear_shapes
from finetune.system.atomic import write_text
from finetune.system.machine import usable_cores

# Dense bf16 operations a second with fp32 sums, from the makers' data sheets; fp16 where a card has no bf16.
GPU_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "A10": 125e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
# Of such a peak, what the products of a step reach when nothing was measured: an assumption, said wherever it is used.
_ASSUMED_SHARE = 0.45
_ASSUMED_GPU_PEAK = 100e12
# bf16 operations a second of one CPU core with AVX-512 and without AMX, where nothing was measured: an assumption. One
# with AVX2 makes 8.5e10 in fp32 (measured).
_ASSUMED_CORE = 1e11
# What everything but products adds to their time where nothing was measured: half as much again on a CPU, a fifth of
# it on a GPU (benchmarks/NOTES.md: products are two thirds of a step on two cores).
_ASSUMED_REST = {"cpu": 0.5, "cuda": 0.2}
# What a weight that is dequantized and a pass of a layer cost where nothing was measured, in operations of products: as
# many as 100 tokens take of that weight; 0.2 ms of launches at 45 TFLOP/s, 1 ms of Python at 100 GFLOP/s. Assumptions.
_ASSUMED_DEQUANTISED, _ASSUMED_PASS = 200.0, {"cuda": 1e10, "cpu": 1e8}
_LAYOUT = 2


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second.

    products: [weights of the matrix, rows, operations a second], on a grid of both. attention: [document tokens,
    operations a second]. elementwise: values [T, I] of a layer, forward and backward. dequantized: [weights of the
    matrix, weights a second]. logits: values. trained: values of the optimizer. layer_seconds: what one pass of a layer
    takes whatever its size. device: what was measured, in words.
    """

    device: str
    products: list[list[float]]
    attention: list[list[float]]
    elementwise: float
    dequantized: list[list[float]]
    logits: float
    trained: float
    layer_seconds: float
    layout: int = field(default=_LAYOUT)


def step_seconds(work: StepWork, shape: Mapping[str, Any], rates: Rates, document_tokens: int) -> dict[str, float]:
    """Seconds of one step by what they go to; their sum is the step's."""
    linears = linear_shapes(shape)
    sizes = {name: math.prod(linears[name]) for name in linears} | {"head": shape["vocab_size"] * shape["hidden_size"]}
    products = sum(
        flops / _rate_of_product(rates.products, sizes[name], work.rows) for name, flops in work.products.items()
    )
    return {
        "products": products,
        # Two thin products a pass, which move as much as they compute: at the rate of the smallest matrix.
        "adapters": work.adapters / _rate_of_product(rates.products, 0, work.rows),
        "attention": work.attention / _along(rates.attention, document_tokens),
        "elementwise steps": work.elementwise / rates.elementwise,
        "dequantizing": sum(n / _along(rates.dequantized, sizes[name]) for name, n in work.dequantized.items()),
        "loss": work.logits / rates.logits,
        "optimizer": work.trained / rates.trained,
        "calls": layer_passes(work, shape) * rates.layer_seconds,
    }


def assumed_seconds(work: StepWork, flops_per_second: float, device_type: str) -> dict[str, float]:
    """Seconds of one step where only a ceiling of products is known, given or assumed."""
    products = work.flops / flops_per_second
    return {"products": products, "all else": products * _ASSUMED_REST["cuda" if device_type == "cuda" else "cpu"]}


def assumed_effort(work: StepWork, shape: Mapping[str, Any], device_type: str) -> float:
    """A step's work in operations of products, to compare settings where nothing was measured."""
    passes = layer_passes(work, shape) * _ASSUMED_PASS["cuda" if device_type == "cuda" else "cpu"]
    return work.flops + _ASSUMED_DEQUANTISED * sum(work.dequantized.values()) + passes


def assumed_ceiling(device_type: str, gpu_name: str | None) -> tuple[float, str]:
    """Operations a second where nothing was measured, and where the figure comes from."""
    if device_type != "cuda":
        cores = usable_cores()
        return cores * _ASSUMED_CORE, f"assumed: {_ASSUMED_CORE / 1e9:.0f} GFLOP/s a core, {cores} core(s)"
    peak = next((value for name, value in GPU_PEAKS.items() if gpu_name and name in gpu_name), None)
    if peak is None:
        words = f"assumed: {_ASSUMED_SHARE:.0%} of {_ASSUMED_GPU_PEAK / 1e12:g} TFLOP/s"
        return _ASSUMED_GPU_PEAK * _ASSUMED_SHARE, words
    words = f"assumed: {_ASSUMED_SHARE:.0%} of the {peak / 1e12:g} TFLOP/s of {gpu_name}'s data sheet"
    return peak * _ASSUMED_SHARE, words


def _rate_of_product(grid: Sequence[Sequence[float]], weights: float, rows: float) -> float:
    """Operations a second of a product of so many rows with a matrix of so many weights; linear between neighbors in
    the logarithms of both, constant outside.
    """
    by_size: dict[float, list[list[float]]] = {}
    for size, count, rate in grid:
        by_size.setdefault(size, []).append([count, rate])
    return _along([[size, _along(line, rows)] for size, line in by_size.items()], weights)


def _along(points: Sequence[Sequence[float]], x: float) -> float:
    """The value at x between points [x, value]; linear in the logarithm of x, constant outside."""
    points = sorted(points, key=lambda point: point[0])
    xs = [point[0] for point in points]
    i = bisect_left(xs, x)
    if i == 0 or i == len(xs):
        return points[min(i, len(xs) - 1)][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)


def calibration_file() -> Path:
    """$FINETUNE_CACHE/calibration.json, else ~/.cache/finetune/calibration.json."""
    home = os.environ.get("FINETUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "finetune"
    return Path(home).expanduser() / "calibration.json"


def read_rates(device_type: str) -> Rates | None:
    """What `plan calibrate=true` measured on this kind of device; None if there is nothing, or nothing readable."""
    try:
        stored = json.loads(calibration_file().read_text(encoding="utf-8"))[device_type]
        rates = Rates(**stored)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rates if rates.layout == _LAYOUT else None


def write_rates(device_type: str, rates: Rates) -> Path:
    """Keep what was measured on this kind of device, beside that of others."""
    file = calibration_file()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({**known, device_type: asdict(rates)}, indent=1) + "\n")
    return file
