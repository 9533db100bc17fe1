"""Other servers: their arguments, how they are asked, and that none outlives this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from finetune.config.command_options import ServeOptions, ServeSettings
from finetune.config.compose import load_config
from finetune.evaluation.probe import Probe, Row, compare, measure
from finetune.models.adapters.folder import TENSOR_FILE
from finetune.serving import external
from finetune.serving.external import PROGRAMS, Start
from finetune.serving.scorers import (
    Ask,
    ask_completions,
    ask_llamacpp,
    ask_sglang,
    ask_tensorrt_llm,
    server_scorer,
    unique_texts,
)
from finetune.serving.supervise import running
from finetune.system.errors import ConfigError, FinetuneError, Interrupted
from tests.models import random_qwen2
from tests.runs import reference_run
from tests.served import wait_until

ROWS = [Row((5, 6, 7, 8, 9), 1), Row((1, 2, 3, 4, 5, 6, 7), 3)]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    run = reference_run()
    config = load_config(str(run / "config.yaml"), [])
    options = ServeOptions(host="127.0.0.1", serve=ServeSettings(max_batch=8, context_tokens=512))
    adapters = {"first": run, "second": reference_run("lora.rank=12")}
    return Start(config, options, adapters, tmp_path, "tiny", run / "chat_template.jinja", 9000, None)


@pytest.fixture
def exports(monkeypatch, tmp_path_factory) -> list[Any]:
    """Stand-ins for exports: the adapters themselves, and empty files."""
    made: list[Any] = []

    def export(options: Any) -> None:
        made.append(options)
        out = Path(options.out)
        out.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if options.format == "adapter":
                (out / name).write_bytes((Path(options.adapter) / name).read_bytes())
        (out / f"{out.name}.gguf").touch()

    monkeypatch.setattr(external, "export_model", export)
    # Other tests serve what is exported.
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    return made


def shown(words: list[str], folder: Path) -> str:
    """The words with short names of folders."""
    cache = os.environ["FINETUNE_CACHE"]
    short = [word.replace(str(folder), "BASE").replace(str(reference_run()), "RUN") for word in words]
    return " ".join(word.partition(f"{cache}/served/")[0] + "CACHED" if cache in word else word for word in short)


def test_the_arguments_of_vllm(start, exports):
    found = shown(PROGRAMS["vllm"].words(start), start.folder)
    assert found == (
        "vllm serve BASE --served-model-name tiny --host 127.0.0.1 --port 9000 --dtype bfloat16 --max-logprobs 20 "
        "--logprobs-mode raw_logprobs --max-num-seqs 8 --quantization bitsandbytes --max-model-len 512 --enable-lora "
        "--max-lora-rank 16 --max-loras 2 --lora-modules first=CACHED second=CACHED "
        "--chat-template RUN/chat_template.jinja"
    )
    assert [options.format for options in exports] == ["adapter"] * 2
    PROGRAMS["vllm"].words(start)
    assert len(exports) == 2  # made once


def test_the_arguments_of_sglang(start, exports):
    found = shown(PROGRAMS["sglang"].words(start), start.folder)
    assert found == (
        "sglang serve --model-path BASE --served-model-name tiny --host 127.0.0.1 --port 9000 --dtype bfloat16 "
        "--max-running-requests 8 --context-length 512 --enable-lora --max-lora-rank 16 --max-loras-per-batch 2 "
        "--lora-paths first=CACHED second=CACHED --chat-template RUN/chat_template.jinja"
    )
    assert PROGRAMS["sglang"].names(start) == ["tiny:first", "tiny:second", "tiny"]


def test_the_arguments_of_llamacpp(start, exports):
    found = shown(PROGRAMS["llamacpp"].words(start), start.folder)
    assert found == (
        "llama-server --model CACHED --alias tiny --host 127.0.0.1 --port 9000 --ctx-size 512 --parallel 8 "
        "--kv-unified --offline --lora CACHED --lora CACHED --lora-init-without-apply "
        "--chat-template-file RUN/chat_template.jinja"
    )
    assert [options.merge for options in exports] == [True, False, False]


# Options of `trtllm-serve serve` in TensorRT-LLM 1.2 (commands/serve.py) that serve a model from a folder.
TRTLLM_OPTIONS = {"--host", "--port", "--max_batch_size", "--max_seq_len", "--config", "--chat_template"}
# Fields of its LoraConfig (lora_helper.py) and of its LoRARequest (executor/request.py).
LORA_CONFIG = {
    *("lora_dir", "lora_ckpt_source", "max_lora_rank", "lora_target_modules", "trtllm_modules_to_hf_modules"),
    *("max_loras", "max_cpu_loras", "swap_gate_up_proj_lora_b_weight"),
}
LORA_REQUEST = {"lora_name", "lora_int_id", "lora_path"}


def test_the_arguments_of_tensorrt_llm(start, exports, capsys):
    words = PROGRAMS["tensorrt_llm"].words(start)
    assert shown(words, start.folder) == (
        "trtllm-serve serve BASE --host 127.0.0.1 --port 9000 --max_batch_size 8 --max_seq_len 512 --config CACHED "
        "--chat_template RUN/chat_template.jinja"
    )
    assert {word for word in words if word.startswith("--")} <= TRTLLM_OPTIONS
    settings = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    lora = settings["lora_config"]
    assert settings.keys() == {"lora_config", "cuda_graph_config"} and lora.keys() <= LORA_CONFIG
    # With several adapters TensorRT-LLM infers no layers, and takes q, k and v together.
    assert lora["lora_target_modules"] == ["attn_q", "attn_k", "attn_v"]
    assert (lora["max_lora_rank"], lora["max_loras"], lora["max_cpu_loras"]) == (16, 2, 2)
    printed = [line for line in capsys.readouterr().err.splitlines() if "lora_request" in line]
    requests = [json.loads(line.partition('"lora_request": ')[2]) for line in printed]
    assert [request.keys() for request in requests] == [LORA_REQUEST] * 2
    assert [(Path(request["lora_path"]) / "adapter_config.json").is_file() for request in requests] == [True, True]
    assert [(request["lora_name"], request["lora_int_id"]) for request in requests] == [("first", 1), ("second", 2)]
    assert PROGRAMS["tensorrt_llm"].names(start) == ["tiny"]


def test_layers_without_lora_in_tensorrt_llm_are_refused(start, exports, tmp_path):
    save_file({"base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.ones(2, 2)}, tmp_path / TENSOR_FILE)
    with pytest.raises(ConfigError, match=r"adapters\.odd: .*experts"):
        external._tensorrt_llm_modules({"odd": tmp_path})


def test_without_adapters_tensorrt_llm_gets_no_settings_of_them(start):
    alone = replace(start, adapters={}, template=None)
    assert shown(PROGRAMS["tensorrt_llm"].words(alone), start.folder) == (
        "trtllm-serve serve BASE --host 127.0.0.1 --port 9000 --max_batch_size 8 --max_seq_len 512"
    )


def test_a_server_that_checks_no_key_is_refused_one(start, monkeypatch):
    monkeypatch.setattr(external.shutil, "which", lambda program: program)
    monkeypatch.setenv("FINETUNE_API_KEY", "secret")
    options = start.options.model_copy(update={"engine": "tensorrt_llm"})
    with pytest.raises(ConfigError, match="FINETUNE_API_KEY"):
        external.serve_external(start.config, options, {})


@contextmanager
def serving(answer: Callable[[str, dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = answer(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Texts:
    """A tokenizer whose tokens 3 and 4 have one text."""

    def __len__(self) -> int:
        return len(TEXTS)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["half" if id in (3, 4) else TEXTS[id] for [id] in rows]


TEXTS = [f"t{id}" for id in range(1000)]
LORA = {"lora_name": "first", "lora_int_id": 1, "lora_path": "folder"}
ALL_TEXTS = {text: id for id, text in enumerate(TEXTS)}


class Pretender:
    """Answers in the format of each server, with the probabilities of a model."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.asked: list[Any] = []

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        ids = tuple(body.get("input_ids") or body["prompt"])
        self.asked.append(
            next((body[key] for key in ("lora", "lora_path", "lora_request") if key in body), body.get("model"))
        )
        if path == "/completion":
            [[last]] = measure(self.model, [Row((*ids, 0), len(ids))])
            top = [{"id": id, "logprob": log_prob} for id, log_prob in last.top.items()]
            return 200, {"completion_probabilities": [{"top_logprobs": top}]}
        if "logprobs" in body:
            [[last]] = measure(self.model, [Row((*ids, 0), len(ids))])
            top = {TEXTS[id]: log_prob for id, log_prob in last.top.items()}
            logprobs = {"text_offset": [0], "tokens": ["?"], "token_logprobs": [max(top.values())]}
            return 200, {"choices": [{"text": "?", "logprobs": {**logprobs, "top_logprobs": [top]}}]}
        [scores] = measure(self.model, [Row(ids, 1)])
        if path == "/generate":
            own = [[None, ids[0], None], *([one.own, id, None] for one, id in zip(scores, ids[1:], strict=True))]
            tops = [None, *([[value, id, None] for id, value in one.top.items()] for one in scores)]
            return 200, {"meta_info": {"input_token_logprobs": own, "input_top_logprobs": tops}}
        entries: list[Any] = [None]
        for one, own_id in zip(scores, ids[1:], strict=True):
            listed = {**one.top, own_id: one.own}
            entries.append({str(id): {"logprob": value, "rank": 1} for id, value in listed.items()})
        return 200, {"choices": [{"prompt_logprobs": entries}]}


@pytest.mark.parametrize(
    ("ask", "chosen", "tokens"),
    [
        (ask_completions("first"), "first", 8),
        (ask_sglang("first"), "first", 8),
        (ask_sglang(None), None, 8),
        (ask_llamacpp(1), [{"id": 1, "scale": 1.0}], 8),
        (ask_llamacpp(None), [], 8),
        (ask_tensorrt_llm("base", LORA, ALL_TEXTS), LORA, 8),
        (ask_tensorrt_llm("base", None, ALL_TEXTS), "base", 8),
    ],
)
def test_every_server_is_asked_in_its_own_words(ask: Ask, chosen: Any, tokens: int):
    model, other = random_qwen2().eval(), random_qwen2(seed=1).eval()
    probe = Probe(ROWS, measure(model, ROWS), "test rows")  # type: ignore[arg-type]
    with serving(Pretender(model)) as url:
        same = compare(probe, server_scorer(ask, url, None))
    assert (same.kl, same.top1, same.tokens) == (pytest.approx(0, abs=1e-5), 1.0, tokens)
    pretender = Pretender(other)
    with serving(pretender) as url:
        far = compare(probe, server_scorer(ask, url, "key"))
    assert far.kl > 0.02 and far.top1 < 0.5
    assert all(each == chosen for each in pretender.asked)


def test_places_whose_tokens_have_no_text_of_their_own_are_not_compared():
    texts = unique_texts(Texts())  # type: ignore[arg-type]
    assert texts["t2"] == 2 and "half" not in texts and len(texts) == len(TEXTS) - 2
    model = random_qwen2().eval()
    probe = Probe(ROWS, measure(model, ROWS), "test rows")  # type: ignore[arg-type]
    listed = [id for row in probe.scores for scored in row for id in scored.top]
    rare = min(set(listed), key=listed.count)
    with serving(Pretender(model)) as url:
        known = {text: id for text, id in ALL_TEXTS.items() if id != rare}
        found = compare(probe, server_scorer(ask_tensorrt_llm("base", None, known), url, None))
        assert found.kl == pytest.approx(0, abs=1e-5) and found.tokens == 8 - listed.count(rare)
        with pytest.raises(FinetuneError):
            server_scorer(ask_tensorrt_llm("base", None, {}), url, None)(ROWS)


@pytest.mark.parametrize("answer", [(500, "broken"), (200, {}), (200, []), (200, {"choices": [{}]})])
def test_a_server_that_answers_something_else_is_an_error(answer):
    with serving(lambda path, body: answer) as url, pytest.raises(FinetuneError):
        server_scorer(ask_completions("a"), url, None)(ROWS)


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_the_death_of_a_program_is_an_error_with_its_code_and_last_lines():
    script = "import sys; [print('line', i) for i in range(50)]; sys.stderr.write('at last\\n'); sys.exit(7)"
    with pytest.raises(FinetuneError) as died, running(python(script), {}, 5) as child:
        child.wait()
    lines = str(died.value).splitlines()
    assert "exit code 7" in lines[0] and "line 49" in str(died.value) and "at last" in str(died.value)
    assert len(lines) <= 21


def test_a_signal_is_passed_on_and_waited_for(tmp_path):
    file = tmp_path / "ended"
    script = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(file)!r}).write_text('in order'), sys.exit(0)))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(600)\n"
    )
    with running(python(script), {}, 30) as child:
        child.wait((tmp_path / "up").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        child.wait()
    assert file.read_text() == "in order"


def test_a_program_that_ignores_signals_is_killed(tmp_path):
    script = (
        "import signal, time, pathlib\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(600)\n"
    )
    with running(python(script), {}, 0.1) as child:
        child.wait((tmp_path / "up").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        child.wait()
    with pytest.raises(Interrupted), running(python(script), {}, 600) as child:
        child.wait((tmp_path / "up").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        child.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the children of a killed process")
def test_a_killed_server_leaves_no_program_behind(tmp_path):
    file = str(tmp_path / "pid")
    inner = f"import os, pathlib, time; pathlib.Path({file!r}).write_text(str(os.getpid())); time.sleep(600)"
    outer = (
        "from finetune.serving.supervise import running\n"
        f"with running({python(inner)!r}, {{}}, 5) as child: child.wait()\n"
    )
    process = subprocess.Popen(python(outer), stderr=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    child = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"
        except OSError:
            return True

    wait_until(gone)
