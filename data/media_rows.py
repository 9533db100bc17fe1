"""Encode conversations with pictures and sounds: token ids, and what the towers of Qwen2.5-Omni read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pretrain import Row, encode, pad
from scenes import Conversation
from sounds import RATE
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, WhisperFeatureExtractor

# Around and for each embedding, by the tag in a message.
MEDIA_TOKENS = {
    "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
    "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
}
MEL_BINS, PATCH, MERGE = 64, 14, 2
PREPROCESSOR = {
    "processor_class": "Qwen2_5OmniProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "feature_extractor_type": "WhisperFeatureExtractor",
    "min_pixels": 3136,
    "max_pixels": 50176,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": MERGE,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "feature_size": MEL_BINS,
    "sampling_rate": RATE,
    "hop_length": 160,
    "n_fft": 400,
    "chunk_length": 300,
    "n_samples": 300 * RATE,
    "nb_max_frames": 30000,
    "dither": 0.0,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
}


class Processor:
    """Turn pictures and sounds into the inputs of the towers, each alone."""

    def __init__(self) -> None:
        self.pixels = Qwen2VLImageProcessorPil(**{k: PREPROCESSOR[k] for k in ("min_pixels", "max_pixels")})
        self.mel = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=300)

    def __call__(self, media: np.ndarray) -> Media:
        if media.ndim == 3:
            read = self.pixels(images=[media], return_tensors="pt")
            grid = read["image_grid_thw"]
            return Media("image", read["pixel_values"], grid, int(grid.prod()) // MERGE**2)
        frames = -(-len(media) // self.mel.hop_length)
        # The official processor pads to `chunk_length` with zeros; the last frame sees no more than these.
        samples = np.pad((media / 32768).astype(np.float32), (0, self.mel.n_fft))
        mel = self.mel(samples, sampling_rate=RATE, padding=True, return_tensors="pt")["input_features"][0, :, :frames]
        return Media("audio", mel.T, torch.tensor([frames]), ((frames - 1) // 2 + 1 - 2) // 2 + 1)


@dataclass(frozen=True)
class Media:
    """Input of a tower: patches [P, values] with their grid [1, 3], or mel frames [F, bins] with their count [1]."""

    kind: str
    values: Tensor
    size: Tensor
    tokens: int


@dataclass(frozen=True)
class MediaRow(Row):
    """A row with its media in order."""

    media: tuple[Media, ...]


def encode_media(tokenizer: PreTrainedTokenizerFast, processor: Processor, rows: list[Conversation]) -> list[MediaRow]:
    """Encode conversations, with a placeholder for each embedding of their media."""
    media = [tuple(map(processor, row.media)) for row in rows]
    texts = []
    for row, read in zip(rows, media, strict=True):
        left = iter(read)

        def expand(tag: re.Match, left: Iterator[Media] = left) -> str:
            start, placeholder, end = MEDIA_TOKENS[tag[1]]
            return start + placeholder * next(left).tokens + end

        texts.append([m | {"content": re.sub("<(image|audio)>", expand, m["content"])} for m in row.messages])
    return [MediaRow(row.ids, row.answer, read) for row, read in zip(encode(tokenizer, texts), media, strict=True)]


def tower_inputs(rows: list[MediaRow]) -> dict[str, Tensor]:
    """Return the arguments of the model's forward for the media of rows."""
    images, audios = ([m for row in rows for m in row.media if m.kind == kind] for kind in ("image", "audio"))
    inputs = {}
    if images:
        inputs["pixel_values"] = torch.cat([m.values for m in images])
        inputs["image_grid_thw"] = torch.cat([m.size for m in images])
    if audios:
        lengths = torch.cat([m.size for m in audios])
        padded = torch.nn.utils.rnn.pad_sequence([m.values for m in audios], batch_first=True)
        inputs["input_features"] = padded.transpose(1, 2)
        inputs["feature_attention_mask"] = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    return inputs


Batch = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def collate(rows: list[MediaRow], pad_id: int) -> Batch:
    """Return ids [B, T], answer mask [B, T], token mask [B, T] and the inputs of the towers."""
    return *pad(rows, pad_id), tower_inputs(rows)
