"""Measure this machine's matrix products in operations per second: the ceiling of every training step.

They are in bf16, or in fp32 on a CPU where that is faster (no bf16 instructions).

    python -m benchmarks.ceiling model=FOLDER [tokens=2048] [seconds=0.4]

The products are the model's own (activations times the weights of its largest linears, forward and backward) and square
ones. Each is repeated for `seconds`; its rate is the median. The caller repeats this between other runs and selects.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.processes import parse

DEFAULTS = {"model": "", "tokens": "2048", "seconds": "0.4"}
_MOST_REPEATS, _LEAST_REPEATS = 200, 5


def products(config: dict, tokens: int, squares: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, int, int], bool]]:
    """Return (name, (rows, inner, columns), transposed weight) of each product to time; no shape twice."""
    from finetune.planning.static_memory import linear_shapes

    linears = linear_shapes(config)
    for name in ("q_proj", "gate_proj", "down_proj"):
        out, inputs = linears[name]
        yield f"{name} forward [{tokens}x{inputs}]x[{inputs}x{out}]", (tokens, inputs, out), True
        yield f"{name} backward [{tokens}x{out}]x[{out}x{inputs}]", (tokens, out, inputs), False
    for size in squares:
        yield f"square {size}", (size, size, size), True


def time_product(sizes: tuple[int, int, int], transposed: bool, seconds: float) -> float:
    """Return operations per second: the median of repeated products."""
    import torch

    from finetune.ops.matmul import uses_fp32_matmul

    rows, inner, columns = sizes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if uses_fp32_matmul(torch.device(device), torch.bfloat16) else torch.bfloat16
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = torch.randn(*((columns, inner) if transposed else (inner, columns)), dtype=dtype, device=device)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    weight = right.T if transposed else right

    def once() -> float:
        start = time.perf_counter()
        torch.mm(left, weight, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(), once()  # the first calls choose and compile kernels
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or (sum(times) < seconds and len(times) < _MOST_REPEATS):
        times.append(once())
    return 2.0 * rows * inner * columns / median(times)


def main(words: list[str]) -> None:
    import torch

    options = parse(words, DEFAULTS)
    config = json.loads((Path(options["model"]) / "config.json").read_text())
    large = torch.cuda.is_available()
    tiny = config["hidden_size"] < 512
    squares = (8192,) if large else (256,) if tiny else (1024, 2048)
    with torch.inference_mode():
        rates = {
            name: time_product(sizes, transposed, float(options["seconds"]))
            for name, sizes, transposed in products(config, int(options["tokens"]), squares)
        }
    print(json.dumps({"flops_per_second": rates}))


if __name__ == "__main__":
    main(sys.argv[1:])
