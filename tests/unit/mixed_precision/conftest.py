"""The embedded base with a few of the sample rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from finetune import load_config
from finetune.config.schema import RunConfig
from finetune.data.batch import Batch
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.mixed_precision.measure import batches_of, load_rows, sample

ROWS = 6


@dataclass(frozen=True)
class Bench:
    """cfg: of the quickstart. batches: two, of six rows in all."""

    cfg: RunConfig
    batches: Sequence[Batch]
    model: LayerwiseModel


@pytest.fixture(scope="session")
def bench(_shared_folders) -> Bench:
    cfg = load_config("quickstart.yaml", ["data.train.0.limit=96", "data.eval.0.limit=24", "data.max_length=128"])
    training, _ = load_rows(cfg, lambda _: None)
    some = sample(training, ROWS)
    batches = [*batches_of(some[:4], 128), *batches_of(some[4:], 128)]
    return Bench(cfg, batches, LayerwiseModel(cfg.model, cfg.quant, torch.device("cpu")))


@pytest.fixture(scope="session")
def base_folder() -> Path:
    return Path(__file__).resolve().parents[3] / "data" / "tiny-qwen2.5"
