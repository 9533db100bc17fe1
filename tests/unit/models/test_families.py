"""The package's own copy of the Qwen2.5 shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, Qwen2Config

from finetune.config.schema import LoraConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.families import FAMILIES, QWEN25_SHAPES, SHAPE_KEYS, shape_of
from finetune.planning.static_memory import linear_shapes
from finetune.system.errors import ConfigError


def test_shapes_equal_those_of_the_reference_configs(shared: Path) -> None:
    files = sorted((shared / "qwen2.5" / "configs").glob("*.json"))
    assert {file.stem.removeprefix("qwen2.5-") for file in files} == set(QWEN25_SHAPES)
    for file in files:
        config = json.loads(file.read_text())
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        expected = {key: config[key] for key in ("model_type", *SHAPE_KEYS)}
        assert QWEN25_SHAPES[file.stem.removeprefix("qwen2.5-")] == expected


def test_the_family_names_the_linear_layers_of_the_model() -> None:
    family = FAMILIES["qwen2"]
    config = Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear == {*family.linear_modules, family.head}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "7B"),
        ("Qwen/Qwen2.5-Coder-1.5B", "1.5B"),
        ("someone/qwen2.5-math-72b-instruct", "72B"),
        ("Qwen/Qwen2.5-0.5B", "0.5B"),
    ],
)
def test_the_shape_of_a_hub_id_follows_from_its_size(name: str, size: str) -> None:
    assert shape_of(name) == QWEN25_SHAPES[size]


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-8B-Instruct", "Qwen/Qwen2-7B", "Qwen/Qwen2.5-8B", "no/such"])
def test_other_hub_ids_have_no_known_shape(name: str) -> None:
    assert shape_of(name) is None


def test_an_invalid_config_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert shape_of(str(tmp_path)) is None


def test_other_families_are_an_error() -> None:
    config = GemmaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    with pytest.raises(ConfigError, match="found 'gemma'; supported: qwen2"):
        attach_lora(AutoModelForCausalLM.from_config(config), LoraConfig())


def test_the_shape_of_a_folder_is_read_from_its_config(make_base, tmp_path: Path) -> None:
    base = make_base(tied=False)
    shape = shape_of(str(base))
    assert shape is not None
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["tie_word_embeddings"]) == (64, 2, False)
    config = json.loads((base / "config.json").read_text()) | {"head_dim": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert linear_shapes(shape_of(str(tmp_path)) or {})["q_proj"] == (40 * config["num_attention_heads"], 64)
