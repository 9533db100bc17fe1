"""The traces that the selected tests need, made once per session in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


class Results:
    """Figures of traced cases by name."""

    def __init__(self, figures: dict[str, dict[str, Any]]):
        self._figures = figures

    def of(self, name: str) -> dict[str, Any]:
        """Return the figures of a case, which must not have failed."""
        assert "error" not in self._figures[name], self._figures[name]["trace"]
        return self._figures[name]


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, repo_root: Path) -> Results:
    """Return the figures of the selected tests' cases, traced once per session for all processes."""
    from tests.cuda_trace.cases import CASES
    from tests.cuda_trace.plans import PLANS

    here = [item for item in request.session.items if item.path.parent == Path(__file__).parent]
    selected = {
        item.callspec.params.get("name", "")
        for item in here
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    names = [
        name for name in (*CASES, *PLANS) if any(name == word or name.startswith(f"{word}, ") for word in selected)
    ]
    folder = Path(os.environ["FINETUNE_TEST_RUNS"])
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "cuda_trace.json"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            command = [sys.executable, "-m", "tests.cuda_trace.run", str(out), *names]
            done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return Results(json.loads(out.read_text()))
