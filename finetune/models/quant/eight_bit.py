"""8-bit layers beside 4-bit ones: those of bitsandbytes, with the bits and outlier threshold of quant.type=int8.

In eval mode a matmul is LLM.int8: inputs are rounded to 8 bits too, except columns with an outlier. In training on a
CPU the weight is dequantized and multiplied in the dtype of the inputs.
Source: Dettmers et al. 2022, arXiv:2208.07339.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

# Weights quantized at once on a CPU, in whole rows, with copies in fp16 and fp32.
_CHUNK = 1 << 16


def replace_eight_bit_linears(base: nn.Module, names: Iterable[str]) -> None:
    """Replace linear layers by 8-bit layers of bitsandbytes, whose weights follow later."""
    import bitsandbytes as bnb

    threshold = BitsAndBytesConfig().llm_int8_threshold  # of quant.type=int8
    for name in names:
        old: Any = base.get_submodule(name)
        with torch.device("meta"):
            new: Any = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False, threshold=threshold
            )
        new.bias, new.source_cls = old.bias, type(old)
        new.requires_grad_(False)
        base.set_submodule(name, new.train(old.training))
        # PEFT checks this before it adapts an 8-bit layer.
        vars(base)["is_loaded_in_8bit"] = True


def quantize_rows(weight: Tensor, each: Callable[..., Iterable[Any]] = map) -> tuple[Tensor, Tensor]:
    """Quantize a matrix [out, in] to int8 [out, in]; also return the absolute maximum of each row, fp32 [out].

    each: applies a function to pieces, like `map`; rows are independent.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    if weight.device.type != "cpu":
        codes, largest, _ = int8_vectorwise_quant(weight.contiguous().half())
        return codes, largest
    pieces = weight.split(max(1, _CHUNK // weight.shape[1]))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    largest = torch.empty(weight.shape[0], dtype=torch.float32)

    def fill(number: int) -> None:
        some, theirs, _ = int8_vectorwise_quant(pieces[number].half())
        start = number * len(pieces[0])
        codes[start : start + len(some)] = some
        largest[start : start + len(some)] = theirs

    for _ in each(fill, range(len(pieces))):
        pass
    return codes, largest


def put_rows(module: Any, codes: Tensor, largest: Tensor) -> None:
    """Set the weight of an 8-bit layer from the result of `quantize_rows`."""
    import bitsandbytes as bnb

    parts: dict[str, Any] = {"has_fp16_weights": False, "CB": codes, "SCB": largest}
    module.weight = bnb.nn.Int8Params(codes, requires_grad=False, **parts)


def rows_of(module: Any) -> tuple[Tensor, Tensor]:
    """Return what `put_rows` set, before or after the first forward pass."""
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data, scales


def dequantize_rows(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] that a training step on a CPU multiplies with, with the same rounding."""
    return codes.to(dtype).mul_(largest[:, None] * (1.0 / 127.0))


def quantize_loaded(base: nn.Module, names: Iterable[str]) -> None:
    """Convert plain linear layers with weights to 8-bit layers."""
    for name in names:
        weight: Any = base.get_submodule(name).weight
        replace_eight_bit_linears(base, [name])
        put_rows(base.get_submodule(name), *quantize_rows(weight.data))
