"""Under torch.use_deterministic_algorithms every path runs and ends in the bits of a run without it.

torch raises an error for an operation without a deterministic algorithm, and fills new memory with NaN, so a path that
reads memory before it writes it ends in other bits.
"""

from __future__ import annotations

import pytest
import torch

from finetune import train
from finetune.commands.cache import run as run_cache
from finetune.system.arguments import Arguments
from tests.runs import SMALL_RUN, differing, metrics, reference_run, small_run

# Without noise, so that documents share computed prefixes.
SHORT = (
    *("data.train.0.limit=32", "data.eval.0.limit=8", "train.max_steps=2"),
    *("lora.dropout=0", "train.neftune_alpha=0", "train.eval_every=1", "generation.max_new_tokens=4"),
)
PATHS = {
    "sft": ("generation.num_examples=2",),
    "all-linear": ("lora.target_modules=all-linear", "train.gradient_checkpointing=all"),
    "noise": ("lora.dropout=0.1", "train.neftune_alpha=5", "train.kernels=peft"),
    "new tokens": ('lora.new_tokens=["<a>"]',),
    "embedding and head": ("lora.modules_to_save=[embed_tokens,lm_head]",),
    "int8": ("quant.type=int8", "quant.double=false"),
    "teacher": ("distill.objective=sft+anchor",),
    "streamed teacher": ("distill.objective=recover", "distill.teacher.placement=streamed"),
    "own answers": ("distill.objective=recover", "distill.on_policy=1.0", "distill.divergence=reverse_kl"),
    "guard": ("guard.max=0.000001", "guard.action=recover", "guard.steps=1"),
}
# The paths of a quick run of the suite; tests/slow.py holds the others.
QUICK = ("sft", "teacher")


@pytest.fixture
def deterministic_operations():
    """Let torch refuse operations that add in no fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def unhindered(*settings: str):
    """Return the folder of a run without torch's deterministic algorithms."""
    torch.use_deterministic_algorithms(False)
    folder = reference_run(*settings)
    torch.use_deterministic_algorithms(True)
    return folder


@pytest.mark.usefixtures("deterministic_operations")
@pytest.mark.parametrize("path", QUICK)
def test_training_with_evaluations(path, tmp_path):
    check_training(path, tmp_path)


@pytest.mark.usefixtures("deterministic_operations")
@pytest.mark.parametrize("path", [path for path in PATHS if path not in QUICK])
def test_other_trainings(path, tmp_path):
    check_training(path, tmp_path)


def check_training(path, folder):
    """Assert that a training gives the bits of one without torch's deterministic algorithms."""
    settings = (*SHORT, *PATHS[path])
    plain = unhindered(*settings)
    train(small_run(folder, *settings))
    assert differing(plain, folder) == []
    assert metrics(plain) == metrics(folder)


@pytest.mark.usefixtures("deterministic_operations")
@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_caching_and_training_from_the_cache(kind, tmp_path):
    settings = (
        *SHORT,
        "distill.objective=recover",
        f"distill.cache_kind={kind}",
        f"distill.cache={tmp_path / 'cache'}",
    )
    words = [*SMALL_RUN, *settings, f"output_dir={tmp_path / 'none'}"]
    assert run_cache(Arguments("quickstart.yaml", tuple(words), frozenset())) == 0
    train(small_run(tmp_path / "run", *settings, "distill.teacher.placement=cached"))


@pytest.mark.usefixtures("deterministic_operations")
def test_merging(tmp_path, finetune_command):
    run = unhindered()
    done = finetune_command("merge", f"adapter={run}", "out=merged", "kl_check.num_examples=2")
    assert done.returncode == 0, done.stderr
    measured = finetune_command("eval", f"adapter={run}", "limit=4", "answers=2", f"out={tmp_path}")
    assert measured.returncode == 0, measured.stderr
