"""Positions of three axes equal transformers' `get_rope_index` of each family, for any order of texts and media."""

from __future__ import annotations

from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModelForConditionalGeneration as Omni,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from finetune.data.media.media import Media
from finetune.data.positions import PlacedMedia
from finetune.models.families import FAMILIES, PositionRule

SIDE = st.integers(1, 5).map(lambda tokens: 2 * tokens)  # patches; two of them are a token
IMAGES = st.tuples(st.just("image"), st.tuples(st.just(1), SIDE, SIDE), st.just(0.0))
VIDEOS = st.tuples(
    st.just("video"), st.tuples(st.integers(1, 9), SIDE, SIDE), st.floats(0.05, 4.0) | st.sampled_from([0.08, 0.4, 1.0])
)
SOUNDS = st.tuples(st.just("audio"), st.integers(1, 40), st.just(0.0))
TEXTS = st.tuples(st.just("text"), st.integers(1, 30), st.just(0.0))
KINDS = {"text": 0, "image": 1, "video": 2, "audio": 3}


def rows(*media: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.one_of(TEXTS, *media), min_size=1, max_size=8)


def placed(row: list[tuple], rule: PositionRule) -> tuple[list[int], PlacedMedia]:
    """Return the kind of each token of a row, and its media, each between two tokens of text."""
    kinds, items, starts = [], [], []
    for name, size, seconds in row:
        if name == "text":
            kinds += [0] * size
            continue
        grid = size if isinstance(size, tuple) else None
        tokens = prod(grid) // 4 if grid else size
        starts.append(len(kinds) + 1)
        items.append(Media(name, bytes(16), "file", tokens, grid, seconds, 0 if grid else 4 * tokens))
        kinds += [0, *[KINDS[name]] * tokens, 0]
    return kinds, PlacedMedia(tuple(items), tuple(starts), rule)


def grids(media: PlacedMedia, kind: str) -> torch.Tensor | None:
    found = [item.grid for item in media.items if item.kind == kind]
    return torch.tensor(found) if found else None


def seconds(media: PlacedMedia) -> torch.Tensor:
    return torch.tensor([item.seconds_per_grid for item in media.items if item.kind == "video"])


def check(official: tuple[torch.Tensor, torch.Tensor], kinds: list[int], media: PlacedMedia) -> None:
    """Compare with the official positions of the row and one more token of text."""
    expected = official[0][:, 0].numpy()
    # The last is a text token after the row, as a generated one.
    assert np.array_equal(media.positions(len(kinds) + 1), expected)
    assert np.array_equal(media.positions(len(kinds)), expected[:, :-1])


@pytest.mark.parametrize("steps", [2, 4])
@settings(max_examples=60)
@given(row=rows(IMAGES, VIDEOS))
def test_of_qwen2_5_vl(steps: int, row: list[tuple]):
    rule = FAMILIES["qwen2_5_vl"].positions_of({"vision_config": {"tokens_per_second": steps}})
    kinds, media = placed(row, rule)
    config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": steps})
    model: Any = SimpleNamespace(
        config=config, get_vision_position_ids=partial(Qwen2_5_VLModel.get_vision_position_ids, None)
    )
    types = torch.tensor([[*kinds, 0]])
    official = Qwen2_5_VLModel.get_rope_index(
        model, types, types.int(), grids(media, "image"), grids(media, "video"), seconds(media)
    )
    check(official, kinds, media)


@settings(max_examples=60)
@given(row=rows(IMAGES, VIDEOS, SOUNDS))
def test_of_qwen2_5_omni(row: list[tuple]):
    config = Qwen2_5OmniThinkerConfig(vision_start_token_id=151652)
    kinds, media = placed(row, FAMILIES["qwen2_5_omni"].positions_of({"thinker_config": config.to_dict()}))
    tokens = {1: config.image_token_id, 2: config.video_token_id, 3: config.audio_token_id}
    ids = [tokens.get(kind, 9) for kind in (*kinds, 0)]
    for item, start in zip(media.items, media.starts, strict=True):
        ids[start - 1] = config.audio_start_token_id if item.kind == "audio" else config.vision_start_token_id
    model: Any = SimpleNamespace(
        config=config,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        get_llm_pos_ids_for_vision=partial(Omni.get_llm_pos_ids_for_vision, None),
    )
    official = Omni.get_rope_index(
        model,
        torch.tensor([ids]),
        grids(media, "image"),
        grids(media, "video"),
        torch.ones(1, len(ids), dtype=torch.int64),
        audio_seqlens=torch.tensor([item.frames for item in media.items if item.kind == "audio"]),
        second_per_grids=seconds(media),
    )
    check(official, kinds, media)


def test_the_usual_steps_of_a_second_are_those_of_transformers():
    vision, thinker = Qwen2_5_VLConfig().vision_config, Qwen2_5OmniThinkerConfig()
    assert FAMILIES["qwen2_5_vl"].positions_of({}).steps_per_second == vision.tokens_per_second
    assert FAMILIES["qwen2_5_omni"].positions_of({}).steps_per_second == thinker.position_id_per_seconds
