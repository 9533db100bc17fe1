"""Two gloo ranks, really started, against one: the same global batch gives the same adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.equivalence.conftest import SMALL_RUN, adapter, metrics

# Dropout and noise are drawn on each rank; equality is for the deterministic part. fp32 products differ only in the
# order of sums. A batch of 5 gives the ranks unequal shares, the last step of the short epoch leaves one rank without any.
DETERMINISTIC = (
    "lora.dropout=0", "train.neftune_alpha=0", "train.batch_size=5", "data.train.0.limit=16", "data.packing=false",
    "model.dtype=float32", "quant.compute_dtype=float32", "train.max_steps=8", "train.eval_every=4", "generation.rows=6",
    "train.micro_batch_size=2",
)  # fmt: skip


def run(ranks: int, folder: Path) -> None:
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", "0"] if ranks == 2 else []
    command = [
        sys.executable, *(["-m", "torch.distributed.run", *launcher[1:]] if launcher else []),
        str(Path(__file__).resolve().parents[2] / "finetune" / "train.py"), "config=quickstart.yaml", *SMALL_RUN,
        *DETERMINISTIC, f"train.world_size={ranks}", f"output_dir={folder}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_equal_one(tmp_path):
    for ranks in (1, 2):
        run(ranks, tmp_path / str(ranks))
    one, two = adapter(tmp_path / "1"), adapter(tmp_path / "2")
    for name in one:
        # Adam turns a sum's last bits into a relative error of its own size: 1e-5 of the largest weight after 8 steps.
        scale = one[name].abs().max().item()
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
    for a, b in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("eval_loss") == pytest.approx(b.get("eval_loss"), rel=1e-5)
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in "12"]
    assert [r["world_size"] for r in results] == [1, 2]
    assert results[0]["exact_match_before"] == results[1]["exact_match_before"]
