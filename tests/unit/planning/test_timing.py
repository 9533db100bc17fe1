"""A step's operations are those of the mathematics; its seconds follow the rates that were measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.flops import attention_flops, step_flops
from finetune import load_config
from finetune.config.command_options import PlanOptions
from finetune.models.families import QWEN25_SHAPES
from finetune.planning import calibrate, timing
from finetune.planning.flops import StepWork, step_work
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.timing import Rates, assumed_ceiling, read_rates, step_seconds, steps_of, write_rates
from finetune.system.sealed import unseal

SHAPE = QWEN25_SHAPES["0.5B"]
RATES = Rates(
    "a machine",
    [[1e5, 100.0, 1e9], [1e5, 1000.0, 2e9], [1e7, 100.0, 3e9], [1e7, 1000.0, 4e9]],
    [[128.0, 1e9]],
    elementwise=1e9,
    dequantized=[[1e6, 1e9], [1e8, 1e8]],
    logits=1e9,
    trained=1e9,
    layer_seconds=1e-3,
)


def run(*overrides: str, shape=SHAPE) -> PlanInputs:
    cfg = load_config("lora.yaml", ["data.max_length=1024", "train.batch_size=4", *overrides], needs_data=False)
    return plan_inputs(cfg, shape, device_type="cpu")


def work(*overrides: str, recomputed: int = 0, micro: int = 1) -> StepWork:
    return step_work(run(*overrides), micro, recomputed)


def test_operations_are_those_of_the_mathematics():
    """4 a weight and token, but for the first layer's q, k and v, whose input needs no gradient."""
    found, tokens = work(), 4 * 1024
    first = 2.0 * tokens * sum(o * i for o, i in ((896, 896), (128, 896), (128, 896)))
    assert sum(found.products.values()) == step_flops(SHAPE, tokens, tokens) - first
    assert found.attention == attention_flops(SHAPE, tokens, 1024)
    assert found.flops == pytest.approx(sum(found.products.values()), rel=0.2)


def test_recomputing_adds_a_forward_pass_but_the_frozen_down_projections():
    plain, twice = work(), work(recomputed=23)
    linears = sum(o * i for o, i in ((896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896)))
    assert sum(twice.products.values()) - sum(plain.products.values()) == 2.0 * 4096 * 23 * linears
    assert twice.attention > plain.attention and twice.elementwise > plain.elementwise


def test_weights_are_dequantized_once_a_forward_pass_and_never_where_they_are_resident():
    once, four = (sum(work(micro=micro).dequantized.values()) for micro in (4, 1))
    assert four == 4 * once > 0
    for setting in ("quant.keep_dequantized=true", "quant.type=none"):
        assert not any(work(setting).dequantized.values())


def test_layers_below_the_first_adapter_have_no_backward_pass():
    assert work("lora.layers_to_transform=[23]").flops < 0.7 * work().flops


def test_a_teacher_runs_forward_and_a_cached_one_does_not():
    cached = work("distill=recover", "distill.teacher.placement=cached", "distill.cache=folder")
    assert work("distill=recover").flops > 1.4 * work().flops and cached.flops == work().flops


def test_rates_between_measured_points_lie_between_them():
    rate = timing._rate_of_product
    assert [rate(RATES.products, *point) for point in ((1e5, 100), (1e7, 1000), (1e3, 1), (1e9, 1e6))] == [
        1e9,
        4e9,
        1e9,
        4e9,
    ]
    assert rate(RATES.products, 1e6, 100) == pytest.approx(2e9) and 1e9 < rate(RATES.products, 1e5, 300) < 2e9


def test_twice_the_rate_is_half_the_time_of_what_it_is_the_rate_of():
    before = step_seconds(run(), work(), RATES)
    after = step_seconds(run(), work(), replace(RATES, logits=2e9))
    assert after["loss"] == before["loss"] / 2
    assert {**after, "loss": 0} == {**before, "loss": 0}


def test_weights_of_large_matrices_take_longer_to_dequantize():
    """RATES: a billion a second in matrices of a million, a tenth of that from a hundred million on."""
    for size, least, most in (("0.5B", 1e9, 4e8), ("7B", 8e8, 1e8)):
        inputs = run(shape=QWEN25_SHAPES[size])
        found = step_work(inputs, 1, 0)
        seconds = step_seconds(inputs, found, RATES)["dequantizing"]
        assert sum(found.dequantized.values()) / least < seconds < sum(found.dequantized.values()) / most


def test_what_was_measured_is_kept_by_kind_of_device(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "new"))
    assert read_rates("cpu") is None
    file = write_rates("cpu", RATES)
    write_rates("cuda", replace(RATES, device="a GPU"))
    assert read_rates("cpu") == RATES and read_rates("cuda") == replace(RATES, device="a GPU")
    stored = unseal(json.loads(file.read_text()))
    stored["cpu"]["layout"] = 0
    file.write_text(json.dumps(stored))
    assert read_rates("cpu") is None
    file.write_text("{")
    assert read_rates("cuda") is None
    assert read_rates("cpu") is None and write_rates("cpu", RATES) == file and read_rates("cpu") == RATES


def test_a_calibration_measures_every_rate(monkeypatch):
    for name, small in (
        ("_MATRICES", ((32, 16), (64, 64))),
        ("_ROWS", (8, 16)),
        ("_DOCUMENTS", (8, 32)),
        ("_TOKENS", 64),
        ("_VOCABULARY", 512),
        ("_CHUNK", 4),
        ("_INNER", 128),
        ("_HIDDEN", 64),
        ("_HEADS", 2),
        ("_KEY_HEADS", 1),
        ("_WIDTH", 32),
        ("_REPEATS", 1),
        ("_DEQUANTIZED", ((64, 64), (64, 128))),
    ):
        monkeypatch.setattr(calibrate, name, small)
    rates = calibrate.measure_rates(torch.device("cpu"), "here", lambda text: None)
    assert [len(rates.products), len(rates.attention), len(rates.dequantized)] == [4, 2, 2]
    numbers = [rate for *_, rate in (*rates.products, *rates.attention, *rates.dequantized)]
    numbers += [rates.elementwise, rates.logits, rates.trained, rates.layer_seconds]
    assert all(number > 0 for number in numbers)


def test_assumed_rates_say_so():
    for device, gpu in (("cpu", None), ("cuda", "NVIDIA A100-SXM4-80GB"), ("cuda", "unheard of")):
        rate, words = assumed_ceiling(device, gpu)
        assert rate > 0 and words.startswith("assumed")
    assert assumed_ceiling("cuda", "NVIDIA H100 80GB HBM3")[0] > assumed_ceiling("cuda", "NVIDIA A100-SXM4-80GB")[0]


def test_steps_come_from_the_setting_the_user_or_the_files(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("x" * 43_000)
    source = f"data.train=[{{path: '{rows}'}}]"
    assert steps_of(run("train.max_steps=7"), None) == (7, "")
    assert steps_of(run("train.epochs=2"), 40_960) == (20, "")
    steps, words = steps_of(run(source, "train.epochs=3"), None)
    assert steps == 8 and "estimated" in words  # 10,000 tokens an epoch, 4,096 a step
    assert steps_of(run("data.train=[{path: somebody/rows}]"), None) == (None, "")
    assert PlanOptions().tokens is None


def test_a_reference_costs_a_forward_pass_and_a_cached_one_nothing():
    plain, tokens = work(), 4 * 1024
    found = work("preference.objective=dpo")
    layers = SHAPE["num_hidden_layers"]
    weights = sum(out * size for out, size in run().linears.values()) * layers
    forward = 2.0 * tokens * (weights + SHAPE["vocab_size"] * SHAPE["hidden_size"])
    assert sum(found.products.values()) - sum(plain.products.values()) == pytest.approx(forward)
    assert sum(found.dequantized.values()) - sum(plain.dequantized.values()) == pytest.approx(4 * weights)
    # A pair that fills a sequence is two documents of half its length.
    without = replace(plain, attention=plain.attention / 2)
    assert work("preference.objective=dpo", "preference.reference=cached", "preference.cache=c") == without
    assert work("preference.objective=simpo") == without
