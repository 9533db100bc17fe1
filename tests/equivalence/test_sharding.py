"""A base that ranks share gives the adapter of a base that each rank holds whole, and that of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import load_config, train
from tests.commands import train_on_ranks
from tests.runs import SMALL_RUN, adapter, metrics

# As in test_ranks.py. One sequence a pass: three against two passes in a step, so one rank makes an empty one.
DETERMINISTIC = (
    "lora.dropout=0",
    "train.neftune_alpha=0",
    "train.batch_size=5",
    "train.micro_batch_size=1",
    "data.train.0.limit=16",
    "data.packing=false",
    "data.eval=[]",
    "model.dtype=float32",
    "quant.compute_dtype=float32",
)


def run(ranks: int, folder: Path, *overrides: str) -> None:
    settings = (*SMALL_RUN, *DETERMINISTIC, *overrides, f"train.world_size={ranks}", f"output_dir={folder}")
    if ranks == 1:
        train(load_config("quickstart.yaml", settings))
    else:
        train_on_ranks(ranks, *settings)


def test_two_ranks_that_share_the_base_equal_one_rank_and_two_whole_copies(tmp_path):
    one, shared, copies = (tmp_path / name for name in ("one", "shared", "copies"))
    run(1, one)
    run(2, shared, "parallel.shard=full")
    run(2, copies, "parallel.shard=none")
    expected, found, of_copies = adapter(one), adapter(shared), adapter(copies)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
        assert torch.equal(found[name], of_copies[name]), name
    for a, b in zip(metrics(one), metrics(shared), strict=True):
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
