"""`finetune serve` as it is typed: what the trained model would answer, its refusals, and its end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.compose import load_config
from finetune.config.schema import RunConfig
from finetune.data.formats.messages import Conversation, Message
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.generation import Answer, answer_rows
from finetune.models.adapters.files import load_adapter
from finetune.models.load import load_base
from finetune.models.tokenizer import load_adapter_tokenizer
from finetune.serving.server import KEY_VARIABLE
from tests.commands import run_here
from tests.runs import reference_run
from tests.served import free_port, serve_here, wait_until

pytest.importorskip("uvicorn", reason="needs the serve extra")

TOKENS = 64
SETTINGS = ("serve.max_batch=4", "serve.cache_tokens=4096")
QUESTIONS = ("Gina buys a white cup.", "Count from one to five.", "Repeat this twice: red.")
# Of other ranks and layers than the quickstart's.
MORE = {
    "wide": ("lora.rank=4", "lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"),
    "deep": ("lora.rank=2", "lora.target_modules=[gate_proj,up_proj,down_proj]", "train.seed=3"),
}
needs_llama = pytest.mark.skipif(shutil.which("llama-server") is None, reason="needs llama-server on PATH")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(str(reference_run() / "config.yaml"), [])


def generated(config: RunConfig, adapter: Path | None, texts: tuple[str, ...]) -> list[Answer]:
    """What the trained model answers greedily, by transformers' `generate`."""
    tokenizer = load_adapter_tokenizer(config.model, reference_run())
    model: Any = load_base(config.model, config.quant, "cpu")
    model = model if adapter is None else load_adapter(model, adapter)
    rows = [Conversation((Message("user", text), Message("assistant", "?"))) for text in texts]
    chat = ChatTemplate(tokenizer)
    return answer_rows(model, tokenizer, chat, rows, max_new_tokens=TOKENS, batch_size=1)


def ask(http: httpx.Client, model: str, text: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_the_base_and_three_adapters_answer_as_they_were_trained(config, tmp_path):
    """Also the lines of the command, its models with their figures, and its end by SIGTERM."""
    folders = {name: reference_run(*overrides) for name, overrides in MORE.items()}
    names = {"tiny-qwen2.5": None, "run": reference_run(), **folders}
    answers: dict[tuple[str, str], str] = {}
    models: list[Any] = []

    def client(http: httpx.Client) -> None:
        models.extend(http.get("/v1/models").json()["data"])
        answers.update({(name, text): ask(http, name, text) for name in names for text in QUESTIONS})

    listed = ", ".join(f"{name}: {folder}" for name, folder in {"run": reference_run(), **folders}.items())
    done = serve_here(f"adapters={{{listed}}}", *SETTINGS, ask=client, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, folder in names.items():
        for text, wanted in zip(QUESTIONS, generated(config, folder, QUESTIONS), strict=True):
            assert answers[name, text] == wanted.given, (name, text)
    assert len({tuple(answers[name, text] for text in QUESTIONS) for name in names}) > 2  # they do differ
    assert [model["id"] for model in models] == list(names)
    assert all(model["details"]["check"]["kl"] < 0.005 for model in models[1:])
    assert done.stderr.count("check: model=") == 3
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["models", "address", "try", "page"]


def test_another_model_than_the_trained_one_is_refused_with_figures(tmp_path):
    """An adapter whose file was exchanged, beside the record of the one that was trained."""
    run = tmp_path / "run"
    shutil.copytree(reference_run(), run, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(run / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, run / "adapter_model.safetensors")
    words = (f"adapter={run}", f"serve.check={reference_run()}", "port=0", *SETTINGS)
    done = run_here("serve", *words, cwd=tmp_path)
    assert done.returncode == 3
    assert "KL=" in done.stderr and "serve.max_kl=0.02" in done.stderr


def test_a_port_in_use_is_an_error_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_here("serve", f"adapter={reference_run()}", f"port={taken.getsockname()[1]}", cwd=tmp_path)
    assert done.returncode == 2 and "port=" in done.stderr and "check:" not in done.stderr


def test_words_that_cannot_be_served_are_refused(tmp_path):
    for words, part in (
        ([], "adapter=FOLDER"),
        ([f"model={reference_run()}"], "adapter="),
        (["adapter=nowhere", "adapters={a: nowhere-else}"], "adapters.a"),
        ([f"adapter={reference_run()}", "engine=vllm", "serve.queue=3"], "serve.queue"),
        ([f"adapter={reference_run()}", "engine=sglang"], "not on PATH"),
        (["model=file.gguf"], "engine=llamacpp"),
    ):
        done = run_here("serve", *words, cwd=tmp_path)
        assert done.returncode == 2 and part in done.stderr, (words, done.stderr)


def test_two_commands_lead_from_data_to_an_answer(tmp_path):
    """In a process of its own: alive while it loads, the printed curl line answers, two signals end it."""
    port, key = free_port(), "a-key"
    command = [sys.executable, "-m", "finetune.cli", "serve", f"adapter={reference_run()}", f"port={port}", *SETTINGS]
    environment = {**os.environ, KEY_VARIABLE: key}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        states: list[int] = []

        def ready() -> bool:
            try:
                states.append(httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code)
            except httpx.HTTPError:
                return False
            return states[-1] == 200

        wait_until(ready)
        assert states[0] == 503
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        curl = lines[2].partition("try:")[2].strip()
        answer = subprocess.run(["bash", "-c", curl], env=environment, capture_output=True, text=True)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
        refused = subprocess.run(["bash", "-c", curl], env={**environment, KEY_VARIABLE: "no"}, capture_output=True)
        assert json.loads(refused.stdout)["error"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@needs_llama
def test_llamacpp_answers_as_the_model_was_trained(config, tmp_path):
    answers: dict[str, str] = {}

    def client(http: httpx.Client) -> None:
        answers.update({text: ask(http, "run", text) for text in QUESTIONS})

    words = (f"adapters={{run: {reference_run()}}}", "engine=llamacpp", "serve.max_batch=2", "serve.context_tokens=256")
    done = serve_llama(*words, ask=client, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "check: model=run" in done.stderr
    wanted = generated(config, reference_run(), QUESTIONS)
    assert sum(answers[answer.prompt] == answer.given for answer in wanted) >= len(QUESTIONS) - 1


def serve_llama(*words: str, ask: Any, cwd: Path) -> Any:
    return serve_here(*words, 'engine_args=[--threads, "1"]', ask=ask, cwd=cwd)


@needs_llama
def test_a_drifted_gguf_and_a_wrong_adapter_are_refused_with_figures(tmp_path):
    from finetune.config.command_options import ExportOptions
    from finetune.export.export import export_model

    merged = tmp_path / "merged"
    done = run_here("merge", f"adapter={reference_run()}", f"out={merged}", "kl_check.num_examples=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(merged / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
        for name, tensor in weights.items()
    }
    drifted = tmp_path / "drifted"
    shutil.copytree(merged, drifted)
    save_file(noisy, drifted / "model.safetensors", metadata={"format": "pt"})
    settings = ("engine=llamacpp", "serve.max_batch=2", "serve.context_tokens=256", f"serve.check={reference_run()}")
    codes = {}
    for folder in (merged, drifted):
        out = tmp_path / f"{folder.name}-gguf"
        export_model(ExportOptions(model=str(folder), format="gguf", type="q4_0", out=str(out), verify=False))
        words = (f"model={next(out.glob('*.gguf'))}", *settings)
        codes[folder.name] = serve_llama(*words, ask=lambda http: None, cwd=tmp_path)
    assert (codes["merged"].returncode, codes["drifted"].returncode) == (0, 3), codes["merged"].stderr
    assert "KL=" in codes["drifted"].stderr
    other = reference_run(*MORE["wide"])
    done = serve_llama(f"adapter={other}", *settings, ask=lambda http: None, cwd=tmp_path)
    assert done.returncode == 3 and "KL=" in done.stderr


def test_the_printed_example_is_one_word_for_a_shell():
    from finetune.serving.server import describe

    line = describe("http://127.0.0.1:1", ["a'b"], "a'b", None)[2]
    assert json.loads(shlex.split(line)[-1])["model"] == "a'b"
