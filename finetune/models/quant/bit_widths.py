"""Storage type and bytes of each linear layer of a base, from config and layer names only."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.schema import QuantConfig
from finetune.models.module_matching import close_names, matches
from finetune.system.errors import ConfigError

# Weights per scale, and scales per second-level scale with double quantization.
_BLOCK, _OUTER_BLOCK = 64, 256
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SHOWN = 3


def storage_of(cfg: QuantConfig, linears: Sequence[str], head: str) -> dict[str, str]:
    """Return the storage of each linear layer as a value of `quant.type`; none is the model's own dtype.

    linears: full names of all linear layers. head: the output layer, which is never quantized.

    Raises:
        ConfigError: lists every entry of `quant.skip_modules` and `quant.int8` that matches no layer, and every layer
            that both name.
    """
    kept = {pattern: [name for name in linears if matches(pattern, name)] for pattern in cfg.skip_modules}
    # A glob over all layers excludes the head, which is never in 8 bit.
    eight = {pattern: [n for n in linears if n != head and matches(pattern, n)] for pattern in cfg.int8}
    blocks = [name for name in linears if name != head]
    problems = [
        f"quant.skip_modules: {lost!r} matches no linear layer; {close_names(lost, linears)}"
        for lost, names in kept.items()
        if not names
    ]
    for lost in (pattern for pattern, names in eight.items() if not names):
        only_head = f"matches {head}, which is always in 16 bit; drop it" if matches(lost, head) else None
        problems.append(f"quant.int8: {lost!r} {only_head or f'matches no linear layer; {close_names(lost, blocks)}'}")
    stored = dict.fromkeys(linears, str(cfg.type)) | {head: "none"}
    stored |= dict.fromkeys((name for names in eight.values() for name in names), "int8")
    twice = [name for names in kept.values() for name in names if name != head and name in set().union(*eight.values())]
    if twice := list(dict.fromkeys(twice)):
        listed = f"{', '.join(twice[:_SHOWN])}{f' and {len(twice) - _SHOWN} more' if len(twice) > _SHOWN else ''}"
        problems.append(f"quant.skip_modules and quant.int8: both match {listed}; list each layer in one of them")
    if problems:
        raise ConfigError("\n".join(problems))
    return stored | dict.fromkeys((name for names in kept.values() for name in names), "none")


def stored_bytes(kind: str, shape: tuple[int, int], double: bool, dtype: str) -> int:
    """Return the bytes of a weight [out, in] and its scales.

    Lookup tables shared by all 4-bit weights, 1 kB each, do not count.
    kind: from `storage_of`. double: whether scales are quantized too. dtype: of the model.
    Source: Dettmers et al. 2023, arXiv:2305.14314 (4 bit); 2022, arXiv:2208.07339 (8 bit, one scale per row).
    """
    weights = shape[0] * shape[1]
    if kind == "none":
        return weights * DTYPE_BYTES[dtype]
    if kind == "int8":
        return weights + 4 * shape[0]
    blocks = -(-weights // _BLOCK)
    return -(-weights // 2) + (blocks + 4 * -(-blocks // _OUTER_BLOCK) if double else 4 * blocks)
