"""Images: the same patches and tokens as the official processor's, from the header alone."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finetune.config.schema import DataConfig
from finetune.data.media.media import Media
from finetune.data.media.processor import MediaProcessor, build_media_processor
from finetune.models.families import FAMILIES


def processor(**image: int) -> MediaProcessor:
    return build_media_processor(FAMILIES["qwen2_5_vl"], None, DataConfig.model_validate({"image": image}))


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (56, 84), (300, 200), (37, 911), (1200, 1600)])
def test_patches_and_grid_equal_the_official_processor_bit_for_bit(size: tuple[int, int]):
    image = picture(*size)
    official = Qwen2VLImageProcessorPil()(image, return_tensors="np")
    ours = processor()
    media = ours.measure("image", png(image))
    assert media.grid == tuple(official["image_grid_thw"][0].tolist())
    assert media.tokens == np.prod(media.grid) // 4
    assert np.array_equal(ours.pixels(media), official["pixel_values"])


def test_a_record_survives_json_and_the_processor_survives_pickle():
    media = processor().measure("image", png(picture(40, 60)))
    assert Media.from_dict(media.as_dict()) == media
    assert copy.copy(processor()) == processor()  # by the same protocol
