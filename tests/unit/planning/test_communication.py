"""Bytes that ranks exchange, and the time that this adds, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune.planning.auto_batch import estimate_memory
from finetune.planning.communication import Link, link_of, sent_bytes, step_traffic, waiting_seconds
from finetune.planning.inputs import PlanInputs
from tests.unit.planning.test_sharded_base import run

# Qwen2.5-72B: 80 layers of width 8,192; a layer has 877,658,112 weights and 26,624 values in norms and biases.
WEIGHTS = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 29568 * 8192
LAYER = WEIGHTS // 2 + WEIGHTS // 64 + 2 * (2 * 8192 + 8192 + 2 * 1024)
TABLE = 152064 * 8192 * 2


def shared(*overrides: str, group: int = 8, **settings) -> PlanInputs:
    words = ("train.batch_size=16", "train.micro_batch_size=1", *overrides)
    return replace(run(*words, **settings), shard_ranks=group)


def test_a_step_gathers_each_layer_twice_a_pass_and_both_tables_once():
    traffic = step_traffic(shared(), 1)
    assert (WEIGHTS, traffic.passes) == (877_658_112, 2)
    assert list(traffic.forward) == list(traffic.backward) == [LAYER] * 80
    adapter = 80 * 8 * ((8192 + 8192) + (8192 + 1024)) * 4  # rank 8 on q and v, in fp32
    assert traffic.parts == {
        "layers": 2 * 2 * 80 * LAYER,
        "embedding and head": 2 * 2 * TABLE,
        "gradients": adapter,
    }


def test_a_rank_of_a_ring_sends_all_but_its_own_share_and_gradients_twice():
    traffic, sent = step_traffic(shared(), 1).parts, sent_bytes(shared(), 1)
    assert sent == {
        "layers": traffic["layers"] * 7 / 8,
        "embedding and head": traffic["embedding and head"] * 7 / 8,
        "gradients": 2 * traffic["gradients"] * 7 / 8,
    }
    whole = replace(shared(), shard_ranks=1)
    assert sent_bytes(whole, 1) == {"gradients": sent["gradients"]}
    assert sent_bytes(replace(whole, ranks=1), 1) == {}


def test_backward_gathers_no_layer_below_the_lowest_adapter():
    traffic = step_traffic(shared("lora.layers_to_transform=[78,79]"), 1)
    assert len(traffic.forward) == 80 and len(traffic.backward) == 2
    assert len(step_traffic(shared("lora.layers_to_transform=[0]"), 1).backward) == 80


def test_parts_of_a_tensor_are_padded_to_the_same_number_of_rows():
    size = "0.5B"
    whole, split = shared(group=2, ranks=2, nodes=1, size=size), shared(group=3, ranks=3, nodes=1, size=size)
    two, three = step_traffic(whole, 1).forward[0], step_traffic(split, 1).forward[0]
    # Of three ranks: vectors of 896 and 128 values become 897 and 129; codes and scales are padded in single bytes.
    assert 0 < three - two - 2 * (3 * 1 + 2 * 1) < 2 * 7 * 2
    tables = 2 * 896 * 2
    assert step_traffic(whole, 1).tables == 151936 * tables and step_traffic(split, 1).tables == 151938 * tables


def test_a_reference_is_one_more_pass_without_gradients():
    words = ("preference.objective=dpo", "preference.reference=base")
    traffic = step_traffic(shared(*words), 1)
    assert traffic.parts["passes without gradients"] == traffic.passes * (80 * LAYER + 2 * TABLE)


SLOW, FAST = 1e9, 1e12


def waits(inputs: PlanInputs, layer_seconds: float, *, recomputed: int = 0, **link) -> dict[str, float]:
    memory = replace(estimate_memory(inputs, None), recomputed=recomputed)
    speeds = {"inside": SLOW, "between": SLOW, "host": SLOW, "overlaps": True, "source": ""}
    return waiting_seconds(inputs, memory, layer_seconds, Link(**{**speeds, **link}))


def test_without_overlap_every_gather_is_waited_for():
    inputs = shared()
    found = waits(inputs, 1e9, overlaps=False)
    sent = sent_bytes(inputs, 1)
    assert found["exchanging gradients"] == pytest.approx(sent["gradients"] / SLOW)
    assert found["gathering weights"] == pytest.approx((sent["layers"] + sent["embedding and head"]) / SLOW)


def test_two_ranks_of_gloo_do_not_send_and_receive_at_once():
    pair, four = run(ranks=2, nodes=2, kind="cpu"), run(ranks=4, nodes=2, kind="cpu")
    for inputs, share in ((pair, 0.6), (four, 1.0)):
        found, sent = waits(inputs, 1.0, overlaps=False), sent_bytes(inputs, 1)
        assert found["exchanging gradients"] == pytest.approx(sent["gradients"] / (share * SLOW))
    assert waits(pair, 1.0)["exchanging gradients"] == pytest.approx(sent_bytes(pair, 1)["gradients"] / SLOW)


def test_with_overlap_a_layer_hides_the_gather_of_the_next_one():
    inputs, gather, tables = shared(), LAYER * 7 / 8 / SLOW, 2 * TABLE * 7 / 8 / SLOW
    hidden = waits(inputs, 2 * gather)["gathering weights"]
    assert hidden == pytest.approx(2 * (tables + 2 * gather))  # the first one of each direction
    half = waits(inputs, gather / 2)["gathering weights"]
    assert half == pytest.approx(2 * (tables + 2 * (gather + 79 * gather / 2)))
    # 79 layers are recomputed: their backward pass takes as long as the gather of the next one.
    recomputed = waits(inputs, gather / 2, recomputed=79)["gathering weights"]
    assert recomputed == pytest.approx(2 * (tables + 2 * gather + (79 + 1) * gather / 2))


def test_gathers_of_hybrid_sharding_stay_in_the_node():
    full, hybrid = shared(), shared("parallel.shard=hybrid", group=4)
    fast_inside = {"inside": FAST, "overlaps": False}
    assert waits(full, 1.0, **fast_inside) == pytest.approx(waits(full, 1.0, overlaps=False))
    found = waits(hybrid, 1.0, **fast_inside)
    sent = sent_bytes(hybrid, 1)
    assert found["gathering weights"] == pytest.approx((sent["layers"] + sent["embedding and head"]) / FAST)
    assert found["exchanging gradients"] == pytest.approx(sent["gradients"] / SLOW)


def test_an_offloaded_part_is_copied_to_the_gpu_before_each_gather():
    plain, offloaded = shared("parallel.shard=full"), shared("parallel.shard=full", "parallel.offload=true")
    traffic = step_traffic(plain, 1).parts
    copied = (traffic["layers"] + traffic["embedding and head"]) / 8 / SLOW
    more = (
        waits(offloaded, 1e9, overlaps=False)["gathering weights"]
        - waits(plain, 1e9, overlaps=False)["gathering weights"]
    )
    assert more == pytest.approx(copied)


def test_the_given_speed_is_that_of_the_slowest_kind_of_link():
    one, two = run(ranks=8, nodes=1), run(ranks=8, nodes=2)
    assert link_of(one, 80, 450e9).inside == 10e9
    found = link_of(two, 80, 450e9)
    assert found.between == 10e9 and found.inside == pytest.approx(0.7 * 450e9) and found.overlaps
    assert link_of(run(kind="cpu", ranks=2, nodes=1), 8, None).inside == 1e9
    assert not link_of(run(kind="cpu", ranks=2, nodes=1), None, None).overlaps
