"""A teacher of any size in the memory of two layers, the head, and the hidden states of the requested tokens.

All batches of a pass go through one layer before the next, which is read meanwhile. One pass reads the model once, so
more tokens per pass mean less reading per token. The break-even is the machine's operations/s over its bytes/s, for
any model size.
Source: Sheng et al. 2023, arXiv:2303.06865 (one read of a layer for many batches).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig
from finetune.data.batch import Batch
from finetune.distill.layer_reader import LayerPair, Reads
from finetune.distill.meta_adapter import attach_adapter
from finetune.losses.cross_entropy import target_rows
from finetune.losses.hidden_states import DecoderRows, decoder_rows, token_states
from finetune.models.fused import fuse_layers
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config, weight_files
from finetune.models.load import quiet
from finetune.models.quant.four_bit import build_skeleton, holds_all
from finetune.models.safetensors_index import WeightFiles, map_tensor
from finetune.ops import attention
from finetune.system.errors import ConfigError, IntegrityError
from finetune.system.machine import malloc_trim

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class PassFigures:
    """Times of one pass. read_seconds, compute_seconds: with a read in progress, with the device busy; they overlap."""

    read_seconds: float = 0.0
    compute_seconds: float = 0.0
    wall_seconds: float = 0.0
    read_bytes: int = 0

    @property
    def achieved_share(self) -> float:
        """Return the share of the speed that the slower of both would reach alone; 1 before the first pass."""
        return max(self.read_seconds, self.compute_seconds) / self.wall_seconds if self.wall_seconds else 1.0


class StreamedModel:
    """A frozen model in evaluation mode that reads its decoder layers from files in each pass."""

    def __init__(
        self, cfg: ModelConfig, device: torch.device, adapter: Path | None = None, head: nn.Module | None = None
    ):
        """Open a model.

        Args:
            adapter: a PEFT folder; its tensors stay in memory.
            head: the model's head, if it is in memory already.

        Raises:
            ConfigError: not found, not supported, or an adapter on more than decoder layers.
            IntegrityError: corrupt files, or tensors of another model.
        """
        if cfg.attention not in ("auto", attention.SEGMENTED):
            raise ConfigError(
                f"model.attention: a streamed teacher has segmented attention only, found {cfg.attention}\n"
                "help: set auto, or distill.teacher.placement=resident"
            )
        self.device, self.dtype = device, getattr(torch, cfg.dtype)
        self.last_pass = PassFigures()
        self._files, self._base = _open(cfg, self.dtype)
        self._head = head
        self._head_name = _EMBEDDING if self._base.config.tie_word_embeddings else _HEAD
        on_cpu, in_its_type = device.type == "cpu", self._files.tensors[self._head_name].dtype == self.dtype
        self._maps_head = head is None and on_cpu and in_its_type
        backbone: Any = self._base.base_model
        # By module, because an adapter renames modules.
        self._slots = [_slots_of(layer) for layer in backbone.layers]
        if adapter is not None:
            attach_adapter(self._base, adapter, device)
        fuse_layers(self._base)
        self._base.eval().requires_grad_(False)
        self._layers, self._norm = list(backbone.layers), backbone.norm
        self._rotary = type(backbone.rotary_emb)(self._base.config).to(device)
        _put(self._norm, "weight", self._weight(_NORM))

    @cached_property
    def head(self) -> nn.Module:
        """Load the output head onto the device at its first use."""
        if self._head is not None:
            return self._head
        head: Any = self._base.get_output_embeddings()
        _put(head, "weight", self._weight(self._head_name))
        return head

    def _unload_head(self) -> None:
        """Map a mapped head again, which frees its pages for the layers."""
        if "head" in vars(self) and self._maps_head:
            _put(self.head, "weight", self._weight(self._head_name))

    @cached_property
    def _pair(self) -> LayerPair:
        shapes = {name: getattr(module, key).shape for name, (module, key) in self._slots[0].items()}
        return LayerPair(shapes, self.dtype, self.device)

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Return the final normed hidden states [N, D] of each batch's targets, as a resident model does."""
        began, watch = time.perf_counter(), _Stopwatch(self.device)
        self._files.check_unchanged()
        self._unload_head()
        batches = [batch.to(self.device) for batch in batches]
        with Reads() as reads:
            self._begin(0, reads)
            rows = self._enter(batches, reads)
            self._begin(1, reads)
            for i, layer in enumerate(self._layers):
                with self._filled(i), watch:
                    for batch_rows in rows:
                        self._advance(layer, batch_rows)
                self._begin(i + 2, reads)
        with watch:
            hidden = [self._leave(rows.pop(0), batch) for batch in batches]
        self._files.check_unchanged()
        malloc_trim()  # free the layers' temporaries before the head is used
        compute_seconds = watch.seconds()
        self.last_pass = PassFigures(reads.seconds(), compute_seconds, time.perf_counter() - began, reads.bytes)
        return hidden

    def _begin(self, index: int, reads: Reads) -> None:
        """Begin to read a layer, if it exists."""
        if index < len(self._layers):
            stored = {name: self._files.tensors[f"model.layers.{index}.{name}"] for name in self._slots[index]}
            self._pair.begin(index, stored, reads)

    @contextmanager
    def _filled(self, index: int) -> Iterator[None]:
        """Give a layer its weights inside the block, and take them away afterwards."""
        slots, empty = self._slots[index], {}
        try:
            for name, tensor in self._pair.take(index).items():
                module, key = slots[name]
                empty[name] = getattr(module, key)
                _put(module, key, tensor)
            yield
        finally:
            for name, placeholder in empty.items():
                module, key = slots[name]
                setattr(module, key, placeholder)
            self._pair.release(index)

    def _enter(self, batches: Sequence[Batch], reads: Reads) -> list[DecoderRows]:
        """Return the rows of each batch, with embeddings as hidden states."""
        chosen = [attention.first_places(batch.row_of_token, batch.rows).to(self.device) for batch in batches]
        ids = [batch.input_ids[:, tokens] for batch, tokens in zip(batches, chosen, strict=True)]
        # Read rows of the file: the head of a tied model would bring more pages into memory.
        used = torch.unique(torch.cat(ids, dim=1))
        table = reads.rows(self._files.tensors[_EMBEDDING], used.cpu(), self.dtype).to(self.device)
        embeddings = (F.embedding(torch.searchsorted(used, ids_1U), table) for ids_1U in ids)
        return [decoder_rows(*each) for each in zip(embeddings, batches, chosen, strict=True)]

    def _advance(self, layer: nn.Module, rows: DecoderRows) -> None:
        """Apply the layer to a batch's hidden states, in place."""
        angles = self._rotary(rows.states, rows.position_ids)  # cheaper to compute than to keep
        after = layer(
            rows.states,
            attention_mask=None,
            position_ids=rows.position_ids,
            position_embeddings=angles,
            segments=rows.segments,
        )
        rows.states.copy_(after)

    def _leave(self, rows: DecoderRows, batch: Batch) -> Tensor:
        hidden_ND, _, _ = target_rows(token_states(self._norm(rows.states)[0], batch), batch)
        return hidden_ND

    def _weight(self, name: str) -> Tensor:
        """Return one tensor on the device, mapped on a CPU if the file has the model's dtype."""
        return map_tensor(self._files.tensors[name]).to(self.device, self.dtype)


class _Stopwatch:
    """Measure how long a device is busy with the calls inside `with`. Only `seconds` waits for a GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *failure: object) -> None:
        self._spans.append((self._began, self._now()))

    def seconds(self) -> float:
        if self._device.type != "cuda":
            return sum(end - start for start, end in self._spans)
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1000


def _open(cfg: ModelConfig, dtype: torch.dtype) -> tuple[WeightFiles, PreTrainedModel]:
    """Open the model's files, and build the model without storage."""
    source = fetch(cfg.name, cfg.revision, TEXT_FILES + WEIGHT_FILES, "distill.teacher.name")
    read_config(source.folder, cfg.name)
    files = weight_files(source.folder, cfg.name)
    attention.register()
    with quiet():
        base = build_skeleton(source.folder, dtype, attention.SEGMENTED)
    if not holds_all(files, base):
        raise IntegrityError(
            f"distill.teacher.name={cfg.name}: its files have other tensors than its config.json declares\n"
            "help: set distill.teacher.placement=resident, which loads other names or describes the problem"
        )
    return WeightFiles(files), base


def _slots_of(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return module and attribute of a layer's tensors, by their name in the files."""
    places = ((name, *name.rpartition(".")[::2]) for name, _ in layer.named_parameters())
    return {name: (layer.get_submodule(owner), key) for name, owner, key in places}


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    setattr(module, key, nn.Parameter(tensor, requires_grad=False))
