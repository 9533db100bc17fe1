"""Small real runs for tests: the embedded base in NF4, the sample rows, a few steps; and how to compare them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from finetune import load_config, train
from finetune.config.schema import RunConfig

# With dropout and noise on, so that equality of two runs says something about random state.
SMALL_RUN = (
    "data.train.0.limit=96",
    "data.eval.0.limit=24",
    "data.max_length=128",
    "train.batch_size=4",
    "train.max_steps=4",
    "generation.num_examples=0",
    "lora.dropout=0.1",
    "train.neftune_alpha=5",
)
# A few steps of reinforcement learning, whose reward falls with the length of an answer.
REWARDED_RUN = (
    "data.train.0.limit=24",
    "data.eval.0.limit=6",
    "generation.num_examples=6",
    "reward.loss=grpo",
    "reward.functions={length: 1}",
    "reward.length=2",
    "reward.max_new_tokens=12",
    "reward.group_size=4",
    "train.batch_size=3",
    "train.learning_rate=2e-3",
)
# What a clock or the machine decides is no part of the mathematics.
_MEASURED = {"tokens_per_second", "peak_bytes", "seconds", "train/sampling_seconds"}


def small_run(folder: Path, *overrides: str) -> RunConfig:
    """A few steps of the quickstart into `folder`."""
    return load_config("quickstart.yaml", [*SMALL_RUN, f"output_dir={folder}", *overrides])


def reference_run(*overrides: str) -> Path:
    """Return the folder of a finished small run, trained once per session for all tests and processes.

    Do not write into it: copy it first.
    """
    runs = Path(os.environ["FINETUNE_TEST_RUNS"])
    runs.mkdir(parents=True, exist_ok=True)
    folder = runs / hashlib.sha256(repr(overrides).encode()).hexdigest()[:16]
    with FileLock(f"{folder}.lock"):
        if not (folder / "adapter_model.safetensors").exists():
            train(small_run(folder, *overrides))
    return folder


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def metrics(folder: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl, without measured times and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _MEASURED} for line in lines]


def check_same_metrics(left: Path, right: Path, *apart: str) -> None:
    """Compare two runs' figures to 1e-4. apart: those that differ between numbers of ranks, beside computed tokens."""
    for a, b in zip(metrics(left), metrics(right), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"computed_tokens", *apart}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def differing(left: Path, right: Path) -> list[str]:
    """Names of the adapter tensors that are not the same bits in both runs."""
    a, b = adapter(left), adapter(right)
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
