"""`finetune watch`: the page follows the run, on this machine alone."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.report.live import build_server
from tests.runs import reference_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference_run(), tmp_path / "run"))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with build_server(folder, 0, 7) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert server.server_address[0] == "127.0.0.1"
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_running_run_is_drawn_again_and_a_finished_one_is_not_loaded_again(run):
    finished = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    with served(run) as address:
        with urllib.request.urlopen(address) as answer:
            first = answer.read().decode()
            assert answer.headers["Refresh"] == "7" and "unfinished" in first
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line | {"step": 1234}) + "\n")
        with urllib.request.urlopen(address) as answer:
            assert answer.read().decode() != first
        (run / "result.json").write_bytes(finished)
        with urllib.request.urlopen(address) as answer:
            assert answer.headers["Refresh"] is None and "finished" in answer.read().decode()


@pytest.mark.parametrize("path", ["/config.yaml", "/../config.yaml", "/report.html"])
def test_no_other_file_is_served(run, path):
    with served(run) as address, pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address + path)
    assert refused.value.code == 404


def test_a_wrong_folder_or_a_taken_port_is_refused(run, tmp_path, capsys):
    assert main(["watch"]) == main(["watch", str(tmp_path)]) == main(["watch", str(run), "port=70000"]) == 2
    with served(run) as address:
        assert main(["watch", str(run), f"port={address.rpartition(':')[2]}"]) == 2
    assert "Traceback" not in capsys.readouterr().err
