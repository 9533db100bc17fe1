"""Another distribution named finetune is noticed, beside this one or before it; this one is never mistaken for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.system.other_finetune import other_distribution

ROOT = str(Path(__file__).resolve().parents[3])


@pytest.fixture
def site(tmp_path: Path) -> str:
    for name in ("finetune-0.10.0.dist-info", "finetune_qlora-0.1.0.dist-info"):
        (tmp_path / name).mkdir()
    return str(tmp_path)


def test_it_is_named_wherever_it_lies(site: str):
    before, after = other_distribution([site, ROOT]), other_distribution([ROOT, site])
    assert before and after and before != after
    assert all(found and "finetune-0.10.0" in found and site in found for found in (before, after))


def test_this_distribution_and_missing_folders_are_no_finding(tmp_path: Path):
    (tmp_path / "finetune_qlora-0.1.0.dist-info").mkdir()
    assert other_distribution([str(tmp_path), str(tmp_path / "none"), ROOT]) is None


def test_the_import_warns_and_goes_on(site: str):
    command = [sys.executable, "-c", "import finetune; print(finetune.__version__)"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, site])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() and "finetune-0.10.0" in done.stderr
