"""The merged weights: each tensor of the base with what the adapters do to it, read, changed and written in blocks.

Sums are made in fp32 and rounded once. Nothing but the adapters and a block is in memory, and of a 4-bit base its
quantized form of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.config.command_options import MergeOptions
from finetune.export.merge.adapters import EMBEDDING, HEAD, read_deltas, untie
from finetune.export.merge.deltas import Delta, combine_deltas
from finetune.export.shards import Content, Planned
from finetune.models.adapters.trained import Log, Trained
from finetune.models.hub import read_config
from finetune.models.load import default_device, quantization_of, quiet
from finetune.models.quant.four_bit_weights import QuantizedWeights, Rows
from finetune.models.safetensors_index import Stored, read_rows
from finetune.system.errors import ConfigError

# Numbers in a block: 16 MB in fp32, of which there are three at most.
_BLOCK = 1 << 22
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class MergePlan:
    """What is written, and from what.

    tensors: in the order of the base's files. stored: where the base holds each of them. changes: what becomes of some.
    quantized: the weights to be taken as training on a 4-bit base saw them; None for the original base. unties: the
    head becomes a tensor of its own.
    """

    tensors: list[Planned]
    stored: dict[str, Stored]
    deltas: dict[str, Delta]
    quantized: QuantizedWeights | None
    unties: bool

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def changed(self) -> int:
        """Tensors that differ from the base's."""
        return len(self.deltas.keys() | (self.quantized.names if self.quantized is not None else set()))

    def is_quantized(self, name: str) -> bool:
        return self.quantized is not None and name in self.quantized

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that is written."""
        return next(tensor.shape[0] for tensor in self.tensors if tensor.name == EMBEDDING)


def plan_merge(trained: Trained, base: str, options: MergeOptions, log: Log) -> MergePlan:
    """Resolve the adapters against the base's files, before anything is written.

    base: original or dequantized.
    Raises: ConfigError for adapters that do not fit, weights and densities that do not go together.
    """
    stored = dict(trained.weights.tensors)
    tied = bool(read_config(trained.folder, trained.model.name).get("tie_word_embeddings")) and HEAD not in stored
    seen = {**stored, HEAD: stored[EMBEDDING]} if tied else stored
    weights = _weights(trained, options)
    parts = [read_deltas(adapter, seen) for adapter in trained.adapters]
    deltas = combine_deltas(parts, weights, options.combination, options.density or 1.0, options.seed)
    unties = untie(deltas, tied)
    if unties:
        stored[HEAD] = stored[EMBEDDING]
    return MergePlan(
        _planned(stored, deltas, options.dtype),
        stored,
        deltas,
        _quantized(trained, log) if base == "dequantized" else None,
        unties,
    )


def _quantized(trained: Trained, log: Log) -> QuantizedWeights:
    settings = quantization_of(trained.folder, trained.model, trained.quant)
    assert settings is not None, "choose_base refuses a base that was not in 4 bit"
    with quiet():
        return QuantizedWeights(
            trained.folder, trained.files, trained.model, trained.quant, settings, default_device(), log
        )


def _weights(trained: Trained, options: MergeOptions) -> Sequence[float]:
    count = len(trained.adapters)
    given = options.weights or [1.0] * count
    problems = []
    if len(given) != count:
        problems.append(f"weights: {len(given)} given for {count} adapter(s); give one for each")
    if options.combination != "linear" and options.density is None:
        problems.append(f"combination={options.combination} needs density=, the share of each update that is kept")
    if options.combination == "linear" and options.density is not None:
        problems.append("density is for ties and dare; linear keeps all of each update")
    if problems:
        raise ConfigError("\n".join(problems))
    return given


def _planned(stored: dict[str, Stored], deltas: dict[str, Delta], dtype: str) -> list[Planned]:
    tensors = []
    for name, place in stored.items():
        delta = deltas.get(name)
        rows = place.shape[0] if delta is None or delta.rows is None else max(delta.rows, place.shape[0])
        tensors.append(Planned(name, _DTYPES.get(dtype, place.dtype), (rows, *place.shape[1:])))
    # A head and the embedding that it was tied to have as many rows.
    rows_of_table = {tensor.name: tensor.shape[0] for tensor in tensors if tensor.name in (EMBEDDING, HEAD)}
    most = max(rows_of_table.values())
    return [Planned(t.name, t.dtype, (most, *t.shape[1:])) if t.name in rows_of_table else t for t in tensors]


@torch.no_grad()
def content_of(plan: MergePlan, tensor: Planned) -> Content:
    """What a tensor of the merged model is made of: the base's own bytes where nothing changes.

    Raises, while it is read: ConfigError where a value is beyond what the type holds; IntegrityError for torn files.
    """
    stored, delta = plan.stored[tensor.name], plan.deltas.get(tensor.name)
    same = delta is None and not plan.is_quantized(tensor.name) and tensor.shape == stored.shape
    if same and tensor.dtype == stored.dtype:
        return stored
    return _blocks(plan, tensor, stored, delta)


def _blocks(plan: MergePlan, tensor: Planned, stored: Stored, delta: Delta | None) -> Iterator[Tensor]:
    source = _as_stored(stored)
    if plan.quantized is not None and tensor.name in plan.quantized:
        source = plan.quantized.dequantized(tensor.name, lambda: read_rows(stored, 0, stored.shape[0]))
    step = tensor.shape[0] if delta is not None and delta.whole else _rows_at_once(plan, tensor)
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        with torch.no_grad():
            block = _rows(source, stored.shape, start, stop)
            if delta is not None:
                block = delta.apply(block, start)
            rounded = block.to(tensor.dtype)
        if tensor.dtype == torch.float16 and rounded.isinf().any():
            raise ConfigError(f"{tensor.name} has values that fp16 cannot hold; write dtype=bf16 or fp32")
        yield rounded


def _rows_at_once(plan: MergePlan, tensor: Planned) -> int:
    width = math.prod(tensor.shape[1:])
    step = max(_BLOCK // width, 1)
    if plan.quantized is None or tensor.name not in plan.quantized:
        return step
    # Blocks of rows must end where a block of the quantization ends.
    unit = plan.quantized.row_unit(tensor.name, width)
    return -(-step // unit) * unit


def _as_stored(stored: Stored) -> Rows:
    return lambda start, stop: read_rows(stored, start, stop).float()


def _rows(source: Rows, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Those of the base; beyond its end, where new tokens are, zeros."""
    there = source(min(start, shape[0]), min(stop, shape[0]))
    if stop <= shape[0]:
        return there
    return torch.cat([there, torch.zeros(stop - max(start, shape[0]), *shape[1:])])
