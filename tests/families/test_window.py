"""A run whose rows are longer than a model's attention reaches is refused; below, packed attention is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import load_config
from finetune.data.batch import build_batch
from finetune.losses.cross_entropy import score
from finetune.models.families import attention_window
from finetune.models.fused import fuse_layers
from finetune.models.hub import check_window
from finetune.system.errors import ConfigError
from finetune.training.output_folder import check_run
from tests.families.tiny import TinyFamily, save
from tests.parity.test_cross_entropy import documents

SLIDES = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


@pytest.fixture(scope="module", params=["mistral", "qwen2", "qwen3"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    settings: dict[str, Any] = {"sliding_window": 64} if request.param == "mistral" else SLIDES
    return save(request.param, tmp_path_factory.mktemp("windowed"), **settings)


def test_a_run_that_exceeds_the_window_names_both_numbers(windowed: TinyFamily, tmp_path: Path):
    def run(*words: str) -> None:
        cfg = load_config(
            "lora.yaml",
            [f"model.name={windowed.folder}", "quant.type=none", f"output_dir={tmp_path}/out", "data.train=x", *words],
        )
        check_run(cfg)

    with pytest.raises(ConfigError, match=r"data\.max_length: .* last 64 tokens alone, found 65"):
        run("data.max_length=65")
    run("data.max_length=64")
    run("data.max_length=65", "model.attention=sdpa")


@torch.no_grad()
@pytest.mark.parametrize(
    ("length", "attention", "exact"), [(64, "auto", True), (90, "auto", False), (90, "sdpa", True)]
)
def test_within_the_window_attention_is_that_of_transformers(
    length: int, attention: Any, exact: bool, windowed: TinyFamily
):
    rows = documents([length, 40])
    model = windowed.ours(attention=attention)
    fuse_layers(model)
    found = score(model, build_batch(rows)).nll
    stock = windowed.stock(attn_implementation="eager")
    wanted = sum(
        torch.nn.functional.cross_entropy(
            stock(input_ids=torch.tensor(row.ids[None].astype("int64"))).logits[0],
            torch.tensor(row.labels.astype("int64")),
            reduction="sum",
        )
        for row in rows
    )
    assert bool((found - wanted).abs() < 1e-5 * wanted) == exact


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral"}, 4096),  # the default of transformers, as for Mistral-7B-v0.1
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "llama", "sliding_window": 8}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "num_hidden_layers": 28}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "num_hidden_layers": 29}, 8),
        ({**SLIDES, "model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_the_window_follows_from_config_json(config: dict[str, Any], window: int | None):
    assert attention_window(config) == window
    if window is not None:
        with pytest.raises(ConfigError):
            check_window(json.loads(json.dumps(config)), "m", window + 1, "data.max_length")
