"""`finetune merge` and `finetune export` as a user runs them: fresh processes, kills, a full disk, little memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from benchmarks.merge import write_adapter
from finetune import load_config
from tests.runs import reference_run


@pytest.fixture(scope="module")
def run_folder() -> Path:
    """A short training of the embedded base on its sample rows."""
    return reference_run()


def test_a_merged_run_is_measured_and_answers(finetune_command, run_folder, tmp_path):
    done = finetune_command(
        "merge", f"adapter={run_folder}", "out=merged", "kl_check.max_kl=0.05", "kl_check.num_examples=8"
    )
    assert (done.returncode, done.stdout) == (0, "merged\n"), done.stderr
    assert "base=original" in done.stderr
    assert "KL(trained || merged)" in done.stderr
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["changed"] == 8 and report["kl_checks"][0]["rows"] == 8
    talked = finetune_command("chat", "model=merged", "max_new_tokens=4", input="Say the word.\n")
    assert talked.returncode == 0, talked.stderr


@pytest.mark.parametrize(
    ("words", "token"),
    [
        (["adapter={run}", "out=x", "bass=original"], "bass: unknown key; did you mean base?"),
        (["out=x"], "adapter: is missing"),
        (["adapter={run}/nowhere", "out=x"], "nowhere"),
        (["adapter={run}", "out={run}"], "out="),
        (["config=lora.yaml", "adapter={run}", "out=x"], "takes no config"),
    ],
)
def test_a_wrong_merge_is_refused_and_nothing_is_written(words, token, finetune_command, run_folder, tmp_path):
    done = finetune_command("merge", *(word.format(run=run_folder) for word in words))
    assert done.returncode == 2 and token in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "token"),
    [
        (["format=gguf", "out=x"], "adapter: is missing"),
        (["adapter={run}", "format=exe", "out=x"], "found exe"),
        (["adapter={run}", "format=gguf", "type=q9_k", "out=x"], "q9_k"),
        (["adapter={run}", "format=onnx", "merge=false", "out=x"], "merge=false"),
        (["model={run}", "format=gguf", "out=x"], "write adapter="),
    ],
)
def test_a_wrong_export_is_refused_before_the_merge(words, token, finetune_command, run_folder, tmp_path):
    done = finetune_command("export", *(word.format(run=run_folder) for word in words), "verify=false")
    assert done.returncode == 2 and token in done.stderr, done.stderr
    assert "merge: base=" not in done.stderr, "merged before it was refused"
    assert not list(tmp_path.iterdir())


def test_a_merged_model_is_exported_and_read_back(finetune_command, run_folder, tmp_path):
    pytest.importorskip("gguf", reason="needs the export extra")
    assert finetune_command("merge", f"adapter={run_folder}", "out=merged", "kl_check.num_examples=0").returncode == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    done = finetune_command("export", "model=merged", "format=gguf", "type=bf16", "out=gguf", "prompts=2")
    assert done.returncode == 0, done.stderr
    (check, *_) = json.loads((tmp_path / "gguf" / "export_report.json").read_text())["checks"]
    assert check["same"] == 1.0 and check["largest"] == 0.0
    assert "llama-server -m" in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()} == before


def test_a_missing_extra_is_reported_with_the_install_command(finetune_command, run_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = finetune_command("export", f"adapter={run_folder}", "format=gguf", "out=x", "verify=false")
    assert done.returncode == 2 and 'pip install "finetune-qlora[export]"' in done.stderr, done.stderr
    assert "merge: base=" not in done.stderr, "merged before it was refused"
    assert not list(tmp_path.iterdir())


KILLED_AFTER_TWO = """
import os, signal, sys
from finetune.export.merge import merge as merging
write, done = merging.write_shard, []
def write_shard(*arguments):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(write(*arguments))
merging.write_shard = write_shard
from finetune.cli import main
main(sys.argv[1:])
"""


def test_a_killed_merge_continues_after_the_last_complete_file(finetune_command, run_folder, tmp_path):
    words = ["merge", f"adapter={run_folder}", "out=merged", "shard_size=1MB", "kl_check.num_examples=0"]
    done = subprocess.run([sys.executable, "-c", KILLED_AFTER_TWO, *words], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    left = {path.name: path.stat().st_ino for path in (tmp_path / ".merged.partial").glob("*.safetensors")}
    assert len(left) == 2
    assert finetune_command(*words).returncode == 0
    found = {path.name: path.stat().st_ino for path in (tmp_path / "merged").glob("*.safetensors")}
    assert left.items() <= found.items()
    assert finetune_command(*[word.replace("out=merged", "out=other") for word in words]).returncode == 0
    for name in found:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "other"]


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_full_disk_leaves_nothing(command, finetune_process, run_folder, tmp_path):
    """The system refuses bytes in the middle of a file."""
    words = ["kl_check.num_examples=0"] if command == "merge" else ["format=safetensors", "verify=false"]
    before = run_folder_state(run_folder)
    done = finetune_process(
        command,
        f"adapter={run_folder}",
        "out=merged",
        *words,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )
    assert done.returncode == 4 and "the disk is full" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
    assert run_folder_state(run_folder) == before


KILLED_WHILE_EXPORTING = """
import os, signal, sys
import finetune.export.safetensors_folder as module
module.write_shard = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
from finetune.cli import main
main(sys.argv[1:])
"""


def test_the_next_export_removes_the_files_of_a_killed_one(finetune_command, run_folder, tmp_path):
    words = ["export", f"adapter={run_folder}", "format=safetensors", "out=out", "verify=false"]
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_EXPORTING, *words], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())
    assert finetune_command(*words).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_before_the_merge(finetune_command, run_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    done = finetune_command("export", f"adapter={run_folder}", "format=safetensors", "out=out")
    assert done.returncode == 2 and "out=" in done.stderr
    assert "merge: base=" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def run_folder_state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def test_too_little_room_is_reported_before_anything_is_written(finetune_command, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 1000))
    done = finetune_command("merge", f"adapter={run_folder}", "out=merged", "kl_check.num_examples=0")
    assert done.returncode == 4 and "out=merged" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


WIDE = {
    "vocab_size": 883,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from benchmarks.load import memory
from benchmarks.merge import one_run
import finetune.export.merge.merge
options = dict(zip(("adapter", "out", "run", "limit"), sys.argv[1:]))
print(one_run(options)["peak_bytes"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts memory on Linux alone")
# Above the interpreter with its libraries; the weights are 480 MB. The limit also counts what was given back to the
# system but may be used again, which quantizing in threads has much of.
@pytest.mark.parametrize(("kind", "limit"), [("ours", "200MB"), ("ours, dequantized", "1500MB")])
def test_a_layer_of_a_7b_is_merged_in_a_block_of_memory(kind, limit, repo_root, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    model = Qwen2ForCausalLM._from_config(Qwen2Config(**WIDE), dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="150MB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repo_root / "data" / "tiny-qwen2.5" / file, base / file)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapter = write_adapter(base, tmp_path / "adapter", targets, 8)
    largest_bytes = WIDE["hidden_size"] * WIDE["intermediate_size"] * 4
    adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(adapter), str(out), kind, limit]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root), "FINETUNE_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= largest_bytes + adapter_bytes + 300e6
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == set(model.state_dict())
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    lora_A, lora_B = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    if kind == "ours":
        expected = model.state_dict()[f"{name}.weight"].float() + 2 * lora_B @ lora_A
        # One rounding to bf16.
        assert ((found[f"{name}.weight"].float() - expected).abs() <= expected.abs() * 2**-8 + 1e-7).all()


def test_the_merged_model_answers_as_the_adapter_over_the_base(finetune_command, run_folder, tmp_path):
    """Plain transformers and PEFT, without this package."""
    assert (
        finetune_command(
            "merge", f"adapter={run_folder}", "out=merged", "dtype=fp32", "kl_check.num_examples=0"
        ).returncode
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(load_config("quickstart.yaml").model.name, dtype=torch.float32)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, str(run_folder))
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write the numbers 3, 1 and 2."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answers = [
        model.generate(**asked, max_new_tokens=64, do_sample=False, eos_token_id=None)[0].tolist()
        for model in (merged, adapted)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["gguf f32", "onnx fp32"])
def test_64_greedy_tokens_of_the_trained_model_are_the_same(kind, finetune_command, run_folder, tmp_path):
    """Both formats keep every bit, so no token may differ. Without a stop token, every answer has all tokens."""
    form, number = kind.split()
    pytest.importorskip({"gguf": "gguf", "onnx": "onnxruntime_genai"}[form], reason="needs the export extra")
    assert (
        finetune_command(
            "merge", f"adapter={run_folder}", "out=merged", "dtype=fp32", "kl_check.num_examples=0"
        ).returncode
        == 0
    )
    settings = tmp_path / "merged" / "generation_config.json"
    unused = json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] - 1
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": unused}))
    done = finetune_command("export", "model=merged", f"format={form}", f"type={number}", "out=out", "prompts=3")
    assert done.returncode == 0, done.stderr
    for check in json.loads((tmp_path / "out" / "export_report.json").read_text())["checks"]:
        assert check["same"] == 1.0 and check["tokens"] == 3 * 64
