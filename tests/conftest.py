"""What every test shares: no network, no GPU pretence, the way to the optional reference material."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# Before anything imports transformers or wandb: a test never reaches the network, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# And its threads wait without spinning: several processes share the cores.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
from hypothesis import settings

# Shared machines stall: a slow example is no failure. Derandomised, so that a failure comes again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the checkout (real tokenizer, configs, data sets)."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference material in ../shared, which this machine lacks")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or fills the token cache of whoever runs it."""
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def finetune_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `finetune ARGUMENTS…` in a fresh process and returns it finished, with its text output."""

    def run(*arguments: str, cwd: Path = tmp_path, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "finetune.cli", *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, **options)

    return run


@pytest.fixture(params=["own", "fp32"])
def sixteen_bit_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with this processor's products, and as a processor without 16-bit ones makes them."""
    from finetune.ops import matmul

    # A block of the test's own: an earlier test leaves a larger one, which would count as memory of this test.
    monkeypatch.setattr(matmul, "_memory", threading.local())
    if request.param == "fp32":
        monkeypatch.setattr(matmul, "_has_products", lambda dtype: False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a GPU; torch sees none on this machine")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)
