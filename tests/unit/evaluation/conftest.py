"""A run's folder without the training: the embedded base, an adapter with random weights, a few held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from finetune.commands.eval import write_merged
from finetune.config.command_options import EvalOptions
from finetune.config.overrides import read_options
from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.data.formats.messages import Conversation, Message
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.compare import evaluate_gap
from finetune.evaluation.gap_table import GapTable
from finetune.evaluation.generation import answer_rows
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import save_adapter
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.system.resources import packaged

BASE = packaged("data") / "tiny-qwen2.5"
ROWS = 12


@pytest.fixture(scope="session")
def questions() -> list[str]:
    lines = (packaged("data") / "sample" / "heldout.jsonl").read_text().splitlines()[:ROWS]
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.fixture(scope="session")
def rows_file(questions: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out rows; the answers to two thirds of them are what the 16-bit base itself answers."""
    model = load_base(ModelConfig(name=str(BASE)), QuantConfig(type="none"), "cpu")
    tokenizer = load_tokenizer(ModelConfig(name=str(BASE)))
    rows = [Conversation((Message("user", text), Message("assistant", "?"))) for text in questions]
    given = answer_rows(model, tokenizer, ChatTemplate(tokenizer), rows, max_new_tokens=24, batch_size=ROWS)
    file = tmp_path_factory.mktemp("rows") / "asked.jsonl"
    with file.open("w") as stream:
        for i, answer in enumerate(given):
            text = answer.given if i % 3 else "something else"
            turns = [{"role": "user", "content": answer.prompt}, {"role": "assistant", "content": text}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return file


@pytest.fixture(scope="session")
def run_folder(rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = load_base(ModelConfig(name=str(BASE)), QuantConfig(), "cpu")
    tokenizer = load_tokenizer(ModelConfig(name=str(BASE)))
    adapted = attach_lora(model, LoraConfig(rank=4), tokenizer)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    save_adapter(adapted, folder, tokenizer, base_name=str(BASE))
    config = {
        "model": {"name": str(BASE)},
        "data": {"train": [{"path": "gone.jsonl"}], "eval": [{"path": str(rows_file)}], "max_length": 256},
        "generation": {"max_new_tokens": 24},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def measure() -> Callable[..., GapTable]:
    """`finetune eval` with these words, in this process."""

    def measure(*words: str, place: Path | None = None) -> GapTable:
        options = read_options(EvalOptions, ["resamples=200", *words], "finetune eval")
        return evaluate_gap(options, lambda text: None, write_merged, place)

    return measure


@pytest.fixture(scope="session")
def table(run_folder: Path, measure: Callable[..., GapTable]) -> GapTable:
    """All four models on the run's rows, and on others that it may have harmed."""
    others = packaged("data") / "sample" / "train.jsonl"
    return measure(f"adapter={run_folder}", f"forgetting=[{{path: {others}, limit: 8}}]", "answers=8")
