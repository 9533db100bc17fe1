"""The loop of examples/minimal_loop.py, which has no abstractions, is the one of `finetune train`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from finetune import train
from tests.runs import SMALL_RUN, differing, small_run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "minimal_loop.py"


@pytest.mark.parametrize("noise", [True, False], ids=["with dropout and NEFTune", "with shared prefixes"])
def test_the_minimal_loop_writes_the_adapter_of_finetune_train(tmp_path: Path, noise: bool):
    quiet = () if noise else ("lora.dropout=0", "train.neftune_alpha=0")
    settings = (*quiet, "train.micro_batch_size=2", "train.gradient_checkpointing=none")
    train(small_run(tmp_path / "train", *settings))
    main = runpy.run_path(str(EXAMPLE))["main"]
    main([*SMALL_RUN, *settings, f"output_dir={tmp_path / 'minimal'}"])
    assert differing(tmp_path / "train", tmp_path / "minimal") == []
