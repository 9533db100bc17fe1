"""Number types of GGUF files: what each is called, what it costs, and how numbers are rounded to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.system.errors import ConfigError, IntegrityError, MissingExtra

_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class NumberType:
    """block: numbers of a row that share a scale. worst: the largest rounding error, as a share of the block's largest
    number; 0 for types that round each number alone. small: under eight bits a number.
    """

    name: str  # in lower case, as llama.cpp's tools have it
    block: int = 1
    worst: float = 0.0
    small: bool = False
    file_type: str = ""  # in gguf.LlamaFileType, where not MOSTLY_<NAME>

    @property
    def ggml(self) -> Any:
        """The `gguf.GGMLQuantizationType`."""
        return gguf_package().GGMLQuantizationType[self.name.upper()]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; columns: a multiple of `block`."""
        block, size = gguf_package().GGML_QUANT_SIZES[self.ggml]
        return columns // block * size


# All that the gguf package can round to. The k- and i-types need llama.cpp's own llama-quantize.
TYPES = {
    kind.name: kind
    for kind in (
        NumberType("f32", file_type="ALL_F32"),
        NumberType("f16"),
        NumberType("bf16"),
        NumberType("q8_0", 32, 0.5 / 127),
        NumberType("q5_1", 32, 1 / 31, small=True),
        NumberType("q5_0", 32, 1 / 16, small=True),
        NumberType("q4_1", 32, 1 / 15, small=True),
        NumberType("q4_0", 32, 1 / 8, small=True),
        NumberType("mxfp4", 32, 1 / 4, small=True, file_type="MOSTLY_MXFP4_MOE"),
        NumberType("tq2_0", 256, 1 / 2, small=True),
        NumberType("tq1_0", 256, 1 / 2, small=True),
    )
}
DEFAULT = "q8_0"


def gguf_package() -> Any:
    """The gguf package. Raises: MissingExtra with the command that installs it."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingExtra('GGUF export needs: pip install "finetune-qlora[gguf]"') from error
    return gguf


def check_ready(kind: str) -> None:
    """Raises: MissingExtra without the package; ConfigError for a type that cannot be written."""
    number_type(kind)
    gguf_package()


def number_type(name: str, allowed: tuple[str, ...] = tuple(TYPES)) -> NumberType:
    """The type of that name. Raises: ConfigError with all that can be written."""
    if name not in allowed:
        raise ConfigError(
            f"type={name}: a GGUF is written here as {', '.join(allowed)}; for other types export f32, then "
            "llama.cpp's `llama-quantize model-f32.gguf model.gguf TYPE`"
        )
    return TYPES[name]


def fitting_type(wanted: NumberType, shape: tuple[int, ...], vocabulary: bool) -> NumberType:
    """The type in which a tensor of that shape is stored.

    Vectors stay f32: they are small, and readers want them so. The embedding and the head never get fewer than eight
    bits, like llama-quantize's 4-bit files: their errors reach every token. Rows that no whole blocks fill are f16.
    """
    if len(shape) < 2:
        return TYPES["f32"]
    kind = TYPES["q8_0"] if vocabulary and wanted.small else wanted
    return kind if shape[-1] % kind.block == 0 else TYPES["f16"]


def encode(rows: Tensor, kind: NumberType, name: str) -> np.ndarray:
    """Rounds once, from fp32, to the nearest.

    Shapes: rows [..., C], any float type; returns bytes [..., kind.row_bytes(C)]. name: of the tensor, for messages.
    Raises: IntegrityError for NaN and infinity; ConfigError for numbers that the type cannot hold.
    """
    values = rows.float()
    if not values.isfinite().all():
        raise IntegrityError(f"{name} holds NaN or infinity: the model is broken, and nothing is written")
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > _LARGEST_F16 and kind.name not in ("f32", "bf16"):
        raise ConfigError(
            f"type={kind.name}: {name} holds {largest:.6g}, and f16, in which this type keeps numbers or their scales, "
            f"ends at {_LARGEST_F16:.0f}; choose type=bf16 or type=f32"
        )
    if kind.name == "bf16":
        return values.bfloat16().view(torch.uint8).numpy()
    return gguf_package().quants.quantize(values.numpy(), kind.ggml).view(np.uint8)


def decode(data: np.ndarray, kind: NumberType) -> Tensor:
    """What a reader makes of the bytes: fp32. Shapes: as `encode`, the other way."""
    # A copy: a file that is mapped into memory cannot be written to, which torch does not like.
    return torch.from_numpy(np.array(gguf_package().quants.dequantize(np.ascontiguousarray(data), kind.ggml)))
