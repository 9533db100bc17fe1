"""A teacher of any size in the memory of two layers, the head, and the hidden states of the requested tokens.

All batches of a pass go through one layer before the next, which is read meanwhile. One pass reads the model once, so
more tokens per pass mean less reading per token. The break-even is the machine's operations/s over its bytes/s, for
any model size.
Source: Sheng et al. 2023, arXiv:2303.06865 (one read of a layer for many batches).
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig
from finetune.data.batch import Batch
from finetune.distill.layer_reader import MappedLayer, PinnedLayer, Reads, layer_buffers
from finetune.distill.resident import open_skeleton
from finetune.losses.distillation import TeacherHidden
from finetune.losses.hidden_states import PackedRows, final_states, packed_rows, padded, run_layer
from finetune.models.adapters.files import check_adapter, read_tensors, refusals_of_peft
from finetune.models.adapters.folder import read_adapter_config
from finetune.models.decoder import decoder_of, family_in
from finetune.models.fused import fuse_layers
from finetune.models.safetensors_index import WeightFiles, map_tensor
from finetune.ops import attention
from finetune.system.accelerator import runtime
from finetune.system.console import Log
from finetune.system.errors import ConfigError, IntegrityError
from finetune.system.format import format_bytes
from finetune.system.machine import malloc_trim

_RESIDENT = "\nhelp: set distill.teacher.placement=resident"
# Inits that keep the base as it is. The others (PiSSA, OLoRA, …) subtract a part from it.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


class StreamedModel:
    """A frozen model in evaluation mode that reads its decoder layers from files in each pass."""

    def __init__(
        self,
        cfg: ModelConfig,
        device: torch.device,
        adapter: Path | None = None,
        head: nn.Module | None = None,
        log: Log = lambda text: None,
    ):
        """Open a model.

        Args:
            adapter: a PEFT folder; its tensors stay in memory.
            head: the model's head, if it is in memory already.
            log: receives the speed of the first pass.

        Raises:
            ConfigError: not found, not supported, or an adapter on more than decoder layers.
            IntegrityError: corrupt files, or tensors of another model.
        """
        if cfg.attention not in ("auto", attention.SEGMENTED):
            raise ConfigError(
                f"model.attention: a streamed teacher has segmented attention only, found {cfg.attention}\n"
                "help: set auto, or distill.teacher.placement=resident"
            )
        files, base = open_skeleton(cfg)
        if base is None:
            raise IntegrityError(
                f"distill.teacher.name={cfg.name}: its files have other tensors than its config.json declares"
                f"{_RESIDENT}, which loads other names or describes the problem"
            )
        self.device, self.dtype = device, getattr(torch, cfg.dtype)
        self.read_bytes, self._wait_seconds = 0, 0.0  # of the last pass; the wait is for reads
        self._files = WeightFiles({place.name: place.file for place in files.values()})
        self._base, self._head = base, head
        self._tensors = {name: self._files.tensors[place.name] for name, place in files.items()}
        self._log: Log | None = log
        self._family = family_in(base)
        tied = base.config.tie_word_embeddings
        self._head_name = f"{self._family.embedding if tied else self._family.head}.weight"
        on_cpu, in_its_type = device.type == "cpu", self._tensors[self._head_name].dtype == self.dtype
        self._maps_head = head is None and on_cpu and in_its_type
        backbone: Any = decoder_of(base)
        # By module, because an adapter renames modules.
        self._slots = [_slots_of(layer) for layer in backbone.layers]
        if adapter is not None:
            _attach_adapter(self._base, adapter, device)
        fuse_layers(self._base)
        self._base.eval().requires_grad_(False)
        self._layers, self._norm = list(backbone.layers), backbone.norm
        self._rotary = type(backbone.rotary_emb)(backbone.config).to(device)
        _put(self._norm, "weight", self._weight(f"{self._family.final_norm}.weight"))

    @cached_property
    def head(self) -> nn.Module:
        """Load the output head onto the device at its first use."""
        if self._head is not None:
            return self._head
        head: Any = self._base.get_output_embeddings()
        _put(head, "weight", self._weight(self._head_name))
        return head

    @cached_property
    def _buffers(self) -> list[MappedLayer] | list[PinnedLayer]:
        shapes = {name: getattr(module, key).shape for name, (module, key) in self._slots[0].items()}
        return layer_buffers(shapes, self.dtype, self.device)

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        """Return the hidden states of each batch's targets, with the teacher's head."""
        return (TeacherHidden(hidden_ND, self.head) for hidden_ND in self.hidden_states(batches))

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Return the final normed hidden states [N, D] of each batch's targets, as a resident model does."""
        began, self._wait_seconds = time.perf_counter(), 0.0
        self._files.check_unchanged()
        if "head" in vars(self) and self._maps_head:  # mapped again, which frees its pages for the layers
            _put(self.head, "weight", self._weight(self._head_name))
        with Reads() as reads:
            self._begin(0, reads)
            rows = self._enter(batches, reads)
            self._begin(1, reads)
            for i, layer in enumerate(self._layers):
                with self._filled(i):
                    for some, states in rows:
                        angles = self._rotary(states, some.position_ids)  # cheaper to compute than to keep
                        states.copy_(run_layer(layer, states, some, angles))
                self._begin(i + 2, reads)
        hidden = []
        while rows:
            some, states = rows.pop(0)
            hidden.append(final_states(self._norm, states, some))
        self._files.check_unchanged()
        malloc_trim()  # free the layers' temporaries before the head is used
        self.read_bytes = reads.bytes
        if self._log is not None:
            runtime(self.device).synchronize(self.device)
            self._log(
                f"teacher: read={format_bytes(reads.bytes)}, wait_for_reads={self._wait_seconds:.1f} s, "
                f"total_time={time.perf_counter() - began:.1f} s"
            )
            self._log = None
        return hidden

    def _begin(self, index: int, reads: Reads) -> None:
        """Begin to read a layer, if it exists."""
        if index < len(self._layers):
            layer = self._family.layer_name(index)
            stored = {name: self._tensors[f"{layer}.{name}"] for name in self._slots[index]}
            self._buffers[index % 2].begin(stored, reads)

    @contextmanager
    def _filled(self, index: int) -> Iterator[None]:
        """Give a layer its weights inside the block, and take them away afterwards."""
        slots, began = self._slots[index], time.perf_counter()
        try:
            tensors = self._buffers[index % 2].take()
            self._wait_seconds += time.perf_counter() - began
            for name, tensor in tensors.items():
                _put(*slots[name], tensor)
            yield
        finally:
            for module, key in slots.values():
                _put(module, key, getattr(module, key).to("meta"))
            self._buffers[index % 2].release()

    def _enter(self, batches: Sequence[Batch], reads: Reads) -> list[tuple[PackedRows, Tensor]]:
        """Return the rows of each batch, and their embeddings as hidden states.

        Raises: ConfigError for a batch with media: the towers are not in memory.
        """
        if any(batch.media for batch in batches):
            raise ConfigError(f"distill.teacher.placement: a streamed teacher reads no media{_RESIDENT}")
        rows = [packed_rows(batch, self.device, self.dtype)[0] for batch in batches]
        # Read rows of the file: the head of a tied model would bring more pages into memory.
        used = torch.unique(torch.cat([some.ids for some in rows]))
        table = reads.rows(self._tensors[f"{self._family.embedding}.weight"], used.cpu(), self.dtype).to(self.device)
        embeddings = (F.embedding(torch.searchsorted(used, some.ids[None]), table) for some in rows)
        return [(some, padded(embedding, some)) for some, embedding in zip(rows, embeddings, strict=True)]

    def _weight(self, name: str) -> Tensor:
        """Return one tensor on the device, mapped on a CPU if the file has the model's dtype."""
        return map_tensor(self._tensors[name]).to(self.device, self.dtype)


def _slots_of(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return module and attribute of a layer's tensors, by their name in the files."""
    places = ((name, *name.rpartition(".")[::2]) for name, _ in layer.named_parameters())
    return {name: (layer.get_submodule(owner), key) for name, owner, key in places}


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    setattr(module, key, nn.Parameter(tensor, requires_grad=False))


def _attach_adapter(base: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Attach a frozen adapter to the decoder layers of a model on the meta device: only its tensors are in memory."""
    where = f"adapter {folder}"
    config = read_adapter_config(folder, where)
    check_adapter(folder, trained=False)
    tensors = read_tensors(folder)
    if outside := [name for name in tensors if not re.search(r"\.layers\.\d+\.", name)]:
        raise ConfigError(
            f"{where}: changes more than decoder layers ({', '.join(sorted(outside)[:3])}), which a streamed teacher "
            f"does not keep in memory{_RESIDENT}"
        )
    if config.get("init_lora_weights", True) not in _PLAIN_INITS or config.get("layer_replication"):
        raise ConfigError(f"{where}: changes the base's weights or layers, which are not in memory{_RESIDENT}")
    with warnings.catch_warnings(), refusals_of_peft(where):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        settings = peft.PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        model = peft.PeftModel(base, settings)
    # PEFT puts the adapter of a meta weight on the meta device too, where copying has no effect.
    places = {
        id(parameter): (module, key)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
    }
    named = dict(model.named_parameters(remove_duplicate=False))
    expected = peft.get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise IntegrityError(f"{where}: does not fit the teacher, first at {', '.join(wrong[:5])}")
    for name, parameter in expected.items():
        _put(*places[id(parameter)], tensors[name].to(device, parameter.dtype))
