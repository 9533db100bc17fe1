"""`finetune push`: what arrives at a hub, and what is refused before anything is sent."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from finetune.cli import main
from tests.runs import reference_run


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload of small files uses."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub: Any = self.server
        hub.requests.append((self.path, self.headers.get("Authorization")))
        if hub.refuses:
            self._answer(hub.refuses, {"error": "no"})
        elif self.path == "/api/repos/create":
            hub.created = json.loads(body)
            self._answer(200, {"url": f"http://{self.headers['Host']}/u/{hub.created['name']}"})
        elif self.path == "/api/validate-yaml":  # of the model card
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            sent = json.loads(body)["files"]
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in sent]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            hub.files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self._answer(
                200, {"commitUrl": "https://huggingface.co/u/n/commit/1", "commitOid": "1", "pullRequestUrl": None}
            )
        else:
            self._answer(404, {})

    def do_GET(self) -> None:
        hub: Any = self.server
        self._answer(hub.refuses or 200, {"id": "u/n", "siblings": [], "sha": "0"})

    def _answer(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.files, server.created, server.refuses = [], {}, None, 0
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    make = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **given: make(endpoint=address, token="hf_test", **given))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(reference_run("train.save_every=2"), tmp_path / "run"))
    (folder / "manifest.json").unlink()  # as a user who edits a file does
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}))
    return folder


def test_the_adapter_its_tokenizer_and_card_arrive_and_nothing_else(hub, run, capsys):
    assert main(["push", f"adapter={run}", "repo=u/n"]) == 0
    assert "u/n" in capsys.readouterr().out
    assert (hub.created["name"], hub.created.get("visibility")) == ("n", "private")
    expected = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert expected <= hub.files.keys()
    assert not [
        name for name in hub.files if name.startswith("checkpoint") or name.endswith((".jsonl", ".html", ".yaml"))
    ]
    assert not {"run.json", "result.json", "samples.json"} & hub.files.keys()
    for name in expected:
        assert hub.files[name] == (run / name).read_bytes()
    assert {token for _, token in hub.requests} == {"Bearer hf_test"}


def test_a_refusing_hub_gives_a_message_with_advice(hub, run, capsys):
    hub.refuses = 403
    assert main(["push", f"adapter={run}", "repo=u/n"]) == 4
    error = capsys.readouterr().err
    assert "repo=u/n" in error and "hf auth login" in error and "Traceback" not in error and not hub.files


def test_what_others_cannot_load_is_not_sent(hub, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words in (
        ["repo=u/n"],
        [f"adapter={tmp_path}", f"model={tmp_path}", "repo=u/n"],
        [f"adapter={reference_run()}", "repo=u/n"],  # Its base is a folder.
        [f"adapter={tmp_path / 'empty'}", "repo=u/n"],
        [f"model={tmp_path / 'empty'}", "repo=u/n"],
        [f"model={tmp_path / 'nowhere'}", "repo=u/n"],
    ):
        assert main(["push", *words]) in (2, 3), words
    assert hub.requests == [] and "Traceback" not in capsys.readouterr().err


def test_a_name_without_a_user_is_refused(hub, run):
    assert main(["push", f"adapter={run}", "repo=mine"]) == 2
    assert hub.requests == []
