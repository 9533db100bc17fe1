"""Distillation runs as a user starts them: results, a teacher over HTTP, teachers that do not fit the student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from finetune import train
from finetune.commands.cache import run as run_cache
from finetune.distill.codec import teacher_top_k
from finetune.system.arguments import Arguments
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged
from tests.logprob_server import MODEL, LogprobTeacher
from tests.runs import SMALL_RUN, adapter, metrics, result, small_run

FEW = ("data.train.0.limit=24", "data.eval.0.limit=8", "train.max_steps=2")
TINY = str(packaged("data") / "tiny-qwen2.5")


def test_recover_reports_its_limits_and_the_share_recovered(tmp_path, finetune_command):
    settings = (*SMALL_RUN, "distill.objective=recover", "train.max_steps=12", "train.learning_rate=1e-3")
    done = finetune_command("train", "config=quickstart.yaml", *settings, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "objective=recover" in done.stderr and "itself, in bfloat16, resident" in done.stderr
    figures = result(tmp_path / "run")
    assert 0 < figures["teacher_kl_after"] < figures["teacher_kl_before"]
    assert figures["recovered"] == pytest.approx(1 - figures["teacher_kl_after"] / figures["teacher_kl_before"])
    assert figures["eval_loss"] == figures["teacher_kl_after"]
    table = (tmp_path / "run" / "teacher.md").read_text()
    assert f"{figures['teacher_kl_before']:.5f}" in table and f"{figures['recovered']:.1%}" in table
    assert f"recovered {figures['recovered']:.1%}" in done.stdout
    assert "| recovered |" in (tmp_path / "run" / "README.md").read_text()
    assert {"eval/heldout/teacher_kl", "eval/heldout/teacher_agreement"} <= metrics(tmp_path / "run")[-1].keys()


def test_quantization_loss_is_measured_without_the_adapter(tmp_path):
    """LoftQ starts nearer to the teacher, but every run is measured from the same base."""
    settings = (
        *FEW,
        "distill.objective=recover",
        "lora.target_modules=all-linear",
        "lora.rank=32",
        "lora.modules_to_save=[norm]",
    )
    for init in ("default", "loftq"):
        train(small_run(tmp_path / init, *settings, f"lora.init={init}", "train.learning_rate=1e-5"))
    default, loftq = (result(tmp_path / init) for init in ("default", "loftq"))
    assert default["teacher_kl_before"] == loftq["teacher_kl_before"]
    assert loftq["teacher_kl_after"] < 0.9 * default["teacher_kl_after"]
    assert metrics(tmp_path / "default")[0]["grad_norm"] > 0
    saved, started = adapter(tmp_path / "default"), adapter(tmp_path / "loftq")
    assert saved.keys() == started.keys() and any("model.norm.weight" in name for name in saved)


def test_a_served_teacher_is_queried_once_per_document(tmp_path):
    with LogprobTeacher(vocabulary=883, max_logprobs=8, max_model_len=256) as server:
        settings = (
            *FEW,
            "distill.objective=distill",
            "distill.teacher.placement=server",
            f"distill.teacher.url={server.url}",
            f"distill.cache={tmp_path / 'signal'}",
            "distill.top_k=8",
        )
        train(small_run(tmp_path / "first", *settings))
        requests = sum(path.endswith("/completions") for path, _, _ in server.seen)
        train(small_run(tmp_path / "again", *settings))
        assert sum(path.endswith("/completions") for path, _, _ in server.seen) == requests == 32
        assert all(question.get("model", MODEL) == MODEL for _, _, question in server.seen)
        _assert_holds_table(tmp_path / "signal", server.table_VV)
    assert [a["loss"] for a in metrics(tmp_path / "first")] == [b["loss"] for b in metrics(tmp_path / "again")]
    assert result(tmp_path / "first")["teacher_kl_before"] > 0
    assert result(tmp_path / "first")["recovered"] is None  # only for objective=recover


def _assert_holds_table(folder: Path, table_VV: np.ndarray) -> None:
    """Every kept distribution is a row of the server's table, cut to its eight largest entries."""
    [shard] = folder.glob("*.safetensors")
    signal = teacher_top_k(load_file(shard), torch.device("cpu"))
    largest = np.sort(table_VV, axis=1)[:, ::-1][:, :8]
    kept = signal.log_probs_NK.numpy()
    nearest = np.abs(kept[:, None, :] - largest[None]).max(-1).min(1)
    assert nearest.max() <= 24 / 65535  # a 16-bit step


def test_a_server_of_another_model_is_refused_with_its_models(tmp_path):
    with LogprobTeacher(vocabulary=896) as server:
        settings = (
            *FEW,
            "distill.objective=distill",
            "distill.teacher.placement=server",
            f"distill.teacher.url={server.url}",
            f"distill.cache={tmp_path / 'signal'}",
            f"distill.teacher.name={TINY}",
        )
        with pytest.raises(ConfigError, match="serves tests/table, not"):
            train(small_run(tmp_path / "run", *settings))


def other_base(folder: Path, redefine: dict[str, str]) -> Path:
    """The embedded base, with another meaning for some of its tokens."""
    shutil.copytree(TINY, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        for here, there in redefine.items():
            text = text.replace(here, there)
        (folder / name).write_text(text)
    return folder


def test_a_teacher_with_other_tokens_is_refused_before_it_is_loaded(tmp_path):
    teacher = other_base(tmp_path / "other", {"<|im_start|>": "<|user|>"})
    with pytest.raises(ConfigError) as error:
        train(small_run(tmp_path / "run", *FEW, "distill.objective=distill", f"distill.teacher.name={teacher}"))
    assert "'<|im_start|>' here, '<|user|>' for the teacher" in str(error.value)
    assert "model.tokenizer=" in str(error.value)


def test_hidden_states_of_different_widths_are_not_compared(tmp_path):
    teacher = other_base(tmp_path / "wider", {})
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "hidden_size": 320}))
    settings = ("distill.objective=distill", f"distill.teacher.name={teacher}", "distill.hidden_weight=1")
    with pytest.raises(ConfigError, match=r"distill\.hidden_weight: .*256 .*320"):
        train(small_run(tmp_path / "run", *FEW, *settings))


def test_a_tuned_teacher_teaches_through_its_own_adapter(tmp_path):
    """A teacher with an adapter, by each placement, is far from the student."""
    train(small_run(tmp_path / "tuned", "train.max_steps=12", "train.learning_rate=5e-3", "data.eval=[]"))
    gaps = {}
    for placement in ("resident", "streamed"):
        settings = (
            "distill.objective=distill",
            f"distill.teacher.lora={tmp_path / 'tuned'}",
            "distill.hidden_weight=0.1",
        )
        train(small_run(tmp_path / placement, *FEW, *settings, f"distill.teacher.placement={placement}"))
        gaps[placement] = result(tmp_path / placement)["teacher_kl_before"]
    assert gaps["resident"] == gaps["streamed"]
    train(small_run(tmp_path / "recover", *FEW, "distill.objective=recover"))
    assert gaps["resident"] > 10 * result(tmp_path / "recover")["teacher_kl_before"]


def test_a_larger_table_of_the_teacher_is_cut_to_the_tokens_that_both_know(tmp_path):
    """As Qwen2.5 with 152,064 and 151,936 rows: the rows beyond the tokenizer are unused."""
    from safetensors import torch as safetensors

    wide = other_base(tmp_path / "wide", {})
    tensors = safetensors.load_file(wide / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([table, 9 * torch.ones(64, table.shape[1], dtype=table.dtype)])
    safetensors.save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    train(small_run(tmp_path / "wide-run", *FEW, "distill.objective=distill", f"distill.teacher.name={wide}"))
    train(small_run(tmp_path / "own-run", *FEW, "distill.objective=sft+anchor", "distill.weight=1"))
    assert metrics(tmp_path / "wide-run") == metrics(tmp_path / "own-run")


def test_training_from_a_cache_needs_no_teacher(tmp_path, capsys):
    """The cache may come from another machine: training needs neither weights nor tokenizer of the teacher."""
    teacher = other_base(tmp_path / "teacher", {})
    signal = ("distill.objective=distill", f"distill.teacher.name={teacher}", f"distill.cache={tmp_path / 'signal'}")
    words = [*SMALL_RUN, *FEW, *signal, f"output_dir={tmp_path / 'none'}"]
    assert run_cache(Arguments("quickstart.yaml", tuple(words), frozenset())) == 0
    cached = small_run(tmp_path / "with", *FEW, *signal, "distill.teacher.placement=cached")
    train(cached)
    assert "spot check of 2 cached documents" in capsys.readouterr().err
    shutil.rmtree(teacher)
    train(small_run(tmp_path / "without", *FEW, *signal, "distill.teacher.placement=cached"))
    assert "not compared" in capsys.readouterr().err
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
