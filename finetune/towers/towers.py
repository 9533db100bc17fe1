"""Turn media into the embeddings that take the places of their placeholder tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig
from finetune.data.media.media import Media
from finetune.data.media.processor import MediaProcessor
from finetune.models.decoder import family_in
from finetune.system.console import Log, Pace
from finetune.system.errors import FinetuneError
from finetune.system.format import format_bytes
from finetune.towers.cache import EmbeddingCache, open_cache


class Towers:
    """The towers of a base, its media processor, and the cache of what frozen towers computed.

    Each file is computed alone, so its embeddings do not depend on the other media of a batch.
    """

    def __init__(self, base: PreTrainedModel, processor: MediaProcessor, cache: EmbeddingCache | None):
        """Attach towers to a base. cache: None computes all embeddings anew, as trained towers need."""
        self._base, self.processor, self._cache = base, processor, cache
        self._parts = {name: base.get_submodule(tower.module) for name, tower in family_in(base).towers.items()}
        base.media_towers = self  # type: ignore[assignment] - not a module: saved and moved by nobody

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters of the towers."""
        return [p for part in self._parts.values() for p in part.parameters() if p.requires_grad]

    def embeddings(self, media: Sequence[Media]) -> Tensor:
        """Return the embeddings [M, D] of media, one after the other, on the base's device and in its dtype.

        Raises:
            DataError: a file cannot be read, or changed since it was measured.
        """
        device = self._base.device
        return torch.cat([self._one(each).to(device, self._base.dtype, non_blocking=True) for each in media])

    def fill(self, media: Iterable[Media], log: Log) -> None:
        """Compute what the cache lacks, and keep it. Without a cache, do nothing."""
        if self._cache is None:
            return
        missing, pace, kept_bytes = self._cache.missing(media), Pace(), 0
        for done, each in enumerate(missing):
            kept_bytes += self._one(each).nbytes
            if pace.is_due():
                log(f"media: {done + 1:,} of {len(missing):,} files went through the towers")
        if missing:
            tokens = sum(each.tokens for each in missing)
            log(f"media: computed={len(missing):,} files, tokens={tokens:,}, kept={format_bytes(kept_bytes)}")

    def release(self) -> int:
        """Free the weights of frozen towers, whose embeddings are all in the cache; return their bytes."""
        if self._cache is None or not self._parts:
            return 0
        freed = 0
        for name, tower in family_in(self._base).towers.items():
            part = self._parts.pop(name)
            freed += sum(parameter.nbytes for parameter in part.parameters())
            part.to("meta")
            self._base.set_submodule(tower.module, nn.Identity())
        return freed

    def no_media(self) -> Tensor:
        """Return a zero that depends on all trained parameters: every pass gives each a gradient."""
        return sum((0 * parameter.sum() for parameter in self.trained), torch.zeros((), device=self._base.device))

    def _one(self, media: Media) -> Tensor:
        if self._cache is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trained)):
                return self._compute(media)
        if (found := self._cache.find(media)) is None:
            with torch.no_grad():
                found = self._compute(media).detach()
            self._cache.write(media, found)
        return found

    def _compute(self, media: Media) -> Tensor:
        if not self._parts:
            raise FinetuneError(f"{media.path}: its embeddings left the cache while the run used them; start it again")
        model: Any = self._base.model
        device = self._base.device
        if media.kind == "audio":
            mel = torch.from_numpy(self.processor.mel(media)).to(device, self._base.dtype)
            mask = torch.ones(1, mel.shape[1], dtype=torch.long, device=device)
            found = model.get_audio_features(mel[None], feature_attention_mask=mask).last_hidden_state
        else:
            pixels = torch.from_numpy(self.processor.pixels(media)).to(device)
            grid = torch.tensor([media.grid], device=device)
            found = model.get_image_features(pixels, grid).pooler_output
        found = torch.cat(list(found)) if isinstance(found, tuple | list) else found
        if len(found) != media.tokens:
            raise FinetuneError(f"{media.path}: the tower made {len(found)} embeddings for {media.tokens} tokens")
        return found


def build_towers(
    base: PreTrainedModel, model: ModelConfig, processor: MediaProcessor | None, cached: bool = True
) -> Towers | None:
    """Attach towers to a base that was loaded from `model`; None for a model that reads text only.

    processor: from `load_media_processor`. cached: they are frozen, and what they compute is kept on disk; never that
    of towers with adapters.
    """
    if processor is None:
        return None
    cached = cached and not any(
        isinstance(module, BaseTunerLayer)
        for tower in family_in(base).towers.values()
        for module in base.get_submodule(tower.module).modules()
    )
    return Towers(base, processor, open_cache(model, base.device) if cached else None)


def processor_of(base: PreTrainedModel) -> MediaProcessor | None:
    """Return what reads the media of a base; None without towers."""
    found = getattr(base, "media_towers", None)
    return found.processor if isinstance(found, Towers) else None


def towers_of(base: PreTrainedModel, media: Sequence[Media]) -> Towers:
    """Return the towers of a base. Raises: FinetuneError if it has none for these media."""
    found = getattr(base, "media_towers", None)
    if not isinstance(found, Towers):
        raise FinetuneError(
            f"{media[0].path}: the model in memory has no towers for media\nhelp: call build_towers first"
        )
    return found
