"""A base that ranks share: when they do, and what a rank then holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune.config.compose import load_config
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.auto_batch import estimate_memory
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.sharded_base import shard_group


def run(*overrides: str, size: str = "72B", kind: str = "cuda", ranks: int = 8, nodes: int = 2) -> PlanInputs:
    cfg = load_config("lora.yaml", overrides, needs_data=False)
    return plan_inputs(cfg, QWEN25_SHAPES[size], device_type=kind, ranks=ranks, nodes=nodes)


@pytest.mark.parametrize(("shard", "expected"), [("none", 1), ("full", 8), ("hybrid", 4)])
def test_the_setting_decides_how_many_ranks_hold_one_copy(shard, expected):
    assert shard_group(run(f"parallel.shard={shard}"), 1e9) == expected


def test_auto_shares_a_base_that_does_not_fit_beside_the_run():
    inputs = run("train.gradient_checkpointing=all", "train.micro_batch_size=1", "model.embedding=device")
    needed = estimate_memory(inputs, None).needed_bytes
    assert shard_group(inputs, needed) == 1 and shard_group(inputs, 0.99 * needed) == 8
    assert shard_group(inputs, None) == 1 and shard_group(replace(inputs, shape={}), 1e9) == 1


def test_auto_keeps_whole_copies_of_a_base_that_cannot_be_split():
    assert shard_group(run("quant.type=int8"), 1e9) == 1
    assert shard_group(run("quant.type=none"), 1e9) == 8


def test_a_rank_holds_its_share_of_the_base_and_all_that_is_trained():
    whole = run()
    shared = replace(whole, shard_ranks=8)
    weights = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 29568 * 8192)
    scales = 4 / (64 * 256)  # second-level scales stay whole
    assert whole.static.parts["linears in nf4"] == pytest.approx(weights * (0.5 + 1 / 64 + scales))
    assert shared.static.parts["linears in nf4"] == pytest.approx(weights * ((0.5 + 1 / 64) / 8 + scales))
    assert shared.static.parts["head"] * 8 == whole.static.parts["head"] == 152064 * 8192 * 2
    for part in ("adapter", "gradients", "optimizer"):
        assert shared.static.parts[part] == whole.static.parts[part]


def test_a_pass_holds_gathered_layers_and_the_loss_the_head():
    memory = estimate_memory(replace(run(), shard_ranks=8), 24e9)
    layer = (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 29568 * 8192) * (0.5 + 1 / 64)
    vectors = 2 * (2 * 8192 + 8192 + 2 * 1024)  # two norms, and the biases of q, k and v
    for name, parts in memory.moments.items():
        if name.startswith("training step, ") or name == "evaluation":
            # the current one, the block it came in, and the block of the next one
            assert parts["gathered layers"] == pytest.approx(3 * (layer + vectors)), name
    assert memory.moments["training step, at the loss"]["gathered head"] == 152064 * 8192 * 2


def test_an_offloaded_base_is_in_main_memory():
    shared = replace(run("parallel.shard=full", "parallel.offload=true"), shard_ranks=8)
    assert set(shared.static.parts) == {"adapter", "gradients", "optimizer"}
    on_gpu = replace(run("parallel.shard=full"), shard_ranks=8).static.parts
    base = sum(size for name, size in on_gpu.items() if name not in shared.static.parts)
    assert estimate_memory(shared, 80e9).host_bytes == pytest.approx(base)
