"""What all tests share: no network, one thread per process, shared caches, commands run in-process or as processes."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# Set before anything imports torch, transformers or wandb.
os.environ["HF_HUB_OFFLINE"] = "1"  # A test never reaches the network, whatever the machine allows.
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest-xdist runs one process per core: more threads compete for the same cores.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
from hypothesis import settings

from tests.commands import Done, run_here, run_process
from tests.slow import is_slow

# No deadline: shared machines stall. Derandomized: a failure comes again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference material beside the checkout (real tokenizer, configs, datasets), or skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference material in ../shared, which this machine lacks")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _shared_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give all processes of one session one package cache and one folder of reference runs, and nobody else's."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["FINETUNE_CACHE"] = str(session / "cache")
    os.environ["FINETUNE_TEST_RUNS"] = str(session / "reference-runs")
    os.environ["TRACKIO_DIR"] = str(session / "trackio")


@pytest.fixture(autouse=True)
def _no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html undrawn at the end of trainings in this process, except where the report is tested."""
    recipe = sys.modules.get("finetune.training.recipe")
    if recipe is not None and "report" not in request.node.name and "report" not in request.path.name:
        monkeypatch.setattr(recipe, "try_report", lambda folder, log: None)


@pytest.fixture
def finetune_command(tmp_path: Path) -> Callable[..., Done]:
    """Return a function that runs `finetune ARGUMENTS…` in this process, in the test's folder."""
    return functools.partial(run_here, cwd=tmp_path)


@pytest.fixture
def finetune_process(tmp_path: Path) -> Callable[..., Done]:
    """Return a function that runs `finetune ARGUMENTS…` in a fresh process, in the test's folder."""
    return functools.partial(run_process, cwd=tmp_path)


@pytest.fixture(params=["own", "fp32"])
def sixteen_bit_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with this processor's products, and as a processor without 16-bit ones makes them."""
    from finetune.ops import matmul

    # A block of the test's own: an earlier test leaves a larger one, which would count as memory of this test.
    monkeypatch.setattr(matmul, "_memory", threading.local())
    if request.param == "fp32":
        monkeypatch.setattr(matmul, "_has_native_matmul", lambda dtype: False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
    if not config.option.markexpr and not any(".py" in argument for argument in config.args):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a GPU; torch sees none on this machine")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)
