"""Runs on pictures and sounds keep the laws of runs on text: exact resume, ranks, teachers, preferences, rewards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune import load_config, train
from finetune.system.errors import ConfigError, IntegrityError
from finetune.system.resources import packaged
from tests.commands import train_on_ranks
from tests.runs import adapter, metrics, result

SAMPLE = packaged("data") / "sample"
SMALL = (
    f"model.name={packaged('data') / 'tiny-qwen2.5-omni'}",
    f"data.train=[{{path: {SAMPLE / 'both.jsonl'}, limit: 24}}, {{path: {SAMPLE / 'train.jsonl'}, limit: 8}}]",
    f"data.eval=[{{path: {SAMPLE / 'both-heldout.jsonl'}, limit: 6}}]",
    "data.max_length=256",
    "train.batch_size=4",
    "train.max_steps=4",
    "train.learning_rate=2e-3",
    "generation.num_examples=4",
    "generation.max_new_tokens=16",
    "lora.dropout=0.1",
)
FP32 = ("model.dtype=float32", "quant.compute_dtype=float32", "lora.dropout=0")


def run(folder: Path, *settings: str) -> Path:
    train(load_config("quickstart.yaml", [*SMALL, f"output_dir={folder}", *settings]))
    return folder


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("media") / "unbroken", "train.eval_every=2")


def test_a_resumed_run_equals_an_unbroken_one(unbroken, tmp_path):
    folder = run(tmp_path / "resumed", "train.eval_every=2", "train.save_every=2")
    shutil.rmtree(folder / "checkpoint-4")
    run(folder, "train.eval_every=2", "train.save_every=2", "train.resume=auto")
    assert_same_bits(folder, unbroken)
    assert metrics(folder) == metrics(unbroken)


def test_cached_embeddings_give_the_bits_of_computed_ones(unbroken, tmp_path):
    computed = run(tmp_path / "computed", "train.eval_every=2", "data.media_cache=false")
    assert_same_bits(computed, unbroken)
    assert metrics(computed) == metrics(unbroken)


@pytest.mark.parametrize("towers", [(), ("lora.towers=[vision,audio]",)], ids=["frozen", "adapted"])
def test_two_ranks_equal_one(tmp_path, towers):
    settings = (*FP32, *towers, "train.micro_batch_size=1", "train.batch_size=3", "data.packing=false")
    one = run(tmp_path / "one", *settings)
    train_on_ranks(2, *SMALL, *settings, f"output_dir={tmp_path / 'two'}")
    expected = adapter(one)
    assert any("audio_tower" in name for name in expected) == bool(towers)
    for name, tensor in adapter(tmp_path / "two").items():
        # Adam divides by the size of a gradient: a weight whose gradient is a rounding error of the sum moves as others
        # do (seen: 2e-4 of the largest weight, in 1 of 74 tensors). So the tensor is compared as a whole.
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-4, name
    assert result(one)["exact_match_before"] == result(tmp_path / "two")["exact_match_before"]


def test_the_same_weights_teach_what_quantization_lost(tmp_path):
    folder = run(tmp_path, "distill.objective=recover", "train.max_steps=8")
    found = result(folder)
    assert 0 < found["teacher_kl_after"] < found["teacher_kl_before"]
    # Unquantized, the student is the teacher: media and text give equal states, and no gradient.
    with pytest.raises(IntegrityError, match="nothing was trained"):
        run(tmp_path / "16", "distill.objective=recover", "quant.type=none", "train.max_steps=1")


def test_a_streamed_teacher_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="only a resident teacher reads"):
        run(tmp_path, "distill.objective=recover", "distill.teacher.placement=streamed")


def pairs(folder: Path) -> Path:
    """Write rows whose rejected answer is that of the next row."""
    rows = [json.loads(line) for line in (SAMPLE / "both.jsonl").read_text().splitlines()[:16]]
    for row in rows:
        for key in ("images", "audios"):
            row[key] = [str(SAMPLE / file) for file in row.get(key, [])]
    lines = [
        {
            "prompt": row["messages"][:-1],
            "chosen": row["messages"][-1:],
            "rejected": other["messages"][-1:],
            **{key: row[key] for key in ("images", "audios")},
        }
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        if row["messages"][-1] != other["messages"][-1]
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_preferences_between_answers_to_media_are_learned(tmp_path):
    data = (f"data.train=[{{path: {pairs(tmp_path)}}}]", f"data.eval=[{{path: {tmp_path / 'pairs.jsonl'}}}]")
    folder = run(tmp_path / "run", *data, "preference.objective=dpo", "train.max_steps=8", "train.eval_every=8")
    found = metrics(folder)
    assert found[-1]["eval/pairs/reward_accuracy"] > 0.8


def test_rewards_of_sampled_answers_to_media_are_learned_from(tmp_path):
    rewards = ("reward.loss=grpo", "reward.functions={length: 1}", "reward.length=2", "reward.max_new_tokens=12")
    folder = run(tmp_path, *rewards, "reward.group_size=4", "lora.dropout=0", "train.batch_size=2", "train.max_steps=3")
    gaps = [line["train/sampling_gap"] for line in metrics(folder) if "train/sampling_gap" in line]
    assert gaps and max(gaps) < 0.08
