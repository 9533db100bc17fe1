"""How module names are matched."""

from __future__ import annotations

import pytest

from finetune.models.module_matching import close_names, ends_with, matches, matches_key

DOWN_1 = "model.layers.1.mlp.down_proj"
DOWN_11 = "model.layers.11.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("down_proj", [DOWN_1, DOWN_11]),
        ("mlp", [DOWN_1, DOWN_11]),
        ("layers.1", [DOWN_1]),
        (DOWN_1, [DOWN_1]),
        ("*.1.*", [DOWN_1]),
        ("*down_proj", [DOWN_1, DOWN_11]),
        (r".*layers\.1\d\..*", [DOWN_11]),
        ("down", []),
        ("layers", [DOWN_1, DOWN_11]),
        ("*[", []),
    ],
)
def test_names_globs_and_regexes_match_modules(pattern: str, found: list[str]) -> None:
    assert [name for name in (DOWN_1, DOWN_11) if matches(pattern, name)] == found


def test_a_suffix_matches_whole_parts_of_a_name() -> None:
    assert ends_with("model.norm", "norm") and ends_with("norm", "norm")
    assert not ends_with("model.layers.0.input_layernorm", "norm")


def test_pattern_keys_match_like_those_of_peft() -> None:
    from peft.utils.other import get_pattern_key

    for key in ("q_proj", r"layers\.1\..*proj", "^model.layers.0.self_attn.q_proj", "proj", "k_proj"):
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
            assert matches_key(key, name) == (get_pattern_key([key], name) == key)


def test_a_wrong_name_gets_close_names_or_all_names() -> None:
    names = ["layers.0.q_proj", "layers.0.v_proj"]
    assert close_names("qproj", names).startswith("did you mean q_proj")
    assert close_names("xyz", names) == "there are q_proj, v_proj"
