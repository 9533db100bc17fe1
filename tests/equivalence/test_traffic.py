"""What two ranks of a sharded base send in a step is what the plan counts, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune import load_config
from finetune.models.families import shape_of
from finetune.planning.communication import step_traffic
from finetune.planning.inputs import plan_inputs
from tests.commands import ROOT
from tests.models import save_tiny_base
from tests.runs import SMALL_RUN

SETTINGS = (
    *SMALL_RUN,
    "parallel.shard=full",
    "train.world_size=2",
    "train.micro_batch_size=1",
    "train.gradient_checkpointing=1",
    "data.eval=[]",
)


def carried(folder: Path, steps: int, *overrides: str) -> dict[str, int]:
    """Return the bytes that the collectives of a rank carried in a run of so many steps."""
    counts = folder / f"counts-{steps}"
    words = [*SETTINGS, *overrides, f"train.max_steps={steps}", f"output_dir={folder / str(steps)}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "tests" / "counted_run.py"), "quickstart.yaml", str(counts), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    each = [json.loads(Path(f"{counts}-{rank}.json").read_text()) for rank in range(2)]
    assert each[0] == each[1]
    return each[0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_collectives_of_a_step_carry_the_predicted_bytes(tmp_path, tied):
    words = []
    if not tied:
        base = save_tiny_base(tmp_path / "base", tied=False, vocab_size=1024, hidden_size=64)
        words = [f"model.name={base}", "model.tokenizer=data/tiny-qwen2.5"]
    two, four = carried(tmp_path, 2, *words), carried(tmp_path, 4, *words)
    cfg = load_config("quickstart.yaml", [*SETTINGS, *words])
    inputs = replace(plan_inputs(cfg, shape_of(cfg.model.name), device_type="cpu", ranks=2), shard_ranks=2)
    parts = step_traffic(inputs, 1).parts
    assert (four["summed"] - two["summed"]) / 2 == parts.pop("gradients")
    assert (four["gathered"] - two["gathered"]) / 2 == sum(parts.values())
