"""Real commands in fresh processes: what a run leaves, what it says, and how it ends when something is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftModel

import finetune
from finetune import load_base, load_config, load_tokenizer
from finetune.data.loader import load_chat_template, load_data
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.scoring import evaluate
from finetune.models.fused import fuse_layers
from tests.runs import SMALL_RUN, metrics, result

SCRIPT = Path(__file__).resolve().parents[2] / "finetune" / "train.py"


def reloaded_loss(run: Path) -> float:
    """Load the base and the adapter with PEFT, and evaluate the held-out rows."""
    cfg = load_config(f"{run}/config.yaml")
    model = PeftModel.from_pretrained(load_base(cfg.model, cfg.quant), run)
    fuse_layers(model)  # The run's own arithmetic, so that nothing but the weights can differ.
    data = load_data(Preparation(cfg.data, load_chat_template(cfg.data, load_tokenizer(cfg.model))))
    return evaluate(model, data.eval[0].documents, limit_tokens=4096).loss


def train_process(folder: Path, *overrides: str, launch: bool = False) -> subprocess.CompletedProcess[str]:
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(SCRIPT.parents[1] / "launch/accelerate/one.yaml"),
    ]
    command = [sys.executable, *(launcher if launch else []), str(SCRIPT), "config=quickstart.yaml", *SMALL_RUN]
    command += [f"output_dir={folder}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder.parent)


def test_accelerate_launch_leaves_a_whole_run_whose_adapter_reloads_to_the_same_loss(tmp_path):
    run = tmp_path / "run"
    done = train_process(run, "generation.num_examples=4", "generation.samples=1", "train.eval_every=2", launch=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {path.name for path in run.iterdir()}
    assert files >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "checkpoint-4",
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "result.json",
    }
    assert not [name for name in files if name.startswith(".") and name != ".lock"], "no temporary file may stay"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    needed = {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "target_tokens",
        "tokens_per_second",
        "peak_bytes",
        "seconds",
    }
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(needed <= line.keys() for line in lines)
    outcome = result(run)
    assert (outcome["status"], outcome["steps"], outcome["world_size"], outcome["adapter"]) == (
        "finished",
        4,
        1,
        str(run),
    )
    assert outcome["target_tokens"] == sum(line["target_tokens"] for line in lines)
    assert outcome["final_loss"] == lines[-1]["loss"] and outcome["eval_loss"] == lines[-1]["eval_loss"]
    assert "exact match" in done.stdout and str(run) in done.stdout
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].endswith("tiny-qwen2.5") and sorted(config["target_modules"]) == [
        "q_proj",
        "v_proj",
    ]
    assert (run / "README.md").read_text().startswith("---\nlibrary_name: peft\n")
    assert reloaded_loss(run) == pytest.approx(outcome["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number, code):
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(SCRIPT),
        "config=quickstart.yaml",
        *SMALL_RUN,
        f"output_dir={run}",
        "train.max_steps=5000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    steps = result(run)["steps"]
    assert process.returncode == code
    assert f"help: finetune train config={run}/config.yaml train.resume=auto\n" in errors and f"step {steps}" in errors
    assert result(run)["status"] == "stopped"
    assert (run / f"checkpoint-{steps}").is_dir() and metrics(run)[-1]["step"] == steps


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["train.max_step=3"], 2, ["did you mean train.max_steps?"]),
        (["model.name=nowhere/at-all"], 2, ["nowhere/at-all"]),
        (["data.train=[{path: missing.jsonl}]"], 2, ["missing.jsonl", "data.train[0]"]),
        (
            ["data.train=[{path: bad.jsonl}]"],
            2,
            ["bad.jsonl:2", "is not JSON", "bad.jsonl:3", "'droid'", "on_bad_row=skip"],
        ),
        (["data.max_length=8"], 2, ["data.max_length"]),
        (["lora.target_modules=[q_prj]"], 2, ["q_prj", "q_proj"]),
        (["train.world_size=2"], 2, ["train.world_size", "launch/accelerate/"]),
        (["lora.init_adapter=nowhere/at-all"], 2, ["lora.init_adapter"]),
        (["model.name=torn"], 3, ["torn"]),
    ],
)
def test_what_a_user_does_wrong_ends_in_one_message_and_its_exit_code(
    finetune_command, tmp_path, overrides, code, words
):
    row = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    (tmp_path / "bad.jsonl").write_text(f"{row}\nnot json\n{row.replace('assistant', 'droid')}\n")
    copy_of_the_base_with_half_its_weights(tmp_path / "torn")
    done = finetune_command("train", "config=quickstart.yaml", *SMALL_RUN, f"output_dir={tmp_path}/run", *overrides)
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def copy_of_the_base_with_half_its_weights(folder: Path) -> None:
    from finetune.system.resources import packaged

    folder.mkdir()
    for file in (packaged("data") / "tiny-qwen2.5").iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)


@pytest.mark.parametrize(
    "overrides",
    [
        ['lora.new_tokens=["<tool>","<note>"]'],
        # In fp32: in bf16 the part of the base that PiSSA leaves is rounded, so the original base is another.
        ["quant.type=none", "model.dtype=float32", "lora.init=pissa"],
        ["lora.target_modules=all-linear", "lora.dora=true", "lora.rslora=true"],
        ["quant.skip_modules=[model.layers.0.*]", "lora.modules_to_save=[lm_head]"],
    ],
)
def test_every_kind_of_adapter_trains_saves_resumes_and_reloads_to_the_same_loss(tmp_path, overrides):
    run = tmp_path / "run"
    settings = [*SMALL_RUN, f"output_dir={run}", "train.save_every=2", *overrides]
    outcome = finetune.train(
        load_config("quickstart.yaml", [*settings, "train.max_steps=2", "train.schedule=constant"])
    )
    longer = finetune.train(load_config("quickstart.yaml", [*settings, "train.schedule=constant", "train.resume=auto"]))
    assert (outcome.steps, longer.steps) == (2, 4)
    assert reloaded_loss(run) == pytest.approx(longer.eval_loss, rel=1e-4)


def test_a_second_run_of_a_config_gets_a_folder_of_its_own_and_auto_continues_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL_RUN, "train.max_steps=1", "train.schedule=constant"]
    assert finetune.train(load_config("quickstart.yaml", words)).adapter == "outputs/quickstart"
    assert finetune.train(load_config("quickstart.yaml", words)).adapter == "outputs/quickstart-2"
    more = [*words, "train.max_steps=2", "train.resume=auto"]
    assert finetune.train(load_config("quickstart.yaml", more)).adapter == "outputs/quickstart-2"
    assert result(tmp_path / "outputs" / "quickstart")["steps"] == 1
    assert result(tmp_path / "outputs" / "quickstart-2")["steps"] == 2
