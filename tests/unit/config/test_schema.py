"""The schema: every key has a description, a type and a range; no value is converted to another type."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from finetune.config.keys import allowed, find, is_section, schema_fields, schema_help, sections, takes
from finetune.config.schema import RunConfig

MINIMAL: dict[str, Any] = {"model": {"name": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}}

# Key -> legal values at the limit, values just outside.
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "lora.rank": ([1], [0, -1]),
    "lora.alpha": ([1e-9, 16], [0, -1.0]),
    "lora.dropout": ([0, 0.99], [1, -0.1]),
    "lora.layers_to_transform": ([[0]], [[-1]]),
    "lora.rank_pattern": ([{"q_proj": 1}], [{"q_proj": 0}]),
    "lora.alpha_pattern": ([{"q_proj": 0.5}], [{"q_proj": 0}]),
    "data.train": ([[{"path": "x", "weight": 0.1, "limit": 1}], "x", ["x"]], [5, [{"path": ""}]]),
    "data.train.0.weight": ([0.5, 3], [0, -1]),
    "data.train.0.limit": ([1, None], [0]),
    "data.max_length": ([2], [1]),
    "train.max_steps": ([1, None], [0]),
    "train.epochs": ([0.5, None], [0]),
    "train.learning_rate": ([1e-9, 1], [0, 1.1]),
    "train.warmup_ratio": ([0, 0.5], [-0.1, 1]),
    "train.warmup_steps": ([None, 10], [0, 1.5]),
    "train.batch_size": ([1], [0]),
    "train.micro_batch_size": ([1, 16, None], [0]),
    "train.max_grad_norm": ([0, 1], [-1]),
    "train.weight_decay": ([0, 0.1], [1, -0.1]),
    "train.beta1": ([0, 0.9], [1, -0.1]),
    "train.beta2": ([0, 0.999], [1, -0.1]),
    "train.eps": ([1e-12], [0]),
    "train.min_lr_ratio": ([0, 0.999], [-0.1, 1]),
    "train.lora_plus_ratio": ([1, 16, None], [0.9]),
    "train.neftune_alpha": ([0, 5], [-1]),
    "train.gradient_checkpointing": (["auto", "none", "all", "offload", 1], [0, -1]),
    "data.held_out": ([0, 0.5, 0.999], [-0.1, 1]),
    "data.max_bad_share": ([0, 0.999], [-0.1, 1]),
    "data.workers": ([1, None], [0]),
    "data.image.min_pixels": ([1], [0]),
    "data.image.max_pixels": ([3136], [0]),
    "data.video.fps": ([0.1, 30], [0]),
    "data.video.max_frames": ([2], [1]),
    "data.video.min_pixels": ([1], [0]),
    "data.video.max_pixels": ([100352], [0]),
    "data.audio.max_seconds": ([0.1, 3000], [0]),
    "distill.beta": ([1e-9, 0.999], [0, 1]),
    "preference.beta": ([1e-9, 5], [0, -0.1]),
    "preference.gamma": ([0, 2], [-0.1]),
    "preference.label_smoothing": ([0, 0.49], [0.5, -0.1]),
    "preference.desirable_weight": ([1e-9, 2], [0]),
    "preference.undesirable_weight": ([1e-9, 2], [0]),
    "preference.sft_weight": ([0, 2], [-0.1]),
    "reward.group_size": ([2], [1, 0]),
    "reward.max_new_tokens": ([1], [0]),
    "reward.temperature": ([1e-9, 2], [0]),
    "reward.updates": ([1, 4], [0]),
    "reward.clip_low": ([1e-9, 0.99], [0, 1]),
    "reward.clip_high": ([0.2, 3, None], [0]),
    "reward.beta": ([0, 0.1], [-0.1]),
    "reward.length": ([1], [0]),
    "distill.alpha": ([1e-9, 0.999], [0, 1]),
    "distill.temperature": ([1e-9], [0]),
    "distill.weight": ([0, 2, None], [-1]),
    "distill.hidden_weight": ([0, 1], [-1]),
    "distill.on_policy": ([0, 0.5, 1], [-0.1, 1.1]),
    "distill.on_policy_tokens": ([1], [0]),
    "distill.on_policy_temperature": ([1e-9], [0]),
    "distill.top_k": ([1, 256], [0, 257]),
    "distill.num_samples": ([1, 256], [0, 257]),
    "distill.seed": ([0, 2**32 - 1], [-1, 2**32]),
    "distill.spot_check": ([0, 3], [-1]),
    "distill.teacher.steps_ahead": ([1], [0]),
    "distill.teacher.requests": ([1], [0]),
    "train.save_every": ([1, None], [0]),
    "train.pause_at": ([1, None], [0]),
    "train.keep_checkpoints": ([1], [0]),
    "train.seed": ([0, 2**32 - 1], [-1, 2**32]),
    "train.world_size": ([1, None], [0]),
    "guard.max": ([1e-9], [0.0]),
    "guard.steps": ([1], [0]),
    "generation.max_new_tokens": ([1], [0]),
    "generation.batch_size": ([1], [0]),
    "generation.num_examples": ([0], [-1]),
    "generation.samples": ([0], [-1]),
}


# Other keys that a key of distill, preference or reward needs.
OTHERS: dict[str, dict[str, Any]] = {
    "distill.beta": {"objective": "recover", "divergence": "jsd"},
    "preference.gamma": {"objective": "simpo"},
    "preference.desirable_weight": {"objective": "kto"},
    "preference.undesirable_weight": {"objective": "kto"},
    "reward.length": {"loss": "grpo", "functions": {"length": 1.0}},
    "distill.alpha": {"objective": "recover", "divergence": "skew_kl"},
    "distill.weight": {"objective": "sft+anchor"},
    "distill.teacher.steps_ahead": {"objective": "recover", "teacher": {"placement": "streamed"}},
}


def with_value(key: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {name: dict(part) for name, part in MINIMAL.items()}
    if key.startswith("distill."):
        tree["distill"] = dict(OTHERS.get(key, {"objective": "recover"}))
    if key.startswith("preference."):
        tree["preference"] = dict(OTHERS.get(key, {"objective": "dpo"}))
    if key.startswith("reward."):
        tree["reward"] = dict(OTHERS.get(key, {"loss": "grpo"}))
    if key.startswith("guard."):
        tree |= {"guard": {"max": 0.1, "action": "recover"}, "train": {"eval_every": 5}}
        tree["data"]["eval"] = [{"path": "heldout.jsonl"}]
    tree["data"]["train"] = [dict(MINIMAL["data"]["train"][0])]
    node: Any = tree
    *way, last = [int(step) if step.isdecimal() else step for step in key.split(".")]
    for step in way:
        node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
    node[last] = value
    return tree


def accepted(key: str, value: Any) -> bool:
    try:
        RunConfig.model_validate(with_value(key, value))
    except ValidationError:
        return False
    return True


def bounded_keys() -> set[str]:
    bounded = ("Ge(", "Gt(", "Le(", "Lt(", "MinLen(")
    fields = {key: f"{field.annotation} {field.metadata}" for key, field in schema_fields().items()}
    return {key for key, text in fields.items() if any(mark in text for mark in bounded)}


@pytest.mark.parametrize("key", RANGES)
def test_a_number_is_accepted_up_to_its_limit_and_not_beyond(key: str):
    inside, outside = RANGES[key]
    assert [value for value in inside if not accepted(key, value)] == []
    assert [value for value in outside if accepted(key, value)] == []


def test_every_bounded_key_is_tested_at_its_limits():
    # These need other keys; test_rules.py tests them.
    elsewhere = {
        "train.eval_every",
        "train.early_stopping",
        "generation.every",
        "data.stream_rows",
        "train.decay_ratio",
    }
    tested = {key.replace(".0", ".*") for key in RANGES}
    missing = {key for key in bounded_keys() - tested - elsewhere if not key.startswith("data.eval.*")}
    assert missing == set()


NEARLY: dict[type, tuple[Any, ...]] = {
    bool: ("true", "yes", 1, 0),
    int: ("10", "ten", 1.0, 1.5, True, math.inf, [1]),
    float: ("ten", " 1", "1_0", "nan", "inf", "", True, math.nan, math.inf, [1.0]),
    str: (False, 1, 1.5, ["a", 1], b"a"),
    list: (3, {"a": {}}, [{}], [None]),
    dict: (3, ["a"], {"a": {}}, {1: 1}),
}


def kinds() -> list[tuple[str, Any]]:
    """Return values whose type is nearly the right one."""
    wrong: list[tuple[str, Any]] = []
    for key in schema_fields().keys() - sections().keys():
        path = key.replace("*", "0")
        annotation = find(path)
        kind = next((kind for kind in NEARLY if takes(kind, annotation)), None)
        values = NEARLY[kind] if kind else ("nonsense", True, 4, None, "")
        if kind is bool and not takes(type(None), annotation):
            values += (None,)
        wrong += [(path, value) for value in values if not key.startswith("data.eval.*")]
    return wrong


def test_a_value_of_another_type_is_an_error_and_never_converted():
    assert [(key, value) for key, value in kinds() if accepted(key, value)] == []


@pytest.mark.parametrize("text", ["2e-4", "0.0002", "2E-4", "+.0002", "2.e-4"])
def test_text_that_is_exactly_a_number_is_that_number(text: str):
    config = RunConfig.model_validate(with_value("train.learning_rate", text))
    assert config.train.learning_rate == 2e-4


@pytest.mark.parametrize("key", ["model.dtype", "quant.compute_dtype", "distill.teacher.dtype"])
@pytest.mark.parametrize(("short", "long"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_dtype_has_a_short_and_a_long_name_and_is_saved_as_the_long_one(key: str, short: str, long: str):
    assert accepted(key, long)
    config = RunConfig.model_validate(with_value(key, short))
    section: Any = config.model_dump()
    for part in key.split("."):
        section = section[part]
    assert section == long
    assert f"{short} | {long}" in allowed(find(key))
    assert not accepted(key, "float64")


def test_an_unknown_key_is_refused_at_every_level():
    levels = ["extra", *(f"{key.replace('*', '0')}.extra" for key in sections()), "data.train.0.extra"]
    assert [level for level in levels if accepted(level, 1)] == []


def test_a_config_never_changes():
    config = RunConfig.model_validate(MINIMAL)
    with pytest.raises(ValidationError):
        config.train.max_steps = 3  # pyrefly: ignore


def test_two_configs_share_no_list():
    first, second = RunConfig.model_validate(MINIMAL), RunConfig.model_validate(MINIMAL)
    first.lora.modules_to_save.append("x")
    assert second.lora.modules_to_save == RunConfig.model_validate(MINIMAL).lora.modules_to_save == []


@pytest.mark.parametrize("width", [24, 38])
def test_help_describes_every_key_in_aligned_lines(width: int):
    lines = schema_help(width=width).splitlines()
    assert max(map(len, lines)) <= 120
    for key, field in schema_fields().items():
        assert field.description, key
        if not is_section(field.annotation) and not key.startswith("data.eval.*"):
            [start] = [n for n, line in enumerate(lines) if line.split(maxsplit=1)[0:1] == [key.replace("*", "0")]]
            end = next((n for n in range(start + 1, len(lines)) if lines[n][2:3].strip()), len(lines))
            below = [line for line in lines[start + 1 : end] if line.startswith("   ")]
            assert all(line[: width + 3].isspace() and line[width + 3] != " " for line in below)
            assert " ".join(" ".join([lines[start], *below]).split()).endswith(" ".join(field.description.split()))


def test_help_names_types_ranges_and_defaults():
    text = schema_help()
    for part in (
        'quant.type = "nf4"',
        "nf4 | int8 | none",
        "train.max_steps = null",
        "whole number >= 1 or null",
    ):
        assert part in text
    assert "outputs/${name}" in text


@pytest.mark.parametrize(
    "path",
    [
        "train.max_step",
        "data.train.x.path",
        "train.max_steps.more",
        "lora.rank.0",
        "data.train.0.",
        "data.train.0.roles.bot",
    ],
)
def test_only_keys_of_the_schema_are_found(path: str):
    assert find(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "train",
        "data.train.12.limit",
        "lora.rank_pattern.model.layers.0.q_proj",
        "lora.new_tokens.0",
        "data.train.0.columns.any",
        "data.train.0.roles.user",
    ],
)
def test_keys_inside_lists_and_mappings_are_found(path: str):
    assert find(path) is not None


def test_importing_the_config_imports_no_torch():
    code = (
        "import sys, finetune.config.compose, finetune.config.keys; print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
