"""Load a run in one line: `load("train: {max_steps: 3}", "lora.rank=4")`, or get the text of its error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.compose import load_config
from finetune.config.schema import RunConfig
from finetune.system.errors import ConfigError

ROWS = "data: {train: [{path: rows.jsonl}]}\n"
MODEL = "model: {name: base}\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Load a YAML text as run.yaml in the working directory; add model and data if the text has none."""
    monkeypatch.chdir(tmp_path)

    def loaded(text: str = "", *overrides: str) -> RunConfig:
        parts = [text.rstrip("\n") + "\n"]
        parts += [part for part in (MODEL, ROWS) if part.partition(":")[0] + ":" not in text]
        Path("run.yaml").write_text("".join(parts), encoding="utf-8")
        return load_config("run.yaml", overrides)

    return loaded


@pytest.fixture
def complaint(load: Callable[..., RunConfig]) -> Callable[..., str]:
    """Return the text of the ConfigError for a YAML text and overrides."""

    def complained(text: str = "", *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return complained
