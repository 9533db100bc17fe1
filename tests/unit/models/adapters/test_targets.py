"""`lora.*` is resolved in a model; every problem is reported before anything changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from finetune.config.schema import LoraConfig
from finetune.models.adapters.targets import plan_targets
from finetune.system.errors import ConfigError
from tests.media_models import random_media_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def leaves(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("settings", "modules", "count"),
    [
        ({}, {"q_proj", "v_proj"}, 4),
        ({"target_modules": "all-linear"}, set(ALL), 14),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, set(ALL), 7),
        ({"target_modules": r".*\.layers\.0\..*_proj"}, set(ALL), 7),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, {"up_proj"}, 1),
    ],
)
def test_names_regexes_and_layers_choose_the_targets(
    untouched, settings: dict[str, Any], modules: set[str], count: int
) -> None:
    targets = plan_targets(untouched("none"), LoraConfig(**settings))
    assert (leaves(targets.ranks), len(targets.ranks)) == (modules, count)


def test_rank_pattern_sets_the_ranks(untouched) -> None:
    targets = plan_targets(untouched("none"), LoraConfig(rank=2, rank_pattern={"q_proj": 6, r"layers\.1\..*": 4}))
    given = {name.removeprefix("model.layers."): rank for name, rank in targets.ranks.items()}
    assert given == {"0.self_attn.q_proj": 6, "0.self_attn.v_proj": 2, "1.self_attn.q_proj": 6, "1.self_attn.v_proj": 4}


def test_modules_to_save_match_whole_parts_of_names(untouched) -> None:
    assert plan_targets(untouched("none"), LoraConfig(modules_to_save=["norm"])).modules_to_save == ["model.norm"]


@pytest.mark.parametrize(
    ("quant_type", "settings", "token"),
    [
        ("nf4", {"target_modules": ["qproj", "v_proj"]}, "'qproj' matches no module; did you mean q_proj"),
        ("nf4", {"target_modules": "self_attn.q"}, "'self_attn.q' matches no module"),
        ("nf4", {"target_modules": ["lm_head"]}, "lm_head (the output layer)"),
        ("nf4", {"target_modules": ["embed_tokens"]}, "model.embed_tokens (Embedding)"),
        ("nf4", {"target_modules": ".*mlp.*"}, "model.layers.0.mlp (Qwen2MLP)"),
        ("nf4", {"layers_to_transform": [1, 2, 7]}, "layers 0 to 1, found [2, 7]"),
        ("nf4", {"rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj' matches no targeted module"),
        ("nf4", {"alpha_pattern": {"up_proj": 4.0}}, "alpha_pattern: 'up_proj' matches no targeted module"),
        ("nf4", {"modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module"),
        ("nf4", {"modules_to_save": ["down_proj"]}, "model.layers.0.mlp.down_proj is quantized"),
        ("none", {"modules_to_save": ["self_attn"]}, "model.layers.0.self_attn.q_proj is also in"),
        ("nf4", {"modules_to_save": ["lm_head"], "new_tokens": ["<x>"]}, "lora.new_tokens: lora.modules_to_save"),
        ("int8", {"init": "loftq"}, "lora.init: loftq"),
        ("none", {"init": "loftq"}, "lora.init: loftq"),
        ("none", {"init": "pissa", "rank": 33}, "at most 32 on model.layers.0"),
        ("int8", {"dora": True}, "set quant.type=nf4"),
    ],
)
def test_each_problem_is_an_error_and_the_model_does_not_change(
    untouched, quant_type: Any, settings: dict[str, Any], token: str
) -> None:
    model = untouched(quant_type)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError) as error:
        plan_targets(model, LoraConfig(**settings))
    assert token in str(error.value)
    assert [name for name, _ in model.named_modules()] == before


def test_all_problems_are_reported_together(untouched) -> None:
    with pytest.raises(ConfigError) as error:
        plan_targets(untouched("nf4"), LoraConfig(target_modules=["qproj"], layers_to_transform=[9], dora=True))
    assert len(str(error.value).splitlines()) >= 2
    assert "'qproj'" in str(error.value) and "[9]" in str(error.value)


@pytest.mark.parametrize(
    ("family", "towers", "count"), [("qwen2_5_vl", ["vision"], 10), ("qwen2_5_omni", ["vision", "audio"], 26)]
)
def test_every_linear_of_the_layers_of_a_tower_gets_an_adapter_if_asked(family, towers, count) -> None:
    """Names of the decoder never reach a tower: the audio tower has a q_proj too."""
    model = random_media_model(family)
    decoder = plan_targets(model, LoraConfig()).ranks
    assert len(decoder) == 4 and all(name.startswith("model.language_model.layers.") for name in decoder)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name for name in linears if re.match(r"model\.(?:visual\.blocks|audio_tower\.layers)\.", name)}
    assert len(blocks) == count
    assert plan_targets(model, LoraConfig(towers=towers)).ranks.keys() == decoder.keys() | blocks


def test_a_tower_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Qwen2\.5-VL has no audio tower; it has vision"):
        plan_targets(random_media_model("qwen2_5_vl"), LoraConfig(towers=["audio"]))
