"""Compute a model in fp32 one layer at a time, with any of its linear layers quantized.

In 16-bit arithmetic, any change makes every later rounding differ. On the packaged base this costs 5e-5 nats per
token, ten times the cost of a layer in 8 bit, and hides it. So the arithmetic is fp32, on the original or the quantized
weights. One fp32 layer is in memory; on a CPU the 16-bit weights stay memory-mapped files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.batch import Batch
from finetune.data.media.processor import MediaProcessor
from finetune.distill.resident import load_resident
from finetune.losses.hidden_states import PackedRows, final_states, packed_rows, padded, run_layer, with_media
from finetune.models.decoder import decoder_of, family_in
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, weight_files
from finetune.models.quant.eight_bit import put_rows, quantize_rows, replace_eight_bit_linears
from finetune.models.quant.four_bit_weights import QuantizedWeights
from finetune.models.quant.quantize import linear_names
from finetune.models.tokenizer import quiet
from finetune.ops import attention
from finetune.system.errors import ConfigError
from finetune.towers.towers import build_towers


class LayerwiseModel:
    """A frozen base; `linears` maps each linear layer of the decoder, in the model's order, to its shape (out, in)."""

    def __init__(self, cfg: ModelConfig, quant: QuantConfig, device: torch.device, media: MediaProcessor | None = None):
        """Load the base.

        Args:
            quant: the 4-bit kind, `double` and `compute_dtype` of a run; its lists of layers are ignored.
            media: from `load_media_processor`, for batches with media. Towers stay in 16 bit.

        Raises:
            ConfigError: another attention than segmented; otherwise as `load_base`.
        """
        if cfg.attention not in ("auto", attention.SEGMENTED):
            raise ConfigError(
                f"model.attention={cfg.attention}: only segmented attention works here\nhelp: set model.attention=auto"
            )
        self.device = device
        model: Any = load_resident(cfg, None, device).model
        self.model = model
        build_towers(model, cfg, media)
        self.family = family_in(model)
        layers = f"{self.family.decoder}.layers."
        self.linears: dict[str, tuple[int, int]] = {
            name: tuple(model.get_submodule(name).weight.shape)
            for name in linear_names(model)
            if name.startswith(layers)
        }
        plain = quant.model_copy(update={"skip_modules": [], "int8": [], "type": "nf4"})
        source = fetch(cfg.name, cfg.revision, TEXT_FILES + WEIGHT_FILES, "model.name")
        with quiet():
            files = weight_files(source.folder, cfg.name)
            self._quantized = QuantizedWeights(
                source.folder, files, model=cfg, quant=plain, device=device, log=lambda _: None
            )
        self._layer: Any = None
        self._prefix = ""
        backbone = self._decoder
        self._rotary, self._norm = backbone.rotary_emb, copy.deepcopy(backbone.norm).float()
        weight: Tensor = model.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(weight.float(), requires_grad=False)

    @property
    def _decoder(self) -> Any:
        return decoder_of(self.model)

    @property
    def layers(self) -> int:
        return len(self._decoder.layers)

    def linears_of(self, index: int) -> list[str]:
        """Return the full names of a decoder layer's linear layers."""
        return [name for name in self.linears if name.startswith(f"{self.family.layer_name(index)}.")]

    def load(self, index: int, storage: Mapping[str, str]) -> None:
        """Load the layer that `advance` computes; `storage` maps linear layers to their kind, others stay in 16 bit."""
        self._layer = None  # Frees the previous layer first.
        layer = self._decoder.layers[index]
        # All layers share the config.
        self._layer = copy.deepcopy(layer, {id(layer.self_attn.config): layer.self_attn.config}).float()
        self._prefix = f"{self.family.layer_name(index)}."
        for name in self.linears_of(index):
            if storage.get(name, "none") != "none":
                self._store(name, storage[name])

    @contextmanager
    def stored(self, name: str, kind: str) -> Iterator[None]:
        """Store a linear layer of the loaded layer as another kind within a `with` block."""
        short = name.removeprefix(self._prefix)
        before = self._layer.get_submodule(short)
        try:
            self._store(name, kind)
            yield
        finally:
            self._layer.set_submodule(short, before)

    @torch.no_grad()
    def enter(self, batch: Batch) -> tuple[PackedRows, Tensor]:
        """Return a batch's rows, and their states [1, R, D] before the first layer."""
        rows, _ = packed_rows(batch, self.device, torch.float32)
        table: Tensor = self.model.get_input_embeddings().weight
        embeddings = F.embedding(rows.ids[None], table).float()
        return rows, padded(with_media(self.model, embeddings, batch, rows.first_tokens), rows)

    @torch.no_grad()
    def advance(self, rows: PackedRows, states: Tensor) -> Tensor:
        """Return the loaded layer's output for states [1, R, D] of these rows."""
        return run_layer(self._layer, states, rows, self._rotary(states, rows.position_ids))

    @torch.no_grad()
    def leave(self, states: Tensor, rows: PackedRows) -> Tensor:
        """Return the final normed states [N, D] of the rows' targets."""
        return final_states(self._norm, states, rows)

    def run(self, batches: Sequence[Batch], storage: Mapping[str, str]) -> list[Tensor]:
        """Return the final states [N, D] of each batch's targets, with linear layers stored as in `storage`."""
        rows, states = map(list, zip(*map(self.enter, batches), strict=True))
        for index in range(self.layers):
            self.load(index, storage)
            states = [self.advance(*pair) for pair in zip(rows, states, strict=True)]
        return [self.leave(*pair) for pair in zip(states, rows, strict=True)]

    def _store(self, name: str, kind: str) -> None:
        short = name.removeprefix(self._prefix)
        original: Any = self.model.get_submodule(name)
        if kind == "int8":
            replace_eight_bit_linears(self._layer, [short])
            put_rows(self._layer.get_submodule(short), *quantize_rows(original.weight.data))
            return
        rows = self._quantized.dequantized(f"{name}.weight", lambda: original.weight.data)
        weight = rows(0, original.out_features).to(self.device)
        layer: Any = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        layer.bias = None if original.bias is None else nn.Parameter(original.bias.float(), requires_grad=False)
        self._layer.set_submodule(short, layer)
