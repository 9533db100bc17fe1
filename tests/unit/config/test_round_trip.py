"""The resolved YAML of a run reads back to an equal config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from finetune.config.compose import load_config, resolved, to_yaml
from finetune.config.schema import RunConfig

NASTY = [
    "no",
    "null",
    "~",
    "2e-4",
    "1_000",
    "0x10",
    "12:30:00",
    "2026-01-01",
    "${name}",
    "\\${x}",
    "\\\\${",
    "${",
    "a\\",
]
NASTY += [
    "#x",
    "a: b",
    "- a",
    "'",
    '"',
    "{a}",
    "[a]",
    "*a",
    "&a",
    "!!int 3",
    "%x",
    " a ",
    "a\nb\n",
    "\t",
    "é漢😀",
    "\x85",
]
NASTY += [
    "<<",
    "=",
    "????",
    "_target_",
    "$",
    "\\",
    "\ufeff",
    "|",
    ">",
    "@a",
    "`",
    "\u2028",
    "hydra:",
    "1e5",
    ".nan",
    "\x1b",
]

text = st.one_of(st.sampled_from(NASTY), st.text(min_size=1)).filter(
    lambda value: value != "???" and "\0" not in value and not re.search("[\ud800-\udfff]", value)
)
name = text.filter(lambda value: not re.search(r"[/\\\x00-\x1f]", value))
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
whole = st.integers(min_value=1, max_value=10**9)
source = st.fixed_dictionaries({"path": text}, optional={"name": text, "split": text, "limit": whole})


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Draw valid runs with hostile text and numbers of every size."""
    tree: dict[str, Any] = {
        "name": draw(name),
        "output_dir": draw(text),
        "model": {"name": draw(text), "revision": draw(st.none() | text)},
        "quant": {"type": "none", "double": draw(st.booleans())},
        "lora": {
            "alpha": draw(positive),
            "target_modules": draw(st.just("all-linear") | st.just(["down_proj"])),
            "modules_to_save": draw(st.lists(text, max_size=3, unique=True)),
            "rank_pattern": draw(st.dictionaries(text.map(re.escape), whole, max_size=3)),
            "init": draw(st.sampled_from(["default", "pissa", "olora"])),
        },
        "data": {"train": draw(st.lists(source, min_size=1, max_size=2)), "system": draw(st.none() | text)},
        "train": {
            "learning_rate": draw(st.floats(min_value=1e-300, max_value=1)),
            "eps": draw(positive),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "resume": draw(text),
            **draw(st.sampled_from([{}, {"max_steps": 7}, {"epochs": 0.1}])),
        },
        "track": {"wandb": draw(st.booleans()), "run_name": draw(st.none() | text)},
    }
    return RunConfig.model_validate(tree)


FIND = (Phase.explicit, Phase.generate)  # Shrinking an example would take minutes: each is parsed, or composed.


def read(saved: str) -> Any:
    """Read a YAML text like Hydra, without resolving interpolations."""
    return OmegaConf.to_container(OmegaConf.create(saved), resolve=False)


@settings(max_examples=40, phases=FIND)
@given(config=runs())
def test_the_resolved_yaml_of_any_run_reads_back_to_that_run(config: RunConfig):
    problems: list[Any] = []
    tree = resolved(read(to_yaml(config)), problems)
    assert not problems
    assert RunConfig.model_validate(tree) == config


@settings(
    max_examples=5,
    phases=FIND,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(config=runs())
def test_load_config_reads_a_saved_run(config: RunConfig, tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config


def test_text_stays_text_for_every_reader_of_yaml():
    """OmegaConf reads 2e-4 as a number and PyYAML does not: quoted, both read text."""
    tree = {"model": {"name": "2e-4", "revision": "no"}, "data": {"train": [{"path": "x"}]}}
    saved = to_yaml(RunConfig.model_validate(tree))
    for values in (yaml.safe_load(saved), read(saved)):
        assert (values["model"]["name"], values["model"]["revision"]) == ("2e-4", "no")


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "???"])
def test_text_that_yaml_cannot_store_is_refused(value: str):
    with pytest.raises(ValueError, match=r"model\.revision"):
        RunConfig.model_validate({"model": {"name": "x", "revision": value}, "data": {"train": [{"path": "x"}]}})
