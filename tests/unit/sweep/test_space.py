"""A sweep has the same runs as Hydra, in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.compose import load_config
from finetune.sweep.space import read_space
from finetune.system.errors import ConfigError


def hydras_runs(words: list[str]) -> list[dict[str, str]]:
    """Return the runs of Hydra's own sweeper."""
    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    return [dict(word.split("=", 1) for word in run) for batch in batches for run in batch]


def our_runs(words: list[str]) -> list[dict[str, str]]:
    space = read_space(words, "quickstart.yaml", False)
    return [dict(word.split("=", 1) for word in space.fixed) | values for values in space.grid()]


def parsed(run: dict[str, str]) -> dict[str, object]:
    """Parse the values: True and true are equal."""
    return {key: yaml.safe_load(value) for key, value in run.items()}


WORDS = [
    ["train.learning_rate=1e-4,2e-4", "lora.rank=8,16"],
    ["lora.rank=8,16", "train.max_steps=3", "train.learning_rate=1e-4,2e-4,5e-4", "lora.rslora=true,false"],
    ["lora.rank=range(4,16,4)", "lora.alpha=choice(8,16)"],
    ["lora.rank=range(3)", "lora.alpha=sort(16,4,8,reverse=true)"],
    ["lora.target_modules=[q_proj,v_proj],all-linear,[q_proj]"],
    ["train.eval_every=3,null"],
    ["model.tokenizer='a b','c,d'"],
    ["lora.rank_pattern={q_proj: 4},{}"],
    ["lora.alpha=range(0.5,2,0.5)"],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_the_runs_are_those_of_hydras_sweeper_in_its_order(words: list[str]):
    ours, hydras = our_runs(words), hydras_runs(words)
    assert [parsed(run) for run in ours] == [parsed(run) for run in hydras] and len(ours) > 1


@given(st.lists(st.lists(st.integers(1, 50), min_size=2, max_size=4, unique=True), min_size=1, max_size=3))
def test_a_grid_is_the_product_and_its_last_key_varies_fastest(values: list[list[int]]):
    keys = ("lora.rank", "lora.alpha", "train.max_steps")
    words = [f"{key}={','.join(map(str, some))}" for key, some in zip(keys, values, strict=False)]
    assert our_runs(words) == hydras_runs(words)


def test_a_repeated_value_is_one_run():
    assert [run["lora.rank"] for run in our_runs(["lora.rank=8,16,8"])] == ["8", "16"]


def test_every_value_is_read_by_a_run_as_typed():
    words = [
        "lora.target_modules=[q_proj,v_proj],all-linear",
        "data.train.0.name='a b','c,d'",
        "train.eval_every=1,null",
    ]
    loaded = [
        load_config("quickstart.yaml", [f"{key}={value}" for key, value in run.items()]) for run in our_runs(words)
    ]
    assert [cfg.lora.target_modules for cfg in loaded[::4]] == [["q_proj", "v_proj"], "all-linear"]
    assert [cfg.data.train[0].name for cfg in loaded[:4:2]] == ["a b", "c,d"]
    assert [cfg.train.eval_every for cfg in loaded[:2]] == [1, None]


def test_a_glob_takes_the_options_of_a_group(tmp_path: Path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "zz-own.yaml").write_text("rank: 3\n")
    space = read_space(["lora=glob(*)"], str(tmp_path / "c.yaml"), False)
    assert {"qv", "all-linear", "zz-own"} <= set(space.parameters[0].choices)
    some = read_space(["lora=glob(*,exclude=[a*,d*,p*,zz*])"], str(tmp_path / "c.yaml"), False)
    assert some.parameters[0].choices == ("qv", "rslora")


def test_an_interval_knows_its_ends_its_scale_and_whole_numbers():
    words = ["train.learning_rate=tag(log,interval(1e-5,1e-3))", "lora.rank=interval(4,32)", "lora.alpha=range(4,20,4)"]
    rate, rank, alpha = read_space(words, "quickstart.yaml", True).parameters
    assert (rate.low, rate.high, rate.logarithmic, rate.whole) == (1e-5, 1e-3, True, False)
    assert (rank.low, rank.high, rank.logarithmic, rank.whole) == (4, 32, False, True)
    assert alpha.ordered and alpha.choices == ("4", "8", "12", "16")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["lora.rank=8"], "no setting varies"),
        (["lora.rank=8,16", "lora.rank=4"], "no setting varies"),
        (["output_dir=a,b", "train.resume=auto", "lora.rank=interval(1,2)"], "3 problems"),
        (["lora.rank=range(1,2000)"], "more than 1,000 runs"),
        (["lora.rank=interval(4,4)"], "is empty, found 4"),
        (["lora.rank=range(4,4)"], "no value"),
        (["lora.rank=interval(1.5,4)"], "must be whole numbers"),
        (["train.learning_rate=tag(log,interval(0,1))"], "above 0"),
        (["lora=glob(nothing*)"], "lora .*no option .*all-linear"),
    ],
)
def test_invalid_settings_are_refused(words: list[str], found: str):
    with pytest.raises(ConfigError, match=found):
        read_space(words, "quickstart.yaml", False)


def test_text_that_is_not_hydras_grammar_is_one_value():
    space = read_space([r"quant.skip_modules=layers\.(1|2", "lora.rank=4,8"], "quickstart.yaml", False)
    assert space.fixed == (r"quant.skip_modules=layers\.(1|2",)
