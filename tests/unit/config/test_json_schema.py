"""The JSON Schema agrees with the validator: what one accepts or refuses, the other does too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest
from omegaconf import OmegaConf

from finetune import load_config
from finetune.cli import main
from finetune.config.compose import to_yaml
from finetune.config.json_schema import json_schema
from finetune.config.keys import schema_fields
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged, packaged_configs

RUNS = [packaged("configs") / name for name in packaged_configs()]
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def errors_of(file: Path) -> list[str]:
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in VALIDATOR.iter_errors(content)]


def written(folder: Path, text: str) -> Path:
    file = folder / "a.yaml"
    file.write_text(f"defaults:\n  - lora\n{text}\n")
    return file


def test_the_shipped_schema_is_that_of_the_command(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert json.loads((packaged("configs") / "schema.json").read_text()) == json_schema(), "finetune schema > configs/…"


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_shipped_config_is_valid_and_names_the_schema(file, tmp_path):
    assert errors_of(file) == []
    (tmp_path / "resolved.yaml").write_text(to_yaml(load_config(str(file), needs_data=False)))
    assert errors_of(tmp_path / "resolved.yaml") == []
    schema = Path(os.path.relpath(packaged("configs") / "schema.json", file.parent)).as_posix()
    assert f"# yaml-language-server: $schema={schema}" in file.read_text().splitlines()


def test_every_key_has_a_description():
    VALIDATOR.check_schema(json_schema())
    sections = {"": json_schema(), **json_schema()["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, part in sections.items()
        for key, v in part["properties"].items()
        if not v.get("description") and "$ref" not in v
    ]
    assert bare == []
    assert len(schema_fields()) > 100


@pytest.mark.parametrize(
    "text",
    [
        "train: {max_steps: 0}",
        "train: {learning_rate: 2}",
        "train: {schedule: cosin}",
        "train: {weight_decay: 1.0}",
        "lora: {rank: high}",
        "lora: {ranks: 8}",
        "modell: {}",
        "quant: {double: maybe}",
        "data: {train: 5}",
        "data: {train: [{format: text}]}",
        "model: {dtype: fp8}",
    ],
)
def test_what_a_run_refuses_the_editor_marks(text, tmp_path):
    file = written(tmp_path, text)
    assert errors_of(file)
    with pytest.raises(ConfigError):
        load_config(str(file), needs_data=False)


@pytest.mark.parametrize(
    "text",
    [
        "train: {max_steps: '${train.batch_size}'}",
        "model: {dtype: bf16}",
        "train: {learning_rate: 1e-4}",
        "lora: {rank_pattern: {q_proj: 4}}",
    ],
)
def test_what_a_run_accepts_the_editor_accepts(text, tmp_path):
    file = written(tmp_path, text)
    load_config(str(file), needs_data=False)
    assert errors_of(file) == []
