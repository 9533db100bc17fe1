"""A run that ran out of memory has the bits of one with the smaller micro-batch from that step on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune import load_config, train
from finetune.system.errors import ResourceError
from finetune.system.resources import packaged
from finetune.training.checkpoint import read_state
from tests.commands import ROOT
from tests.memory_faults import micro_batch_from, out_of_memory_in
from tests.runs import REWARDED_RUN, SMALL_RUN, differing, metrics, result

FAULTS = str(ROOT / "tests" / "memory_faults.py")
PLAIN = (*SMALL_RUN, "data.eval=[]", "train.micro_batch_size=4", "train.schedule=constant")
TEACHER = (*PLAIN, "distill.objective=sft+anchor", "distill.teacher.placement=streamed")
SAMPLE = packaged("data") / "sample"
PAIRS = (
    *PLAIN,
    f"data.train=[{{path: {SAMPLE / 'pairs.jsonl'}, limit: 32}}]",
    "data.max_length=256",
)
RUNS = {
    "answers": PLAIN,
    "teacher": (*TEACHER, "distill.teacher.steps_ahead=2"),
    "pairs": (*PAIRS, "preference.objective=dpo"),
    "kto": (*PAIRS, "preference.objective=kto"),
    "rewards": (*REWARDED_RUN, "data.packing=false", "train.max_steps=4", "reward.updates=2", "train.eval_every=null"),
}


def run(folder: Path, *settings: str) -> Path:
    train(load_config("quickstart.yaml", [*settings, f"output_dir={folder}"]))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_objective_repeats_a_step_that_ran_out(tmp_path, name, capsys):
    """With rewards the second update runs out: the first one stored log-probabilities of larger passes."""
    micro = 2 if name == "rewards" else 4
    settings = (*RUNS[name], f"train.micro_batch_size={micro}")
    with out_of_memory_in(step=2):
        found = run(tmp_path / "found", *settings)
    with micro_batch_from(2, micro // 2):
        expected = run(tmp_path / "expected", *settings)
    assert differing(found, expected) == []
    assert metrics(found) == metrics(expected)
    assert (result(found)["micro_batch"], result(found)["halvings"]) == (
        micro // 2,
        [{"step": 2, "micro_batch": micro // 2}],
    )
    assert f"micro_batch={micro // 2}" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_smaller_micro_batch(tmp_path):
    settings = (*PLAIN, "train.save_every=1", "train.keep_checkpoints=9")
    with out_of_memory_in(step=2):
        whole = run(tmp_path / "whole", *settings)
    broken = tmp_path / "broken"
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    run(broken, *settings, "train.resume=auto")
    assert differing(whole, broken) == []
    assert read_state(broken / "checkpoint-4").choices["micro_batch"] == 2
    assert result(broken)["halvings"] == [{"step": 2, "micro_batch": 2}]


def test_memory_for_no_sequence_ends_the_run_before_its_first_step(tmp_path):
    settings = (*PLAIN, "train.micro_batch_size=1", "train.gradient_checkpointing=none", "data.max_length=2048")
    with out_of_memory_in(step=0), pytest.raises(ResourceError) as raised:
        run(tmp_path, *settings)
    assert "predicted_peak=" in str(raised.value) and " saves " in str(raised.value)
    assert (result(tmp_path)["status"], result(tmp_path)["steps"]) == ("failed", 0)


def faulty(
    fault: str, *settings: str, ranks: int = 1, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, FAULTS, fault, "config=quickstart.yaml", *settings]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, **(environment or {})}
    )


def test_two_ranks_halve_together_when_one_runs_out(tmp_path):
    """Rank 1 runs out in the largest pass, before step 1; and in the second pass of step 2."""
    settings = (*PLAIN, "train.batch_size=8", "train.world_size=2")
    early = faulty("error=1,0,1", *settings, f"output_dir={tmp_path / 'early'}", ranks=2)
    late = faulty("error=1,2,1", *settings, f"output_dir={tmp_path / 'late'}", ranks=2)
    smaller = faulty(
        "error=-1,0,0", *settings, "train.micro_batch_size=2", f"output_dir={tmp_path / 'smaller'}", ranks=2
    )
    assert [done.returncode for done in (early, late, smaller)] == [0, 0, 0], early.stderr[-3000:] + late.stderr[-3000:]
    assert differing(tmp_path / "early", tmp_path / "smaller") == []
    assert result(tmp_path / "early")["halvings"] == [{"step": 1, "micro_batch": 2}]
    assert result(tmp_path / "late")["halvings"] == [{"step": 2, "micro_batch": 2}]


def test_a_sharded_run_leaves_the_smaller_micro_batch_to_its_next_start(tmp_path):
    settings = (*PLAIN, "train.batch_size=8", "parallel.shard=full", f"output_dir={tmp_path}", "train.resume=auto")
    done = faulty("error=0,0,1", *settings, ranks=2)
    assert done.returncode != 0 and "micro_batch=2" in done.stderr
    assert json.loads((tmp_path / "out_of_memory.json").read_text())["choices"]["micro_batch"] == 2
    done = faulty("error=-1,0,0", *settings, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert result(tmp_path)["micro_batch"] == 2
    assert result(tmp_path)["halvings"] == [{"step": 1, "micro_batch": 2}]


def test_a_limit_of_memory_is_met_with_smaller_passes(tmp_path):
    """glibc's heap keeps its addresses when memory is free, so large blocks are mapped: their addresses return."""
    settings = (*PLAIN, "data.max_length=1024", "train.batch_size=16", "train.micro_batch_size=16")
    settings += ("data.train.0.limit=900", "train.max_steps=1", "train.gradient_checkpointing=none")
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = faulty("limit=350", *settings, f"output_dir={tmp_path}", environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert result(tmp_path)["micro_batch"] < 16 and result(tmp_path)["halvings"][0]["step"] == 1
