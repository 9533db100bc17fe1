"""Two gloo processes and one process give the same adapter from the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import load_config, train
from tests.commands import train_on_ranks
from tests.runs import SMALL_RUN, adapter, metrics, result

# Dropout and noise are drawn on each rank; equality is for the deterministic part. fp32 products differ only in the
# order of sums. A batch of 5 gives the ranks unequal shares; the last step of an epoch leaves one rank without any.
DETERMINISTIC = (
    "lora.dropout=0",
    "train.neftune_alpha=0",
    "train.batch_size=5",
    "data.train.0.limit=16",
    "data.packing=false",
    "model.dtype=float32",
    "quant.compute_dtype=float32",
    "train.max_steps=8",
    "train.eval_every=4",
    "generation.num_examples=6",
    "train.micro_batch_size=2",
)


def run(ranks: int, folder: Path) -> None:
    # An empty cache: one of the ranks tokenizes, the other waits for it.
    folders = (f"output_dir={folder}", f"data.cache={folder}-tokens")
    settings = (*SMALL_RUN, *DETERMINISTIC, f"train.world_size={ranks}", *folders)
    if ranks == 1:
        train(load_config("quickstart.yaml", settings))
    else:
        train_on_ranks(ranks, *settings)


def test_two_ranks_equal_one(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    run(1, one)
    run(2, two)
    expected = adapter(one)
    for name, tensor in adapter(two).items():
        # Adam turns a sum's last bits into an error of the weight's own size: 1e-4 of the largest after 8 steps.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.keys() == b.keys()
        assert a.get("eval_loss", 0.0) == pytest.approx(b.get("eval_loss", 0.0), rel=1e-5)
    stores = [{path.name for path in Path(f"{folder}-tokens").iterdir() if path.is_dir()} for folder in (one, two)]
    assert stores[0] == stores[1] and len(stores[0]) == 2
    assert (result(one)["world_size"], result(two)["world_size"]) == (1, 2)
    assert result(one)["exact_match_before"] == result(two)["exact_match_before"]
