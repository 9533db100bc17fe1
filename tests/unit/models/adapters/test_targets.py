"""What `lora.*` means in a model, and that everything wrong is said before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config.schema import LoraConfig
from finetune.models.adapters.targets import plan_targets
from finetune.system.errors import ConfigError

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
def test_targets(untouched, settings: dict[str, Any], modules: set[str], count: int) -> None:
    targets = plan_targets(untouched("none"), LoraConfig(**settings))
    assert (leaves(targets.ranks), len(targets.ranks)) == (modules, count)


def test_patterns_give_ranks(untouched) -> None:
    targets = plan_targets(untouched("none"), LoraConfig(rank=2, rank_pattern={"q_proj": 6, r"layers\.1\..*": 4}))
    given = {name.removeprefix("model.layers."): rank for name, rank in targets.ranks.items()}
    assert given == {"0.self_attn.q_proj": 6, "0.self_attn.v_proj": 2, "1.self_attn.q_proj": 6, "1.self_attn.v_proj": 4}


def test_a_name_to_save_means_that_module_alone(untouched) -> None:
    assert plan_targets(untouched("none"), LoraConfig(modules_to_save=["norm"])).modules_to_save == ["model.norm"]


@pytest.mark.parametrize(
    ("quant_type", "settings", "says"),
    [
        ("nf4", {"target_modules": ["qproj", "v_proj"]}, "'qproj' matches no module; did you mean q_proj"),
        ("nf4", {"target_modules": "self_attn.q"}, "'self_attn.q' matches no module"),
        ("nf4", {"target_modules": "(q_proj"}, "no valid regex"),
        ("nf4", {"target_modules": ["lm_head"]}, "lm_head, which is the output layer"),
        ("nf4", {"target_modules": ["embed_tokens"]}, "model.embed_tokens, which is a Embedding"),
        ("nf4", {"target_modules": ".*mlp.*"}, "model.layers.0.mlp, which is a Qwen2MLP"),
        ("nf4", {"layers_to_transform": [1, 2, 7]}, r"[2, 7] are beyond the model's 2 layers (0 to 1)"),
        ("nf4", {"layers_to_transform": []}, "is empty"),
        ("nf4", {"layers_to_transform": [0], "target_modules": ".*q_proj"}, "let the regex name the layers"),
        ("nf4", {"rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj' matches no targeted module"),
        ("nf4", {"alpha_pattern": {"(": 4.0}}, "alpha_pattern: '(' is no valid regex"),
        ("nf4", {"modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module"),
        ("nf4", {"modules_to_save": ["down_proj"]}, "model.layers.0.mlp.down_proj is quantized"),
        ("none", {"modules_to_save": ["self_attn"]}, "both name model.layers.0.self_attn.q_proj"),
        ("nf4", {"modules_to_save": ["lm_head"], "new_tokens": ["<x>"]}, "trains in full; drop one"),
        ("nf4", {"init": "pissa"}, "set quant.type=none"),
        ("int8", {"init": "olora"}, "set quant.type=none"),
        ("int8", {"init": "loftq"}, "set quant.type=nf4"),
        ("none", {"init": "loftq"}, "set quant.type=nf4"),
        ("nf4", {"init": "orthogonal", "rank": 3, "rank_pattern": {"q_proj": 4}}, "needs even ranks, got [3]"),
        ("none", {"init": "pissa", "rank": 33}, "rank 33 is above 32, the most that model.layers.0"),
        ("int8", {"dora": True}, "set quant.type=nf4"),
        ("nf4", {"init": "gaussian", "init_adapter": "somewhere"}, "drop one"),
    ],
)
def test_what_is_refused(untouched, quant_type: Any, settings: dict[str, Any], says: str) -> None:
    model = untouched(quant_type)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError) as error:
        plan_targets(model, LoraConfig(**settings))
    assert says in str(error.value)
    assert [name for name, _ in model.named_modules()] == before


def test_problems_are_told_together(untouched) -> None:
    with pytest.raises(ConfigError) as error:
        plan_targets(
            untouched("nf4"), LoraConfig(target_modules=["qproj"], layers_to_transform=[9], init="pissa_niter_16")
        )
    assert len(str(error.value).splitlines()) >= 2
    assert "'qproj'" in str(error.value) and "[9]" in str(error.value)
