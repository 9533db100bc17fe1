"""Number types of GGUF files: their names, sizes and rounding."""

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
    """A number type of GGUF."""

    name: str  # in lower case, as llama.cpp's tools spell it
    block: int = 1  # values of a row that share a scale
    worst: float = 0.0  # largest rounding error, as a share of the block's largest value; 0 for types without blocks
    small: bool = False  # below 8 bits per weight
    row_error: float | None = None  # root mean square error of a row that llama.cpp rounds, as a share of the row's

    @property
    def ggml(self) -> Any:
        """The `gguf.GGMLQuantizationType`."""
        return gguf_package().GGMLQuantizationType[self.name.upper()]

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row; columns is a multiple of `block`."""
        block, size = gguf_package().GGML_QUANT_SIZES[self.ggml]
        return columns // block * size


# The gguf package rounds to these.
TYPES = {
    kind.name: kind
    for kind in (
        NumberType("f32"),
        NumberType("f16"),
        NumberType("bf16"),
        NumberType("q8_0", 32, 0.5 / 127),
        NumberType("q5_1", 32, 1 / 31, small=True),
        NumberType("q5_0", 32, 1 / 16, small=True),
        NumberType("q4_1", 32, 1 / 15, small=True),
        NumberType("q4_0", 32, 1 / 8, small=True),
    )
}
# llama.cpp rounds to these; an importance matrix moves the errors within a row. The limits are about four times the
# error of normally distributed values, at most 0.8. Two different tensors of one size differ by 1.4.
# q4_0 without a matrix keeps 0.33 for every row. A block's step is an eighth of its largest value, which is exact. Each
# of the 31 others has at most half a step of error, and no more than itself: sqrt(31 / 4 / (64 + 31 / 4)) = 0.3287.
# Values at the other end lose up to a step, an eighth of themselves. Rounding the step to f16 adds 2**-11.
ROUNDED_BY_LLAMA = {
    kind.name: kind
    for kind in (
        NumberType("f32"),
        NumberType("f16"),
        NumberType("q8_0", 32, row_error=0.02),
        NumberType("q6_k", 256, row_error=0.08),
        NumberType("q5_k", 256, row_error=0.15),
        NumberType("q5_1", 32, row_error=0.15),
        NumberType("q5_0", 32, row_error=0.15),
        NumberType("q4_k", 256, row_error=0.3),
        NumberType("q4_0", 32, row_error=0.33),
        NumberType("iq4_nl", 32, row_error=0.3),
        NumberType("iq4_xs", 256, row_error=0.3),
        NumberType("q3_k", 256, row_error=0.6),
        NumberType("iq3_s", 256, row_error=0.6),
        NumberType("iq3_xxs", 256, row_error=0.6),
        NumberType("q2_k", 256, row_error=0.8),
        NumberType("iq2_s", 256, row_error=0.8),
        NumberType("iq2_xs", 256, row_error=0.8),
        NumberType("iq2_xxs", 256, row_error=0.8),
    )
}


def gguf_package() -> Any:
    """Import the gguf package, or raise MissingExtra with the command that installs it."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingExtra('GGUF export needs: pip install "finetune-qlora[export]"') from error
    return gguf


def storage_type(wanted: NumberType, shape: tuple[int, ...], vocabulary: bool) -> NumberType:
    """Return the type in which a tensor of that shape is stored.

    Vectors stay f32, as readers expect. The embedding and the head keep at least 8 bits, as with llama-quantize, since
    their errors affect every token. Rows whose length is no multiple of the block are f16.
    """
    if len(shape) < 2:
        return TYPES["f32"]
    kind = TYPES["q8_0"] if vocabulary and wanted.small else wanted
    return kind if shape[-1] % kind.block == 0 else TYPES["f16"]


def encode(rows: Tensor, kind: NumberType, name: str) -> np.ndarray:
    """Round rows [..., C] to the nearest values of a type, once, from fp32; return bytes [..., kind.row_bytes(C)].

    Raises:
        IntegrityError: a value is NaN or infinite.
        ConfigError: a value exceeds the range of the type.
    """
    values = rows.float()
    if not values.isfinite().all():
        raise IntegrityError(f"{name}: holds NaN or infinity, so the model is corrupt; nothing was written")
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > _LARGEST_F16 and kind.name not in ("f32", "bf16"):
        raise ConfigError(
            f"type={kind.name}: values or scales are f16 up to {_LARGEST_F16:.0f}, found {largest:.6g} in {name}\n"
            "help: use type=bf16 or type=f32"
        )
    if kind.name == "bf16":
        return values.bfloat16().view(torch.uint8).numpy()
    return gguf_package().quants.quantize(values.numpy(), kind.ggml).view(np.uint8)


def decode(data: np.ndarray, kind: NumberType) -> Tensor:
    """Return the fp32 values that a reader computes from the bytes of `encode`."""
    # The copy is writable, as torch wants it; a mapped file is not.
    return torch.from_numpy(np.array(gguf_package().quants.dequantize(np.ascontiguousarray(data), kind.ggml)))
