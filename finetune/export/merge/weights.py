"""Read the base's tensors, apply the deltas and yield the merged weights, one block of rows at a time.

Sums are computed in fp32 and rounded once. Only the adapters and a block are in memory; for dequantized weights, the
quantized form of one matrix too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.config.command_options import MergeOptions
from finetune.export.merge.deltas import Delta, combine_deltas, read_deltas, untie
from finetune.export.shards import Content, Planned
from finetune.models.adapters.trained import Trained
from finetune.models.families import FAMILIES, ModelFamily, family_of, shape_of, text_settings
from finetune.models.hub import named_in_model, read_config
from finetune.models.quant.four_bit_weights import QuantizedWeights
from finetune.models.safetensors_index import Stored, read_rows
from finetune.models.tokenizer import quiet
from finetune.system.accelerator import default_device
from finetune.system.console import Log
from finetune.system.errors import ConfigError

# Values in a block: 16 MB in fp32; at most three blocks are in memory.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class MergePlan:
    """The tensors to write, and their sources."""

    tensors: list[Planned]  # in the order of the base's files
    stored: dict[str, Stored]  # the base's tensors
    in_model: dict[str, str]  # names in the model by those in the files; parts that were not loaded have none
    deltas: dict[str, Delta]  # by names in the files
    quantized: QuantizedWeights | None  # the weights as 4-bit training saw them; None takes the original ones
    unties: bool  # the head becomes a tensor of its own
    vocabulary: int  # rows of the written embedding

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most bytes of the loaded model."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.nbytes * (tensor.name in self.in_model)
        return sizes.most_common(1)[0][0]

    @property
    def changed(self) -> int:
        """Number of tensors that differ from the base's."""
        dequantized = {name for name in self.stored if self.is_dequantized(name)}
        return len(self.deltas.keys() | dequantized)

    def is_dequantized(self, name: str) -> bool:
        """Return whether a tensor of the files is written as 4-bit training saw it."""
        return self.quantized is not None and self.in_model.get(name) in self.quantized.names


def plan_merge(trained: Trained, base: str, options: MergeOptions, log: Log) -> MergePlan:
    """Match the adapters with the base's files, before anything is written; base: `original` or `dequantized`.

    Raises:
        ConfigError: an adapter does not fit the base, or the options contradict each other.
    """
    weights = options.weights or [1.0] * len(trained.adapters)
    problems = []
    if len(weights) != len(trained.adapters):
        problems.append(f"weights: expected one for each of {len(trained.adapters)} adapters, found {len(weights)}")
    if options.combination != "linear" and options.density is None:
        problems.append(f"density: combination={options.combination} needs the share to keep, as density=0.5")
    if options.combination == "linear" and options.density is not None:
        problems.append("density: only ties and dare use it, found combination=linear; remove it")
    config = read_config(trained.folder, trained.model.name)
    family, stored = family_of(config["model_type"], trained.model.name), dict(trained.weights.tensors)
    problems += _other_families(trained, family)
    if problems:
        raise ConfigError("\n".join(problems))
    places = named_in_model(trained.files, family)
    in_files = {name: place.name for name, place in places.items()}
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    tied = bool(text_settings(config).get("tie_word_embeddings")) and head not in in_files
    named = {name: stored[theirs] for name, theirs in in_files.items()}
    parts = [read_deltas(adapter, {**named, head: named[embedding]} if tied else named) for adapter in trained.adapters]
    changes = combine_deltas(parts, weights, options)
    unties = tied and untie(changes, head, embedding)
    if unties:
        in_files[head] = head
        stored[head] = named[embedding]
    deltas = {in_files[name]: delta for name, delta in changes.items()}
    quantized = None
    if base == "dequantized":
        model, quant, device = trained.model, trained.quant, default_device()
        with quiet():
            loaded = {name: place.file for name, place in places.items()}
            quantized = QuantizedWeights(trained.folder, loaded, model=model, quant=quant, device=device, log=log)
    rows = {name: source.shape[0] for name, source in stored.items() if source.shape}
    for name in deltas.keys() & rows.keys():
        rows[name] = max(rows[name], deltas[name].rows or 0)
    # The head and the embedding keep the same number of rows.
    tables = {in_files[name] for name in (embedding, head) if name in in_files}
    rows |= dict.fromkeys(tables, max(rows[name] for name in tables))
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    in_model = {theirs: name for name, theirs in in_files.items()}
    # Parts that training did not load, like the talker of Qwen2.5-Omni, keep their bytes.
    tensors = [
        Planned(
            name,
            dtype if dtype and name in in_model else source.dtype,
            (rows[name], *source.shape[1:]) if source.shape else (),
        )
        for name, source in stored.items()
    ]
    return MergePlan(tensors, stored, in_model, deltas, quantized, unties, rows[in_files[embedding]])


def _other_families(trained: Trained, family: ModelFamily) -> Iterator[str]:
    """Yield the adapters on a base of another class: its layers may have the same names and shapes."""
    for adapter in trained.adapters:
        shape = shape_of(str(adapter.config.get("base_model_name_or_path") or ""))
        if shape is not None and (own := FAMILIES[shape["model_type"]]).model != family.model:
            yield f"adapter={adapter.name}: was trained on {own.title}, found {family.title} in {trained.model.name}"


def content_of(plan: MergePlan, tensor: Planned) -> Content:
    """Return the content of a merged tensor: the base's bytes if nothing changes, else blocks of its rows.

    Raises:
        ConfigError: while it is read, if a value exceeds fp16.
        IntegrityError: while it is read, if the base's file is corrupt.
    """
    stored, delta = plan.stored[tensor.name], plan.deltas.get(tensor.name)
    quantized = plan.quantized if plan.is_dequantized(tensor.name) else None
    if delta is None and quantized is None and (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype):
        return stored
    return _blocks(tensor, stored, plan.in_model.get(tensor.name, ""), quantized, delta)


def _blocks(
    tensor: Planned, stored: Stored, name: str, quantized: QuantizedWeights | None, delta: Delta | None
) -> Iterator[Tensor]:
    """Yield blocks of rows of a merged tensor; name: in the model."""
    height, width = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(_BLOCK // width, 1)
    dequantized = None
    if quantized is not None:
        dequantized = quantized.dequantized(name, lambda: read_rows(stored, 0, stored.shape[0]))
        # A block of rows must end where a block of the quantization ends.
        unit = quantized.row_unit(name, width)
        step = -(-step // unit) * unit
    if delta is not None and delta.whole:
        step = height
    for start in range(0, height, step):
        stop = min(start + step, height)
        with torch.no_grad():
            there = (min(start, stored.shape[0]), min(stop, stored.shape[0]))
            block = read_rows(stored, *there).float() if dequantized is None else dequantized(*there)
            if stop > stored.shape[0]:  # Rows of new tokens start from zero.
                new = stop - max(start, stored.shape[0])
                block = torch.cat([block, torch.zeros(new, *stored.shape[1:])])
            if delta is not None:
                block = delta.apply(block, start)
            rounded = block.to(tensor.dtype)
        if tensor.dtype == torch.float16 and rounded.isinf().any():
            raise ConfigError(f"dtype=fp16: {tensor.name} exceeds its range\nhelp: use dtype=bf16 or fp32")
        yield rounded
