"""Answers share their prompt in rows but not in places; the memory and time of sampling them follow the batches."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from finetune import load_config
from finetune.evaluation import generation
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.auto_batch import keep_copies
from finetune.planning.flops import step_work
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.peak_memory import predict_peak
from finetune.planning.sampling import cache_bytes, evaluated_batch, sampled_batch, sampling_work
from finetune.planning.timing import steps_of
from tests.models import random_qwen2

SHAPE = QWEN25_SHAPES["0.5B"]
GRPO = ("reward.loss=grpo", "reward.functions={exact: 1}", "reward.max_new_tokens=100", "data.max_length=1024")


def run(*overrides: str, prompt: int | None = None, kind: str = "cpu", ranks: int = 1) -> PlanInputs:
    cfg = load_config("lora.yaml", [*GRPO, "train.batch_size=4", *overrides], needs_data=False)
    return plan_inputs(cfg, SHAPE, device_type=kind, ranks=ranks).with_rows(prompt, 1.0)


@pytest.mark.parametrize(
    ("prompt", "overrides", "rows", "places", "prompts"),
    [
        (200, (), 1000, 2400, 1),
        (28, (), 828, 1024, 1),
        (28, ("data.max_length=2048",), 2 * 828, 2 * 1024, 2),
        (28, ("data.max_length=2048", "data.packing=false"), 828, 1024, 1),
        (28, ("data.max_length=2048", "train.batch_size=1"), 828, 1024, 1),
        (500, (), 1000, 5 * 600, 5 / 8),
        (200, ("train.share_prefixes=false",), 2400, 2400, 1),
        (200, ("reward.group_size=2",), 2 * 400, 2 * 600, 2),
    ],
)
def test_a_sequence_holds_whole_groups_or_a_part_of_one(prompt, overrides, rows, places, prompts):
    sequence = run(*overrides, prompt=prompt).sequence
    assert (sequence.rows, sequence.places, sequence.prompts) == (rows, places, prompts)
    assert sequence.document == prompt + 100


def test_without_lengths_the_places_are_an_upper_bound_of_those_of_any_lengths():
    unknown = run().sequence
    known = [run(prompt=prompt).sequence for prompt in range(1, 925, 7)]
    assert all(one.rows <= unknown.rows and one.places <= unknown.places for one in known)


def test_the_trained_share_tells_a_prompt_from_its_own_answer():
    inputs = run().with_rows(400, 0.25)
    assert inputs.answered_tokens == 300 + 100 and inputs.sequence.document == 400
    assert run().answered_tokens == 1024


def test_pairs_share_what_is_not_trained():
    cfg = load_config("lora.yaml", ["preference.objective=dpo", "data.max_length=1024"], needs_data=False)
    inputs = plan_inputs(cfg, SHAPE, device_type="cpu").with_rows(512, 0.25)
    assert (inputs.sequence.rows, inputs.sequence.places, inputs.sequence.document) == (640, 1024, 256)
    noisy = inputs.with_settings(lora={"dropout": 0.1})
    assert noisy.sequence.rows == 1024


def test_a_batch_of_answers_is_the_one_that_sampling_makes():
    for words, prompt in (((), 200), (("reward.group_size=16",), 30), (("data.max_length=16384",), 3000)):
        inputs = run(*words, prompt=prompt)
        batch, group = sampled_batch(inputs), inputs.reward.group_size
        made = list(generation._batches([prompt] * 4, [100] * 4, group))
        assert batch.count == max(map(len, made)) * group
        assert sampling_work(inputs).passes == len(made) * 100


def test_the_cache_has_the_bytes_of_its_tensors():
    model = random_qwen2("sdpa", torch.float32).eval()
    config, cache = model.config, DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(3, 40, dtype=torch.int64), past_key_values=cache, use_cache=True)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = {key: getattr(config, key) for key in SHAPE if hasattr(config, key)}
    cfg = load_config("lora.yaml", [*GRPO, "model.dtype=float32"], needs_data=False)
    assert cache_bytes(plan_inputs(cfg, shape, device_type="cpu"), 3 * 40) == measured


def test_sampling_is_a_moment_of_runs_that_sample_here():
    here, served = run(), run("reward.engine=server", "reward.url=http://host:8000")
    assert "sampling answers" in predict_peak(here, 1, 0).moments
    assert "sampling answers" not in predict_peak(served, 1, 0).moments
    parts = predict_peak(here, 1, 0).moments["sampling answers"]
    assert parts["key-value cache"] > cache_bytes(here, sampled_batch(here).count * 1024) > 0


def test_an_evaluation_answers_held_out_prompts():
    inputs = run("data.held_out=0.1", "generation.num_examples=20", "generation.batch_size=16", prompt=200)
    assert evaluated_batch(inputs).count == 16
    assert "key-value cache" in predict_peak(inputs, 1, 0).moments["evaluation"]


def test_a_reference_of_rewards_is_counted_and_copies_the_adapter_that_training_starts_from():
    plain, base = run(prompt=200), run("reward.beta=0.1", prompt=200)
    copied = run("reward.beta=0.1", "lora.init_adapter=folder", prompt=200)
    assert [inputs.runs_reference for inputs in (plain, base, copied)] == [False, True, True]
    assert [inputs.copies_adapter for inputs in (plain, base, copied)] == [False, False, True]
    assert step_work(base, 1, 0).flops > 1.2 * step_work(plain, 1, 0).flops
    assert "training step, as the reference runs" in predict_peak(base, 1, 0).moments
    assert predict_peak(copied, 1, 0).parts["reference adapter"] == 2 * copied.static.parts["gradients"]


def test_copies_of_4_bit_weights_are_kept_where_sampling_needs_them_and_they_fit():
    assert keep_copies(run(), 20e9).quant.keep_dequantized
    assert not keep_copies(run(), 1.5e9).quant.keep_dequantized
    for words, kind in (((), "cuda"), (("quant.type=none", "quant.double=false"), "cpu")):
        assert not keep_copies(run(*words, kind=kind), 1e12).quant.keep_dequantized
    plain = load_config("lora.yaml", needs_data=False)
    assert not keep_copies(plan_inputs(plain, SHAPE, device_type="cpu"), 1e12).quant.keep_dequantized


def test_a_step_trains_on_all_answers_to_its_prompts_and_an_epoch_is_all_prompts():
    inputs = run("reward.updates=2", "train.epochs=3", prompt=200)
    assert step_work(inputs, 1, 0).rows * inputs.step_sequences == 4 * 1000
    assert steps_of(inputs, 200 * 40) == (3 * 10 * 2, "")
    assert sampling_work(inputs).passes == sampling_work(run(prompt=200)).passes / 2
    assert steps_of(run("train.epochs=3"), 200 * 40) == (None, "")
