"""`key=value`: every key of the schema without `+`, values in Hydra's grammar, text as typed, options of commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.config.command_options import AllocateOptions, PlanOptions, SensitivityOptions
from finetune.config.keys import schema_fields, sections
from finetune.config.overrides import parse_overrides, quoted, read_beside_config
from finetune.system.arguments import Arguments
from finetune.system.errors import ConfigError


def value_of(override: str) -> Any:
    parsed = parse_overrides([override])
    assert not parsed.problems, parsed.problems
    [(_, value)] = parsed.values
    return value


def problem_of(override: str) -> str:
    parsed = parse_overrides([override])
    assert (parsed.values, parsed.groups) == ([], {})
    [problem] = parsed.problems
    return f"{problem.key}: {problem.text}"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.max_steps=10", 10),
        ("train.learning_rate=2e-4", 2e-4),
        ("train.max_steps=null", None),
        ("track.wandb=true", True),
        ("+train.seed=3", 3),
        ("++train.seed=3", 3),
        (" train.seed = 3 ", 3),
        ("data.train=[{path: rows.jsonl}]", [{"path": "rows.jsonl"}]),
        (
            "data.train=[{path: 'é (1).jsonl', limit: 5},{path: b}]",
            [{"path": "é (1).jsonl", "limit": 5}, {"path": "b"}],
        ),
        ("lora.rank_pattern={q_proj: 4}", {"q_proj": 4}),
        ("lora.target_modules=[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("lora.target_modules=all-linear", "all-linear"),
        ("train.max_steps=${train.seed}", "${train.seed}"),
    ],
)
def test_values_are_read_by_hydras_grammar(override: str, value: Any):
    assert value_of(override) == value


@pytest.mark.parametrize(
    "text",
    [
        "/données/漢 (2)/x=1",
        "1234567",
        "1e5",
        "true",
        "no",
        "a,b",
        "You are kind: be brief.",
        "#1",
        "a'b",
        "[INST] x",
        "~",
        "{a}",
        "x ${name}",
    ],
)
def test_a_text_key_keeps_text_as_typed(text: str):
    assert value_of(f"data.system={text}") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("'null'", "null"),
        ('"a b"', "a b"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("[qv]_proj", "[qv]_proj"),
        ("", ""),
    ],
)
def test_quotes_and_null_keep_their_meaning_in_text(text: str, value: Any):
    assert value_of(f"lora.target_modules={text}") == value


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1))
@example("it's \\' a \\\\ 'test'\\")
def test_quoted_text_is_read_as_that_text(text: str):
    assert value_of(f"model.name={quoted(text)}") == text


def test_every_key_of_the_schema_can_be_overridden(load: Callable):
    for key in schema_fields().keys() - sections().keys():
        if not key.startswith("data.eval.*"):
            assert parse_overrides([f"{key.replace('*', '0')}=1"]).problems == []


def test_the_last_of_two_overrides_wins(load: Callable):
    assert load("", "train.seed=1", "train.seed=2").train.seed == 2


def test_items_of_lists_and_names_with_dots_can_be_set(load: Callable):
    config = load("", "data.train.0.limit=5", "lora.rank_pattern.model.layers.0.self_attn.q_proj=4")
    assert config.data.train[0].limit == 5
    assert config.lora.rank_pattern == {"model.layers.0.self_attn.q_proj": 4}


def test_columns_and_roles_of_a_source_are_set_name_by_name_or_together(load: Callable):
    words = ["data.train.0.columns.prompt=question", "data.train.0.columns.completion=the answer"]
    roles = ["data.train.0.roles.user=customer", "data.train.0.roles.assistant=[agent, bot]"]
    source = load("", *words, *roles).data.train[0]
    assert source.columns == {"prompt": "question", "completion": "the answer"}
    assert source.roles == {"user": "customer", "assistant": ["agent", "bot"]}
    both = ["data.train.0.columns={prompt: question}", "data.train.0.roles={user: customer, assistant: [agent, bot]}"]
    source = load("data: {train: [{path: rows.jsonl, columns: {text: body}}]}", *both).data.train[0]
    assert (source.columns, source.roles["assistant"]) == ({"prompt": "question"}, ["agent", "bot"])
    added = load("data: {train: [{path: rows.jsonl, columns: {prompt: q}}]}", "data.train.0.columns.completion=a")
    assert added.data.train[0].columns == {"prompt": "q", "completion": "a"}


def test_a_mapping_given_to_a_section_sets_the_keys_it_names(load: Callable):
    config = load("train: {seed: 3}", "train={max_steps: 5, keep_checkpoints: 1}")
    assert (config.train.seed, config.train.max_steps, config.train.keep_checkpoints) == (3, 5, 1)


def test_lists_and_mappings_of_values_are_replaced_not_merged(load: Callable):
    config = load(
        "lora: {rank_pattern: {a: 1}, modules_to_save: [x, y]}", "lora.rank_pattern={b: 2}", "lora.modules_to_save=[z]"
    )
    assert (config.lora.rank_pattern, config.lora.modules_to_save) == ({"b": 2}, ["z"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_step=3", "train.max_steps"),
        ("train={max_step: 3}", "train.max_steps"),
        ("trian.max_steps=3", "train.max_steps"),
        ("data.train.0.pth=x", "data.train.0.path"),
        ("lora_r=3", "lora.rank"),
        ("data.train.0.roles.bot=x", "system | user | assistant | tool"),
        ("model@teacher=x", "unknown key"),
        ("model/x=y", "unknown key"),
        ("hydra.run.dir=x", "unknown key"),
        ("_target_=os.system", "names no code"),
        ("train.seed=1,2", "a list is written [a, b]"),
        ("train.seed=choice(1,2)", "a list is written [a, b]"),
        ("data.train=[{path: x}", "cannot read"),
        ("lora.new_tokens=extend_list(a)", "cannot read"),
        ("~train.seed", "set it to its default"),
        ("train.seed", "key=value"),
        ("=3", "key=value"),
        ("", "key=value"),
        ("train .seed=3", "key=value"),
    ],
)
def test_an_invalid_override_is_refused_with_help(override: str, words: str):
    assert words in problem_of(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train.1.limit=5", "has 1 items"),
        ("data.eval.0.limit=5", "has 0 items"),
        ("model=qwen2.5-7b-instuct", "qwen2.5-7b-instruct"),
        ("model=Qwen/Qwen2.5-7B-Instruct", "model.name"),
        ("quant=8bit", "no option 8bit"),
        ("track=wandb", "no option wandb"),
        ("train=[1]", "mapping"),
        ("train.seed=ten", "train.seed (command line)"),
        ("output_dir=", 'found ""'),
        ("data.train.0.roles={bot: assistant}", "system | user | assistant | tool"),
        ("data.train.0.columns=question", "mapping as {name: text}"),
        ("data.train.0.columns={prompt: 5}", "in quotes it is text"),
        ("data.train.0.roles.user=[5]", "text or list of text"),
    ],
)
def test_an_override_that_does_not_fit_the_config_is_refused(complaint: Callable, override: str, words: str):
    assert words in complaint("", override)


def arguments(*words: str) -> Arguments:
    return Arguments("lora.yaml", words, frozenset())


def test_words_of_the_command_and_of_the_run_are_separated_and_the_last_counts():
    words = ("model=qwen2.5-7b", "gpu_gb=8", "lora.rank=16", "~distill", "gpu_gb=16", "auto=true")
    options, others = read_beside_config(PlanOptions, arguments(*words), "finetune plan")
    assert (options.gpu_gb, options.auto) == (16, True)
    assert others == ["model=qwen2.5-7b", "lora.rank=16", "~distill"]


@pytest.mark.parametrize("kind", [PlanOptions, SensitivityOptions])
def test_every_section_of_a_run_belongs_to_the_run(kind):
    words = [f"{name}=anything" for name in sections() if name not in kind.model_fields]
    assert read_beside_config(kind, arguments(*words), "finetune")[1] == words


@pytest.mark.parametrize(
    ("kind", "word", "meant"),
    [
        (PlanOptions, "gpu_g=16", "gpu_gb"),
        (PlanOptions, "calibrat=true", "calibrate"),
        (SensitivityOptions, "row=3", "rows"),
        (AllocateOptions, "budget=6", "budget_gb"),
    ],
)
def test_a_typo_in_an_option_gets_the_nearest_option(kind, word, meant):
    with pytest.raises(ConfigError) as raised:
        read_beside_config(kind, arguments(word), "finetune")
    assert f"{word.partition('=')[0]}: unknown key; did you mean {meant}?" in str(raised.value)


@pytest.mark.parametrize("word", ["modl=qwen2.5-7b", "lora_r=16", "train.max_step=3", "absent=1"])
def test_an_unknown_word_is_left_to_the_config(word):
    assert read_beside_config(PlanOptions, arguments(word), "finetune plan")[1] == [word]


def test_a_length_on_the_command_line_replaces_the_other_one_of_the_file(load):
    by_steps, by_epochs = "train: {max_steps: 5}", "train: {epochs: 2}"
    assert (load(by_steps, "train.epochs=1").train.epochs, load(by_steps, "train.epochs=1").train.max_steps) == (
        1,
        None,
    )
    assert load(by_epochs, "train.max_steps=7").train.epochs is None
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        load(by_steps, "train.epochs=1", "train.max_steps=7")
