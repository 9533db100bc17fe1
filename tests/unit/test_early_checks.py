"""What the words of a command and a few small files decide is answered before torch and transformers are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.system.resources import packaged

MODEL = packaged("data") / "tiny-qwen2.5"
SAMPLE = packaged("data") / "sample"
CHATS, PAIRS = f"data.train={SAMPLE / 'train.jsonl'}", f"data.train={SAMPLE / 'pairs.jsonl'}"
QUICK = ("config=quickstart.yaml", "generation.num_examples=0")
TRAIN, EXPORT = ("train", *QUICK), ("export", "format=gguf")
# The words of a command that is refused, and what its message names.
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "export_type": ((*EXPORT, "adapter=run", "type=q9_9", "out=new"), "type: "),
    "export_out": ((*EXPORT, "adapter=run", "out=run"), "out=run: "),
    "export_imatrix": ((*EXPORT, "model=run", "type=q8_0", "imatrix=rows.jsonl", "out=new"), "imatrix: "),
    "export_nothing": ((*EXPORT, "out=new"), "adapter: "),
    "export_adapter": ((*EXPORT, "adapter=nope", "out=new"), "adapter=nope: "),
    "export_model": ((*EXPORT, "model=run", "out=new"), "model=run: "),
    "eval_adapter": (("eval", "adapter=nope"), "adapter=nope: "),
    "eval_both": (("eval", "adapter=run", "model=run"), "adapter, model: "),
    "chat_adapter": (("chat", "adapter=nope"), "adapter=nope: "),
    "chat_adapter_of_config": (("chat", *QUICK, "adapter=nope"), "adapter=nope: "),
    "chat_model": (("chat", "model=nope"), "model.name=nope: "),
    "merge_adapter": (("merge", "adapter=nope", "out=new"), "adapter=nope: "),
    "merge_second_adapter": (("merge", "adapter=[run, nope]", "out=new"), "adapter=nope: "),
    "merge_out": (("merge", "adapter=run", "out=run"), "out=run: "),
    "merge_shard_size": (("merge", "adapter=run", "out=new", "shard_size=4XB"), "shard_size"),
    "clip_adapter": (("clip", "adapter=nope", "out=new"), "adapter=nope: "),
    "clip_start": (("clip", "adapter=run", "start=nope", "out=new"), "start=nope: "),
    "clip_out": (("clip", "adapter=run", "out=run"), "out=run: "),
    "aggregate_out": (("aggregate", "adapters=[run]", "out=run"), "out=run: "),
    "eval_rows": (("eval", "adapter=run", "data=[{path: nope.jsonl}]"), "data[0]: nope.jsonl "),
    "eval_forgetting": (("eval", "adapter=run", "forgetting=[{path: nope.jsonl}]"), "forgetting[0]: nope.jsonl "),
    "data_model": (("data", *QUICK, "model.name=nope"), "model.name=nope: "),
    "cache_model": (("cache", *QUICK, "distill=recover", "model.name=nope", "distill.cache=new"), "model.name=nope: "),
    "sensitivity_model": (("sensitivity", *QUICK, "model.name=nope"), "model.name=nope: "),
    "sensitivity_rows": (("sensitivity", *QUICK, "data.train=nope.jsonl"), "data.train[0]: nope.jsonl "),
    "allocate_model": (("allocate", *QUICK, "model.name=nope", "budget_gb=1"), "model.name=nope: "),
    "allocate_sensitivity": (("allocate", *QUICK, "sensitivity=nope", "budget_gb=1"), "sensitivity=nope: "),
    "push_adapter": (("push", "adapter=nope", "repo=a/b"), "adapter=nope: "),
    "push_nothing": (("push", "adapter=stopped", "repo=a/b"), "adapter=stopped: "),
    "push_repo": (("push", "adapter=run", "repo=a"), "repo=a: "),
    "sweep_model": (("sweep", *QUICK, "model.name=nope", "lora.rank=8,16"), "model.name=nope: "),
    "sweep_rows": (("sweep", *QUICK, "data.train=nope.jsonl", "lora.rank=8,16"), "data.train[0]: nope.jsonl "),
    "train_resume": ((*TRAIN, "train.resume=nope"), "train.resume: "),
    "train_folder": ((*TRAIN, "output_dir=run"), "output_dir: run "),
    "train_started": ((*TRAIN, "output_dir=stopped"), "output_dir: stopped "),
    "train_model": ((*TRAIN, "model.name=nope"), "model.name=nope: "),
    "train_incomplete_model": ((*TRAIN, "model.name=empty_model"), "model.safetensors"),
    "train_targets": ((*TRAIN, "lora.target_modules=[q_prj]"), "did you mean q_proj"),
    "train_target_regex": ((*TRAIN, "lora.target_modules='.*q_prj'"), "lora.target_modules: "),
    "train_layers": ((*TRAIN, "lora.layers_to_transform=[99]"), "lora.layers_to_transform: "),
    "train_modules": ((*TRAIN, "lora.modules_to_save=[head]"), "lora.modules_to_save: "),
    "train_start": ((*TRAIN, "lora.init_adapter=nope"), "lora.init_adapter=nope: "),
    "train_rows": ((*TRAIN, "data.train=nope.jsonl"), "data.train[0]: nope.jsonl "),
    "dry_run_rows": ((*TRAIN, "data.train=nope.jsonl", "--dry-run"), "data.train[0]: nope.jsonl "),
    "dpo_chats": (("train", "config=dpo.yaml", CHATS), "which preference.objective=dpo needs"),
    "dpo_chats_dry_run": (("train", "config=dpo.yaml", CHATS, "--dry-run"), "which preference.objective=dpo needs"),
    "dpo_chats_plan": (("plan", "config=dpo.yaml", CHATS), "which preference.objective=dpo needs"),
    "dpo_chats_data": (("data", "config=dpo.yaml", CHATS), "which preference.objective=dpo needs"),
    "orpo_labels": (("train", "config=orpo.yaml", "data.train=labels.jsonl"), "fit preference.objective=kto"),
    "kto_chats": (("train", "config=kto.yaml", CHATS), "label or kto_tag"),
    "kto_texts": (("train", "config=kto.yaml", "data.train=texts.jsonl"), "text rows have no label"),
    "pairs_in_a_plain_run": ((*TRAIN, PAIRS), "need preference.objective=dpo"),
    "pairs_in_a_plain_sweep": (("sweep", *QUICK, PAIRS, "lora.rank=8,16"), "need preference.objective=dpo"),
    "plan_rows": (("plan", *QUICK, "data.train=nope.jsonl"), "data.train[0]: nope.jsonl "),
}
RUNNER = """
import contextlib, io, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name not in ("torch", "transformers"), f"{name} is imported"

sys.meta_path.insert(0, Refuse())
from finetune.cli import main
found = {}
for name, words in json.load(sys.stdin).items():
    with contextlib.redirect_stderr(io.StringIO()) as messages, contextlib.redirect_stdout(io.StringIO()):
        found[name] = main(words), messages.getvalue()
print(json.dumps(found))
"""


def adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The exit code and the messages of every case, all from one process that cannot import torch."""
    here = tmp_path_factory.mktemp("early")
    adapter(here / "run")
    adapter(here / "stopped" / "checkpoint-9")
    adapter(here / "stopped" / "checkpoint-10")
    (here / "labels.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "label": True}))
    (here / "texts.jsonl").write_text(json.dumps({"text": "words", "label": True}))
    (here / "empty_model").mkdir()
    (here / "empty_model" / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    words = {name: case[0] for name, case in CASES.items()}
    words["of_a_stopped_run"] = ("chat", "adapter=stopped")
    rows = f"data.train=[{SAMPLE / 'train.jsonl'}, {SAMPLE / 'pairs.jsonl'}, labels.jsonl]"
    words["of_several_sources"] = ("train", "config=dpo.yaml", rows, f"data.eval={SAMPLE / 'heldout.jsonl'}")
    command, environment = [sys.executable, "-c", RUNNER], os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, input=json.dumps(words), cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_word_or_file_is_answered_before_torch_is_imported(answers, name: str):
    exit_code, messages = answers[name]
    assert exit_code == 2 and CASES[name][1] in messages, messages


def test_a_run_without_an_adapter_names_its_newest_checkpoint(answers):
    exit_code, messages = answers["of_a_stopped_run"]
    assert exit_code == 2 and "adapter=stopped/checkpoint-10\n" in messages


def test_every_source_that_an_objective_cannot_use_is_named_with_its_file(answers):
    exit_code, messages = answers["of_several_sources"]
    assert exit_code == 2
    problems = [line.partition(": ") for line in messages.removeprefix("error: ").splitlines() if "needs" in line]
    assert [(key, text.split(":")[0].rpartition("/")[2]) for key, _, text in problems] == [
        ("data.train[0]", "train.jsonl"),
        ("data.train[2]", "labels.jsonl"),
        ("data.eval[0]", "heldout.jsonl"),
    ]


def test_the_report_on_rows_imports_a_tokenizer_and_no_model(tmp_path):
    words = ["data", "config=quickstart.yaml", f"data.cache={tmp_path}"]
    code = (
        f"import sys; from finetune.cli import main; code = main({words}); print(code, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    exit_code, *loaded = done.stderr.splitlines()[-1].split()
    assert exit_code == "0" and "transformers" in loaded, done.stderr
    model_stack = {"transformers.modeling_utils", "torch.distributed.tensor", "peft", "accelerate", "bitsandbytes"}
    assert not model_stack & set(loaded)
