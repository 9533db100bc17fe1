"""Small real runs: the embedded base in NF4, the sample rows, a few steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from finetune import load_config
from finetune.config.schema import RunConfig

# Seconds a figure took, and bytes of a process, are not part of the mathematics.
MEASURED = {"tokens_per_second", "peak_bytes", "seconds"}
SMALL_RUN = (
    "data.train.0.limit=96", "data.eval.0.limit=24", "data.max_length=128", "train.batch_size=4", "train.max_steps=4",
    "generation.rows=0", "lora.dropout=0.1", "train.neftune_alpha=5",
)  # fmt: skip


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., RunConfig]:
    """A few steps of the quickstart, with dropout and noise on, into a folder of the given name."""

    def config(name: str, *overrides: str) -> RunConfig:
        return load_config("quickstart.yaml", [*SMALL_RUN, f"output_dir={tmp_path / name}", *overrides])

    return config


def adapter(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def metrics(folder: Path | str) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
