"""Rounds of federated learning by real runs: equal A, exact averages, and the laws of other runs with a frozen A."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune import load_config, train
from finetune.system.manifest import record_files
from finetune.system.resources import packaged
from tests.commands import run_here, train_on_ranks
from tests.equivalence.test_sharding import DETERMINISTIC
from tests.runs import SMALL_RUN, adapter, differing, metrics, reference_run, small_run

FROZEN = "lora.freeze_a=true"
# Without evaluations; the parties' rows, steps and batches differ.
PARTY = (FROZEN, "data.eval=[]", "train.learning_rate=5e-3")
PARTIES = {
    "a": ("data.train.0.limit=24", "train.max_steps=2"),
    "b": ("data.train.0.limit=48", "train.max_steps=3", "data.packing=false"),
    "c": ("data.train.0.limit=96", "train.max_steps=2", "train.batch_size=2"),
}
WEIGHTS = {"a": 24, "b": 48, "c": 96}


def finetune(*words: str, cwd: Path) -> str:
    done = run_here(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stderr


def one_round(folder: Path, start: Path | None) -> Path:
    """Train, clip and average as docs/federated.md says; returns the new global adapter."""
    begin = [] if start is None else [f"lora.init_adapter={start}"]
    origin = [] if start is None else [f"start={start}"]
    for name, own in PARTIES.items():
        train(small_run(folder / name, *PARTY, *own, *begin))
        finetune("clip", f"adapter={name}", *origin, f"out=sent-{name}", "max_norm=0.05", cwd=folder)
    weights = f"weights={list(WEIGHTS.values())}"
    finetune(
        "aggregate", "adapters=[sent-a, sent-b, sent-c]", weights, *origin, "out=mean", "max_norm=0.05", cwd=folder
    )
    return folder / "mean"


def test_two_rounds_of_three_parties_average_their_clipped_updates(tmp_path):
    first = one_round(tmp_path / "1", None)
    second = one_round(tmp_path / "2", first)
    for mean, start in ((first, None), (second, adapter(first))):
        sent = {name: adapter(mean.parent / f"sent-{name}") for name in PARTIES}
        trained = {name: adapter(mean.parent / name) for name in PARTIES}
        result, total = adapter(mean), sum(WEIGHTS.values())
        origin = start or {name: torch.zeros_like(tensor) for name, tensor in result.items() if "lora_B" in name}
        for name, tensor in result.items():
            if "lora_A" in name:
                assert all(torch.equal(tensor, each[name]) for each in (*sent.values(), *trained.values()))
                continue
            wanted = sum(WEIGHTS[each] / total * sent[each][name].double() for each in PARTIES)
            torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-8)
        for each in PARTIES:
            moved = {n: (trained[each][n] - origin[n]).double() for n in origin if "lora_B" in n}
            norm = torch.stack([value.norm() for value in moved.values()]).norm()
            factor = min(1.0, 0.05 / float(norm))
            assert norm > 0
            for name, value in moved.items():
                torch.testing.assert_close(sent[each][name].double() - origin[name], factor * value, rtol=0, atol=1e-7)
    assert not torch.equal(adapter(first)[name], adapter(second)[name])
    base = packaged("data") / "tiny-qwen2.5"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), second)
    assert all(torch.equal(tensor, adapter(second)[name]) for name, tensor in get_peft_model_state_dict(loaded).items())
    finetune("merge", "adapter=2/mean", "out=merged", "kl_check.num_examples=0", cwd=tmp_path)


def test_a_run_that_trained_a_or_started_elsewhere_is_not_clipped_from_zero(tmp_path):
    for run, named in (
        (reference_run(), "lora.freeze_a"),
        (reference_run(FROZEN, f"lora.init_adapter={reference_run()}"), "start="),
    ):
        done = run_here("clip", f"adapter={run}", "out=sent", cwd=tmp_path)
        assert done.returncode != 0 and named in done.stderr and not (tmp_path / "sent").exists()


def test_a_round_of_one_party_is_continued_training(tmp_path):
    once = reference_run(*PARTY)
    finetune("aggregate", f"adapters=[{once}]", "weights=[7]", "out=mean", cwd=tmp_path)
    assert not differing(once, tmp_path / "mean")
    for name, start in (("direct", once), ("round", tmp_path / "mean")):
        train(small_run(tmp_path / name, *PARTY, "train.max_steps=2", f"lora.init_adapter={start}"))
    assert not differing(tmp_path / "direct", tmp_path / "round")


def test_a_resumed_run_takes_its_frozen_a_from_the_checkpoint(tmp_path):
    start = tmp_path / "start"
    shutil.copytree(reference_run(*PARTY), start)
    settings = (*PARTY, "train.save_every=2", "train.keep_checkpoints=5", f"lora.init_adapter={start}")
    train(small_run(tmp_path / "unbroken", *settings))
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2")
    tensors = load_file(start / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, start / "adapter_model.safetensors")
    record_files(start, ["adapter_model.safetensors"])
    train(small_run(tmp_path / "broken", *settings, "train.resume=auto"))
    assert not differing(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_ranks_with_a_frozen_a_equal_one(tmp_path, shard):
    settings = (*SMALL_RUN, *PARTY, *DETERMINISTIC)
    one, two = tmp_path / "1", tmp_path / "2"
    train(load_config("quickstart.yaml", [*settings, f"output_dir={one}"]))
    train_on_ranks(2, *settings, "train.world_size=2", f"parallel.shard={shard}", f"output_dir={two}")
    expected = adapter(one)
    for name, tensor in adapter(two).items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        assert "lora_A" not in name or torch.equal(tensor, expected[name])
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
