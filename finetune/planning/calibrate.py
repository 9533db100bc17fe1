"""Measure the rates of this machine with the package's own kernels, in the shapes of Qwen2.5's layers.

Each rate comes from the median time of repeated calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from torch.nn.functional import scaled_dot_product_attention

from finetune.ops import elementwise as ops
from finetune.ops.attention import attend, plan_segments
from finetune.ops.cross_entropy import cross_entropy_
from finetune.ops.dequantize import dequantize
from finetune.ops.linear import Projection, project, swiglu_mlp
from finetune.ops.lora import Adapter
from finetune.ops.matmul import matmul
from finetune.planning.timing import Rates
from finetune.system.accelerator import runtime
from finetune.system.console import Log

# (inputs, outputs) of the linears of 0.5B, 1.5B and 7B, from the smallest to the largest.
_MATRICES = ((896, 128), (896, 896), (896, 4864), (1536, 8960), (3584, 18944))
_ROWS = (128, 512, 2048)
# From 32 MB on, glibc maps each block anew, and the system fills it with zeros: matrices of 3B and 7B are dequantized
# at a sixth of the speed of those of 1.5B.
_DEQUANTIZED = ((896, 896), (1536, 8960), (2048, 11008), (3584, 18944))
_DOCUMENTS = (128, 512, 1024, 2048)
# A layer of 0.5B: hidden, intermediate, query heads, key heads, head width; rows of a chunk of logits.
_HIDDEN, _INNER, _HEADS, _KEY_HEADS, _WIDTH, _VOCABULARY, _CHUNK = 896, 4864, 14, 2, 64, 151936, 220
_TOKENS = 1024
# A CPU needs seconds for a 7B matrix times 2,048 rows.
_REPEATS, _LONG_SECONDS = 5, 0.4


def measure_rates(device: torch.device, name: str, log: Log, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Measure the rates of a device with torch's current threads, in about half a minute on two CPU cores.

    name: of the device, in messages. clock: returns seconds.
    """
    watch = _Watch(device, clock)
    log("calibrate: products")
    products = [[float(i * o), float(rows), _product(watch, rows, i, o)] for i, o in _MATRICES for rows in _ROWS]
    log("calibrate: attention, elementwise steps, loss, 4-bit weights, optimizer")
    attention = [[float(length), _attention(watch, length)] for length in _DOCUMENTS]
    with torch.no_grad():
        elementwise, logits = _elementwise(watch), _logits(watch)
        dequantized = [[float(i * o), _dequantize(watch, i, o)] for i, o in _DEQUANTIZED]
    trained, layer_seconds = _optimizer(watch), _calls(watch)
    return Rates(name, products, attention, elementwise, dequantized, logits, trained, layer_seconds)


class _Watch:
    def __init__(self, device: torch.device, clock: Callable[[], float]):
        self.device, self.clock = device, clock

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the median time of repeated calls after a warm-up; two calls if one is slow."""

        def once() -> float:
            start = self.clock()
            work()
            runtime(self.device).synchronize()
            return self.clock() - start

        warm = once()
        return median(once() for _ in range(2 if warm > _LONG_SECONDS else _REPEATS))

    def normal(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=self.device).to(torch.bfloat16)


def _product(watch: _Watch, rows: int, inputs: int, outputs: int) -> float:
    """Operations per second of a frozen linear, forward and backward."""
    x, weight, grad = watch.normal(rows, inputs), watch.normal(outputs, inputs), watch.normal(rows, outputs)
    seconds = watch.seconds(lambda: matmul(x, weight.T)) + watch.seconds(lambda: matmul(grad, weight))
    return 4.0 * rows * inputs * outputs / seconds


def _attention(watch: _Watch, length: int) -> float:
    """Operations per second of attention in documents of this length, forward and backward."""
    documents = max(1, _TOKENS // length)
    tokens = documents * length
    segments = plan_segments([length] * documents, torch.arange(tokens), tokens, watch.device, torch.bfloat16)
    segments = segments.to(watch.device)
    heads = (_HEADS, _KEY_HEADS, _KEY_HEADS)
    q, k, v = (watch.normal(tokens, count, _WIDTH).requires_grad_() for count in heads)
    grad = watch.normal(tokens, _HEADS, _WIDTH)
    seconds = watch.seconds(lambda: attend(q, k, v, segments, _WIDTH**-0.5).backward(grad))
    return 6.0 * _HEADS * _WIDTH * length * tokens / seconds


def _elementwise(watch: _Watch) -> float:
    """Values per second of a layer's elementwise steps, forward and backward: two passes of T * I values."""
    x, weight = watch.normal(_TOKENS, _HIDDEN), watch.normal(_HIDDEN)
    gate, up, grad = (watch.normal(_TOKENS, _INNER) for _ in range(3))
    query, angle = watch.normal(_TOKENS, _HEADS + _KEY_HEADS, _WIDTH), watch.normal(_TOKENS, _WIDTH)

    def layer() -> None:
        for _ in range(2):
            ops.rms_norm_forward(x, weight, 1e-6)
            ops.rms_norm_backward(x, x, weight, 1e-6)
            torch.add(x, x)
            torch.add(x, x)
        ops.apply_rope_forward(query, angle, angle)
        ops.apply_rope_backward(query, angle, angle)
        ops.swiglu_forward(gate, up)
        ops.swiglu_backward_(grad, gate, up)

    return 2.0 * _TOKENS * _INNER / watch.seconds(layer)


def _logits(watch: _Watch) -> float:
    logits = watch.normal(_CHUNK, _VOCABULARY)
    labels = torch.arange(_CHUNK, device=watch.device)
    return logits.numel() / watch.seconds(lambda: cross_entropy_(logits, labels))


def _dequantize(watch: _Watch, inputs: int, outputs: int) -> float:
    packed, state = quantize_4bit(watch.normal(outputs, inputs), compress_statistics=True, quant_type="nf4")
    return inputs * outputs / watch.seconds(lambda: dequantize(packed, state))


def _optimizer(watch: _Watch) -> float:
    weights = [torch.zeros(64, _HIDDEN, device=watch.device, requires_grad=True) for _ in range(16)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return sum(weight.numel() for weight in weights) / watch.seconds(torch.optim.AdamW(weights).step)


def _calls(watch: _Watch) -> float:
    """Seconds of a layer's pass over very few values: the cost of Python and kernel launches."""
    width, rows = 64, 32
    x = watch.normal(rows, width).requires_grad_()
    weight, norm, angle = watch.normal(width, width), watch.normal(width), watch.normal(rows, width)
    a, b = (torch.zeros(*size, device=watch.device, requires_grad=True) for size in ((8, width), (width, 8)))
    frozen, adapted = Projection(weight), Projection(weight, adapter=Adapter(a, b, scale=1.0))

    def layer() -> None:
        q, k, v = project(ops.rms_norm(x, norm, 1e-6), (adapted, frozen, adapted))
        q, k = (ops.apply_rope(y[:, None], angle, angle) for y in (q, k))
        y = x + project(scaled_dot_product_attention(q, k, v[:, None])[:, 0], (frozen,))[0]
        (y + swiglu_mlp(ops.rms_norm(y, norm, 1e-6), frozen, frozen, frozen)).sum().backward()

    return watch.seconds(layer) / 2
