"""Two ranks that share a base give the adapter and figures of one rank: every adapter kind and objective."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from finetune import load_config, train
from tests.commands import ROOT
from tests.runs import adapter, check_same_metrics

# A batch of three gives the ranks two passes and one; five held-out rows, three evaluations and two. A large eps keeps
# Adam's update proportional to the gradient where that is next to nothing, which the order of a sum decides.
COMMON = (
    "data.train.0.limit=12",
    "data.eval.0.limit=5",
    "data.packing=false",
    "train.batch_size=3",
    "train.micro_batch_size=1",
    "train.max_steps=2",
    "train.eval_every=1",
    "train.eps=1e-3",
    "train.learning_rate=2e-3",
    "train.warmup_ratio=0",
    "train.schedule=constant",
    "train.neftune_alpha=0",
    "lora.dropout=0",
    "model.dtype=float32",
    "quant.compute_dtype=float32",
    "generation.num_examples=3",
    "generation.max_new_tokens=6",
)
TEACHER = ("distill.objective=sft+anchor", "distill.teacher.dtype=float32", "generation.num_examples=0")
REWARD = (
    "reward.functions={length: 1}",
    "reward.length=2",
    "reward.max_new_tokens=6",
    "reward.group_size=4",
    "reward.loss=grpo",
    "reward.beta=0.1",
    "reward.updates=2",
    "train.eval_every=2",
)
# Name -> config file and settings.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft, answers and metrics": (
        "quickstart.yaml",
        (
            "generation.every=1",
            "generation.metrics=[exact_match]",
            "train.early_stopping=1",
            "train.optimizer=adamw_8bit",
        ),
    ),
    "all linear layers, rslora": (
        "quickstart.yaml",
        ("lora.target_modules=all-linear", "lora.rslora=true", "train.gradient_checkpointing=all"),
    ),
    "dora": ("quickstart.yaml", ("lora.dora=true", "train.gradient_checkpointing=1")),
    "peft's own layers": ("quickstart.yaml", ("train.kernels=peft", "train.gradient_checkpointing=all")),
    "new tokens": ("quickstart.yaml", ("lora.new_tokens=['<note>','</note>']",)),
    "trained copies": ("quickstart.yaml", ("lora.modules_to_save=[lm_head]", "train.gradient_checkpointing=offload")),
    "trained embedding": ("quickstart.yaml", ("lora.modules_to_save=[embed_tokens]",)),
    "pissa": ("quickstart.yaml", ("lora.init=pissa", "quant.type=none")),
    "loftq": ("quickstart.yaml", ("lora.init=loftq", "train.lora_plus_ratio=4")),
    "unquantized": ("quickstart.yaml", ("quant.type=none", "train.optimizer=paged_adamw_8bit")),
    "guard with recovery": (
        "quickstart.yaml",
        (*TEACHER, "guard.max=1e-9", "guard.action=recover", "guard.steps=1"),
    ),
    "resident teacher": ("quickstart.yaml", (*TEACHER, "distill.objective=recover")),
    "streamed teacher": ("quickstart.yaml", (*TEACHER, "distill.teacher.placement=streamed")),
    "answers of the student": ("quickstart.yaml", (*TEACHER, "distill.on_policy=0.7", "distill.on_policy_tokens=6")),
    "dpo": ("dpo.yaml", ()),
    "kto": ("dpo.yaml", ("preference.objective=kto",)),
    "ipo": ("dpo.yaml", ("preference.objective=ipo",)),
    "orpo": ("dpo.yaml", ("preference.objective=orpo",)),
    "simpo": ("dpo.yaml", ("preference.objective=simpo",)),
    "rewards": (
        "grpo.yaml",
        (*REWARD, "reward.loss=grpo", "reward.beta=0.1", "reward.updates=2", "train.eval_every=2"),
    ),
}


def train_many(runs: list[tuple[str, list[str]]], folder: Path, ranks: int = 2, machines: int = 1) -> None:
    """Train one config after the other in the processes of one launch. machines: that the ranks believe to be on."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    script = [str(ROOT / "tests" / "train_many.py"), str(listed), str(ranks // machines)]
    done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("base: sharded over 2 ranks") == len(runs)


def test_every_adapter_and_objective(tmp_path):
    runs = {name: (config, [*COMMON, *settings]) for name, (config, settings) in CASES.items()}
    for name, (config, settings) in runs.items():
        train(load_config(config, [*settings, f"output_dir={tmp_path / name}"]))
    train_many(
        [
            (config, [*settings, "parallel.shard=full", f"output_dir={tmp_path / name}-2"])
            for name, (config, settings) in runs.items()
        ],
        tmp_path,
    )
    for name in runs:
        check_equal(tmp_path / name, tmp_path / f"{name}-2")


def test_one_then_two_then_one_rank_equal_one(tmp_path):
    """A checkpoint continues on another number of ranks, with the same rows in each step."""
    one, changing = tmp_path / "one", tmp_path / "changing"
    train(load_config("quickstart.yaml", [*COMMON, "train.max_steps=3", f"output_dir={one}"]))
    part = [*COMMON, f"output_dir={changing}"]
    train(load_config("quickstart.yaml", [*part, "train.max_steps=1"]))
    two = [*part, "train.max_steps=2", "train.resume=auto", "parallel.shard=full"]
    train_many([("quickstart.yaml", two)], tmp_path)
    train(load_config("quickstart.yaml", [*part, "train.max_steps=3", "train.resume=auto"]))
    check_equal(one, changing)


def test_two_copies_of_two_ranks_and_parts_in_main_memory_equal_one_rank(tmp_path):
    one, hybrid, offload = (tmp_path / name for name in ("one", "hybrid", "offload"))
    train(load_config("quickstart.yaml", [*COMMON, f"output_dir={one}"]))
    settings = [*COMMON, "parallel.shard=hybrid", f"output_dir={hybrid}"]
    train_many([("quickstart.yaml", settings)], tmp_path, ranks=4, machines=2)
    settings = [*COMMON, "parallel.shard=full", "parallel.offload=true", f"output_dir={offload}"]
    train_many([("quickstart.yaml", settings)], tmp_path)
    check_equal(one, hybrid)
    check_equal(one, offload)


def check_equal(one: Path, other: Path) -> None:
    check_same_metrics(one, other)
    expected, found = adapter(one), adapter(other)
    assert expected.keys() == found.keys()
    for name, values in found.items():
        assert (values - expected[name]).norm() <= 1e-5 * expected[name].norm(), (other.name, name)
