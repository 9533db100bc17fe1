"""Any file and any command line give a run or one clean error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.config.compose import load_config, resolved
from finetune.config.explain import problems_of
from finetune.config.keys import find, schema_fields
from finetune.config.overrides import parse_overrides
from finetune.config.peers import PEERS
from finetune.config.problems import Problem, config_error
from finetune.config.schema import RunConfig
from finetune.system.errors import ConfigError

KEYS = [part for field in schema_fields() for part in field.split(".")] + [
    "defaults",
    "_self_",
    "hydra",
    "_target_",
    "0",
]
WORDS = [
    "${name}",
    "${train.seed}",
    "${oc.env:X}",
    "${",
    "???",
    "2e-4",
    "no",
    "rows.jsonl",
    "nf4",
    "null",
    "[a]",
    "a,b",
    "",
]
HYDRA = settings(
    max_examples=25,
    phases=(Phase.explicit, Phase.generate),  # Hydra composes each example; shrinking one would take minutes.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)

keys = st.sampled_from([*KEYS, *PEERS]) | st.text(max_size=8) | st.integers(0, 3) | st.booleans()
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=12)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
sections = st.dictionaries(
    st.sampled_from([*RunConfig.model_fields]) | keys, trees | st.dictionaries(keys, trees), max_size=5
)
overrides = st.one_of(
    st.text(max_size=30),
    st.tuples(st.sampled_from([*schema_fields()]), st.sampled_from("= =[ ={ ='".split()), st.text(max_size=15)).map(
        "".join
    ),
    st.tuples(st.sampled_from([*schema_fields(), "~train", "+x"]), st.just("="), leaves.map(str)).map("".join),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(tree=sections)
def test_any_tree_is_a_run_or_has_problems(tree: dict[Any, Any]):
    problems: list[Problem] = []
    values = resolved(tree, problems)
    try:
        RunConfig.model_validate(values)
    except ValidationError as error:
        problems += problems_of(values, error)
        assert problems
        assert all(line.isprintable() for line in str(config_error("run.yaml", problems, str)).split("\n"))


@settings(max_examples=150)
@given(lines=st.lists(overrides, max_size=3))
@example(lines=["data.train=" + "[" * 1500 + "]" * 1500])
@example(lines=["train.seed=\ud800"])
def test_any_override_is_refused_or_names_a_key_of_the_schema(lines: list[str]):
    parsed = parse_overrides(lines)
    assert all(find(key) is not None for key, _ in parsed.values)
    assert all(find(key) is not None for key in parsed.groups)
    assert all(problem.text and problem.origin for problem in parsed.problems)


def outcome(folder: Path, text: str, lines: list[str]) -> None:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    try:
        assert isinstance(load_config(str(file), lines), RunConfig)
    except ConfigError as error:
        assert all(line.isprintable() for line in str(error).split("\n"))


@HYDRA
@given(tree=sections, lines=st.lists(overrides, max_size=2))
def test_any_yaml_tree_with_any_override_gives_a_run_or_a_config_error(
    tree: dict[Any, Any], lines: list[str], tmp_path: Path
):
    outcome(tmp_path, yaml.safe_dump(tree, allow_unicode=False), lines)


@HYDRA
@given(text=st.text(alphabet="abc:-[]{}&*!|>'\"#%@`?, \n\t0${}~<=.\x85\ufeff\x00", max_size=60))
def test_any_text_gives_a_run_or_a_config_error(text: str, tmp_path: Path):
    outcome(tmp_path, text, [])


@pytest.mark.parametrize("number", range(12))
def test_a_valid_file_with_one_bit_flipped_gives_a_run_or_a_config_error(number: int, tmp_path: Path):
    text = b"model: {name: base}\ndata:\n  train: [{path: rows.jsonl, limit: 5}]\ntrain: {seed: ${data.max_length}}\n"
    place = number * len(text) // 12
    (tmp_path / "run.yaml").write_bytes(text[:place] + bytes([text[place] ^ 1 << number % 8]) + text[place + 1 :])
    try:
        assert isinstance(load_config(str(tmp_path / "run.yaml")), RunConfig)
    except ConfigError as error:
        assert "run.yaml" in str(error)
