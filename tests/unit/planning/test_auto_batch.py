"""A run recomputes before it makes its batches smaller, and logs its choice with the reason."""

from __future__ import annotations

import pytest

from finetune import load_config
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.activations import plan_activations
from finetune.planning.auto_batch import choose_micro_batch, largest_micro_batch, place_embedding
from finetune.planning.describe import describe_plan
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.peak_memory import predict_peak

SHAPE = QWEN25_SHAPES["0.5B"]


def run(*overrides: str, shape=SHAPE, device_type: str = "cpu", ranks: int = 1) -> PlanInputs:
    cfg = load_config(
        "lora.yaml", ["data.max_length=512", "train.gradient_checkpointing=auto", *overrides], needs_data=False
    )
    return plan_inputs(cfg, shape, device_type=device_type, ranks=ranks)


def test_a_cpu_takes_fewer_tokens_at_a_time_than_a_gpu():
    for settings, expected in (((), [4, 16]), (("data.max_length=65536",), [1, 1])):
        found = [largest_micro_batch(run(*settings, device_type=device)) for device in ("cpu", "cuda")]
        assert found == expected
    assert [largest_micro_batch(run("train.micro_batch_size=7", ranks=ranks)) for ranks in (1, 4)] == [7, 4]


def test_auto_recomputes_as_little_as_fits_then_shrinks_the_micro_batch():
    inputs = run()
    plan = plan_activations(inputs, 4)
    choices = [choose_micro_batch(inputs, share * plan.peak_bytes(0)) for share in (1, 0.7, 0.2, 0.05, 0)]
    assert choices[0].recompute == "none"
    assert isinstance(choices[1].recompute, int) and 0 < choices[1].recompute < 23
    assert plan.peak_bytes(choices[1].recompute) <= 0.7 * plan.peak_bytes(0)
    assert [choice.micro_batch for choice in choices[:2]] == [4, 4]
    assert choices[-2].micro_batch < 4 and choices[-1].micro_batch == 1
    assert "of 24" in choices[1].text and "without_recomputing" in choices[1].text
    assert "from 4" in choices[-1].text and "WARNING" in choices[-1].text
    assert "WARNING" not in choices[1].text


def test_given_settings_stay():
    for setting in ("none", "all", "offload", 3):
        inputs = run(f"train.gradient_checkpointing={setting}", device_type="cuda")
        assert choose_micro_batch(inputs, 0).recompute == setting
    assert choose_micro_batch(run("train.micro_batch_size=4", device_type="cuda"), 0).micro_batch == 4


def test_offload_on_a_cpu_is_the_same_as_all():
    cpu, gpu = (run("train.gradient_checkpointing=offload", device_type=device) for device in ("cpu", "cuda"))
    assert "the same as all" in choose_micro_batch(cpu, 2**40).text
    assert "recomputed_layers=23 of 24 (inputs in main memory: " in choose_micro_batch(gpu, 2**40).text


def test_unknown_memory_counts_as_short():
    choice = choose_micro_batch(run(device_type="mps"), None)
    assert choice.recompute == "all" and "unknown" in choice.text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_names_the_memory_with_and_without_recomputing(device):
    text = describe_plan(run(device_type=device))
    assert "memory of activations" in text and "train.gradient_checkpointing=auto" in text
    assert "unknown" in describe_plan(run(shape=None, device_type=device))


def test_too_little_main_memory_for_offloading_is_a_warning(monkeypatch):
    offload = run("train.gradient_checkpointing=offload", device_type="cuda")
    monkeypatch.setattr("finetune.planning.auto_batch.available_memory", lambda: 1e6)
    assert "WARNING: main memory: " in describe_plan(offload)
    assert "WARNING" not in describe_plan(run(device_type="cuda"))
    monkeypatch.setattr("finetune.planning.auto_batch.available_memory", lambda: 1e12)
    text = describe_plan(offload)
    assert "WARNING" not in text and "main memory: " in text


def test_the_plan_names_the_largest_parts_of_the_peak():
    """The process is the largest part of a tiny model's memory, not its weights."""
    small, large = (
        describe_plan(run(*overrides, shape=QWEN25_SHAPES[size])).partition("most of it: ")[2]
        for size, overrides in (("0.5B", ("data.max_length=64", "train.micro_batch_size=1")), ("72B", ()))
    )
    assert small.startswith("process and libraries 0.47 GB, ")
    assert large.startswith("linears in nf4 ") and large.count(" GB") == 3


def test_the_embedding_stays_in_main_memory_where_layers_are_recomputed_or_memory_is_short():
    shape = QWEN25_SHAPES["7B"]

    def placed(*overrides: str, free_gb: float = 40, device_type: str = "cuda", **options) -> str:
        inputs = run(*overrides, device_type=device_type, **{"shape": shape, **options})
        return place_embedding(inputs, free_gb * 1e9).model.embedding

    assert placed() == placed("train.gradient_checkpointing=none") == "device"
    assert placed(free_gb=8) == placed("train.gradient_checkpointing=none", free_gb=8) == "host"
    for recomputing in ("all", "offload", "3"):
        assert placed(f"train.gradient_checkpointing={recomputing}") == "host"
        assert placed(f"train.gradient_checkpointing={recomputing}", "model.embedding=device") == "device"
        for cannot in (["lora.new_tokens=['<a>']"], ["lora.modules_to_save=[embed_tokens]"]):
            assert placed(f"train.gradient_checkpointing={recomputing}", *cannot) == "device"
    assert placed(free_gb=1, shape=SHAPE) == placed(free_gb=1, device_type="cpu") == "device"
    assert placed("model.embedding=host", free_gb=40) == "host"


def test_an_embedding_in_main_memory_is_counted_there():
    settings = {"shape": QWEN25_SHAPES["7B"], "device_type": "cuda"}
    on_device, on_host = (run(f"model.embedding={place}", **settings) for place in ("device", "host"))
    table = 152_064 * 3584 * 2
    before, after = (predict_peak(inputs, 1, 3) for inputs in (on_device, on_host))
    assert before.peak_bytes - after.peak_bytes == table
    assert after.host_bytes == table + 512 * 3584 * 2 and before.host_bytes == 0
    assert predict_peak(run("model.embedding=host", **settings | {"device_type": "cpu"}), 1, 3).host_bytes == 0
