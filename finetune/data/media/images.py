"""Read images with Pillow: sizes from the header, checked before pixels are decoded."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.media.signatures import describe
from finetune.system.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from PIL import Image

# Formats of photographs and screenshots. Others of Pillow run programs (EPS) or are rarely written.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# 89 million, as Pillow's own warning: 340 MB of pixels.
MOST_PIXELS = 2**30 // 12
# What Pillow raises for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    EOFError,
    RuntimeError,
    struct.error,
)
_ORIENTATION = 0x0112  # tag of EXIF


def read_image(file: io.FileIO) -> np.ndarray:
    """Return the first frame as [H, W, 3] uint8: turned as EXIF says, transparent over white.

    Raises: DataError, from the header where it is enough; MissingExtra.
    """
    return np.asarray(_decoded(file))


def resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return [height, width, 3] uint8, bicubic with antialiasing as Pillow resizes."""
    pillow = _pillow()
    return np.asarray(pillow.fromarray(frame).resize((width, height), pillow.Resampling.BICUBIC))


def thumbnail(frame: np.ndarray, side: int) -> bytes:
    """Return a JPEG file of [H, W, 3] uint8 with at most `side` pixels along each side."""
    image, stream = _pillow().fromarray(frame), io.BytesIO()
    image.thumbnail((side, side))
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def to_png(image: Image.Image) -> bytes:
    """Return an image of Pillow as a PNG file. Raises: DataError."""
    stream = io.BytesIO()
    try:
        image.save(stream, "PNG")
    except _DAMAGE as error:
        raise DataError(f"cannot be a PNG file ({error}); convert it to RGB") from error
    return stream.getvalue()


def _decoded(file: io.FileIO) -> Image.Image:
    with _opened(file) as image:
        image.load()
        if _orientation(image) != 1:
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
        return _rgb(image)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra('images need: pip install "finetune-qlora[vision]"') from error
    Image.init()  # otherwise `formats` knows only the most frequent ones
    return Image


@contextmanager
def _opened(file: io.FileIO) -> Iterator[Image.Image]:
    pillow = _pillow()
    content = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes that are checked here
            with pillow.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise DataError(f"has {width} x {height} pixels, the limit is {MOST_PIXELS:,}; save it smaller")
                if not width * height:
                    raise DataError(f"has {width} x {height} pixels; replace the file")
                yield image
    except DataError:
        raise
    except pillow.UnidentifiedImageError as error:
        found = describe(content[:4096])
        raise DataError(f"is {found}, broken or not supported as an image; save it as PNG or JPEG") from error
    except pillow.DecompressionBombError as error:
        raise DataError(f"has too many pixels, the limit is {MOST_PIXELS:,}; save it smaller ({error})") from error
    except MemoryError as error:
        raise DataError("needs more memory than there is; save it smaller") from error
    except _DAMAGE as error:
        raise DataError(f"is broken or cut off ({type(error).__name__}: {error}); replace the file") from error


def _orientation(image: Image.Image) -> int:
    """Return the orientation of EXIF, 1 where it is missing or damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return value if value in range(1, 9) else 1


def _rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image, transparent pixels over white. Source: `to_rgb` of Qwen's utilities."""
    from PIL import Image

    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"has values from {values.min()} to {values.max()}, expected 0 to 65535; save it in 8 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("has floating-point pixels of an unknown range; save it in 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, (255, 255, 255))
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image.convert("RGB")
