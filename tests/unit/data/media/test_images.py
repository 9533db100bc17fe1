"""Images: the patches and tokens of the official processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from finetune.data.media.patches import PatchSettings
from finetune.system.errors import DataError
from tests.unit.data.media.samples import image_file, picture, processor

SIZES = [(1, 1), (28, 28), (56, 84), (300, 200), (37, 911), (1200, 1600)]


@pytest.mark.parametrize("size", SIZES)
def test_patches_and_grid_equal_the_official_processor_bit_for_bit(size: tuple[int, int]):
    image = picture(*size)
    official = Qwen2VLImageProcessorPil()(image, return_tensors="np")
    ours = processor()
    media = ours.measure("image", image_file(image))
    assert media.grid == tuple(official["image_grid_thw"][0].tolist())
    assert media.tokens == official["image_grid_thw"].prod() // 4
    assert np.array_equal(ours.pixels(media), official["pixel_values"])


def test_patches_equal_the_official_processor_with_other_sizes_and_limits():
    options = {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 1}
    limits = {"min_pixels": 100, "max_pixels": 24 * 24 * 5}
    image = picture(91, 130)
    official = Qwen2VLImageProcessorPil(**options, **limits)(image, return_tensors="np")
    ours = PatchSettings(**limits, **options)
    frame = np.asarray(image.resize(ours.resized(91, 130)[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(ours.patches(frame[None]), official["pixel_values"])


@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    patch=st.integers(1, 20),
    limits=st.tuples(st.integers(1, 10**6), st.integers(1, 10**7)).map(sorted),
)
@settings(max_examples=300, deadline=None)
def test_sizes_equal_the_official_ones_and_so_does_what_is_refused(height, width, patch, limits):
    ours = PatchSettings(*limits, patch_size=patch)
    try:
        expected = smart_resize(height, width, patch * 2, *limits)
    except ValueError:
        with pytest.raises(DataError, match="200 times"):
            ours.resized(height, width)
        return
    assert ours.resized(height, width) == expected
    grid = ours.grid(1, height, width)
    assert ours.tokens(grid) * (patch * 2) ** 2 == expected[0] * expected[1]


def read(content: bytes) -> np.ndarray:
    """The pixels as a tower reads them, [28, 28, 3] in bytes."""
    ours = processor(image={"min_pixels": 1})
    patches = ours.pixels(ours.measure("image", content)).reshape(2, 2, 3, 2, 14, 14)[:, :, :, 0]
    mean, std = (np.array(each)[:, None, None] for each in (ours.image.image_mean, ours.image.image_std))
    return np.rint((patches * std + mean) * 255).transpose(0, 3, 1, 4, 2).reshape(28, 28, 3).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_exif_says(orientation: int):
    image = picture(28, 28)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = image_file(image, exif=exif)
    assert np.array_equal(read(content), ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


def test_a_photo_held_upright_has_the_grid_of_its_turned_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert processor().measure("image", image_file(picture(56, 112), "JPEG", exif=exif)).grid == (1, 8, 4)


def test_transparent_pixels_are_white_and_half_transparent_ones_are_mixed_with_white():
    image = Image.new("RGBA", (28, 28), (10, 20, 30, 0))
    image.paste((100, 0, 0, 128), (0, 0, 14, 28))
    seen = read(image_file(image))
    assert (seen[:, 14:] == 255).all()
    assert abs(seen[0, 0] - [177, 127, 127]).max() <= 1


@pytest.mark.parametrize("mode", ["P", "LA", "L"])
def test_transparency_of_palettes_and_gray_is_white(mode: str):
    image = picture(28, 28).convert(mode)
    image.info["transparency"] = 0
    content = image_file(image, **({} if mode == "LA" else {"transparency": 0}))
    whole = Image.open(io.BytesIO(content)).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    assert np.abs(read(content) - np.asarray(expected).astype(int)).max() <= 1


def test_sixteen_bits_are_scaled_to_eight_and_not_cut():
    values = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    seen = read(image_file(Image.fromarray(values)))
    assert np.abs(seen[..., 0] - values / 65535 * 255).max() <= 0.51


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("1", "PNG"), ("RGB", "AVIF"), ("RGB", "JPEG2000")])
def test_other_modes_and_formats_are_read_as_pillow_reads_them(mode: str, kind: str):
    content = image_file(picture(28, 28).convert(mode), kind)
    assert np.array_equal(read(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(kind: str):
    red, blue = (Image.new("RGB", (28, 28), color) for color in ("red", "blue"))
    content = image_file(
        red, kind, save_all=True, append_images=[blue], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert (read(content) == [255, 0, 0]).all()
