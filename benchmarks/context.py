"""Find the longest context that trains within a memory budget: steps over one document of increasing length.

    python -m benchmarks.context model=FOLDER [budget_gb=16] [recompute=offload] [seconds=60] [most=400000]

The budget limits the memory reserved by torch's allocator, minus CUDA's own. Peaks grow linearly, so the next length is
where the line through the last two meets the budget. A length whose step would exceed `seconds` is not tried: then
`predicted_tokens` is the length on the line, `tokens` the longest trained one, and `extrapolated` is true.
The kernels are those of a run, compiled where they repay it; `rank=32 targets=all-linear` are the defaults, because
published contexts are of such adapters.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import parse
from finetune.system.libraries import configure_libraries

DEFAULTS = {
    "model": "",
    "budget_gb": "16",
    "recompute": "offload",
    "seconds": "60",
    "most": "400000",
    "rank": "32",
    "targets": "all-linear",
    "first": "2048",
    "fast": "true",
}
_CUDA_CONTEXT_BYTES = 5e8
# Steps of a run whose kernels are chosen.
_RUN_STEPS = 1000
_CLOSE_ENOUGH = 1.03
_GROWTH = 8


@dataclass
class Search:
    """Tried lengths. fits: peak bytes by length. fails: lengths that did not fit. seconds: of the longest step."""

    fits: dict[int, int] = field(default_factory=dict)
    fails: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def longest(self) -> int:
        return max(self.fits, default=0)

    def predicted(self, budget_bytes: float) -> int | None:
        """Return the length where the line through the two longest peaks meets the budget; None with fewer than two."""
        if len(self.fits) < 2:
            return None
        (x1, y1), (x2, y2) = sorted(self.fits.items())[-2:]
        slope = (y2 - y1) / (x2 - x1)
        return min([int(x2 + (budget_bytes - y2) / slope), *self.fails]) if slope > 0 else None

    def next_length(self, budget_bytes: float, first: int, most: int) -> int | None:
        """Return the next length to try; None if the longest is found."""
        if not self.fits:
            shorter = min(self.fails, default=2 * first) // 2
            return shorter if shorter >= 64 else None
        ceiling = min(self.fails, default=sys.maxsize)
        length = self.predicted(budget_bytes)
        length = 2 * self.longest if length is None else min(int(0.985 * length), _GROWTH * self.longest)
        if length >= ceiling or (self.fails and length <= _CLOSE_ENOUGH * self.longest):
            length = (self.longest + ceiling) // 2
        length = min(length, most)
        return length if length > _CLOSE_ENOUGH * self.longest else None


def search(
    attempt: Callable[[int], tuple[int, float] | None], budget_bytes: float, first: int, most: int, limit_seconds: float
) -> dict[str, Any]:
    """Search with attempt(length) -> (peak bytes, seconds) of a step, or None if it does not fit."""
    began = time.perf_counter()
    found, stopped = Search(), False
    while (length := found.next_length(budget_bytes, first, most)) is not None:
        left = limit_seconds - (time.perf_counter() - began)
        # Attention grows with the square of the length; nothing grows faster.
        expected = found.seconds * (length / found.longest) ** 2 if found.fits else 0.0
        if stopped := expected > left or left < 0:
            break
        outcome = attempt(length)
        if outcome is None:
            found.fails.append(length)
        else:
            found.fits[length], found.seconds = outcome
    return {
        "tokens": found.longest,
        "predicted_tokens": found.predicted(budget_bytes),
        "extrapolated": stopped and found.predicted(budget_bytes) is not None,
        "tried": found.fits,
        "failed_at": sorted(found.fails),
        "step_seconds": found.seconds,
        "budget_bytes": int(budget_bytes),
        "peak_bytes": found.fits.get(found.longest),
    }


def build_step(options: dict[str, str], device: Any) -> Callable[[int], None]:
    """Return a function that runs a training step over one random document of a length; all its tokens are trained."""
    import numpy as np

    from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig, TrainConfig
    from finetune.data.batch import build_batch
    from finetune.data.documents import Document
    from finetune.losses.cross_entropy import CrossEntropy
    from finetune.models.adapters.attach import attach_lora
    from finetune.models.fused import fuse_layers
    from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
    from finetune.models.load import load_base
    from finetune.models.tokenizer import load_tokenizer
    from finetune.ops.dispatch import configure_compile
    from finetune.training.optimizer import build_optimizer

    targets = options["targets"]
    cfg = ModelConfig(name=options["model"])
    lora = LoraConfig(
        rank=int(options["rank"]), target_modules=targets if targets == "all-linear" else targets.split(",")
    )
    model = attach_lora(load_base(cfg, QuantConfig(), device), lora, load_tokenizer(cfg))
    if options["fast"] == "true":
        fuse_layers(model)
        flops = 4.0 * model.num_parameters() * int(options["first"]) * _RUN_STEPS
        print(configure_compile(device, flops), file=sys.stderr)
    model.train()
    policy = options["recompute"]
    apply_gradient_checkpointing(model, int(policy) if policy.isdecimal() else policy)
    loss = CrossEntropy(model)
    optimizer = build_optimizer(TrainConfig(), model.named_parameters())
    words = json.loads((Path(options["model"]) / "config.json").read_text())["vocab_size"]
    random = np.random.default_rng(0)

    def step(length: int) -> None:
        ids = random.integers(words, size=length + 1, dtype=np.int32)
        batch = build_batch([Document(ids[:-1], ids[1:], "random")])
        (loss(batch) / length).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    configure_libraries()
    import gc

    import torch

    from benchmarks.peaks import peak_bytes
    from finetune.system.errors import ResourceError

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    budget_bytes = 1e9 * float(options["budget_gb"])
    if cuda:
        budget_bytes -= _CUDA_CONTEXT_BYTES
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, budget_bytes / torch.cuda.get_device_properties(0).total_memory)
        )
    step = build_step(options, device)

    def attempt(length: int) -> tuple[int, float] | None:
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            step(length)
            peak = torch.cuda.max_memory_reserved() if cuda else peak_bytes()
        except (torch.OutOfMemoryError, torch.AcceleratorError, ResourceError) as error:
            # Pinned memory that main memory cannot give is one of the last two.
            print(f"{length} tokens: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        # On a CPU nothing limits the allocation: the resident size is compared with the budget afterwards.
        return (peak, time.perf_counter() - start) if peak <= budget_bytes else None

    found = search(attempt, budget_bytes, int(options["first"]), int(options["most"]), float(options["seconds"]))
    print(json.dumps({**found, "recompute": options["recompute"], "device": device.type}))


if __name__ == "__main__":
    main(sys.argv[1:])
