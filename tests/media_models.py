"""Tiny random models that read media, and documents with pictures, sounds and videos for them."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.media.media import Media
from finetune.data.media.processor import MediaProcessor
from finetune.data.positions import PlacedMedia
from finetune.models.families import FAMILIES
from finetune.models.tokenizer import quiet
from tests.media_rows import TEMPLATES, media_processor

START, END, SOUND_START, SOUND_END = 90, 91, 92, 93
PADS = {"image": 94, "video": 95, "audio": 96}
_TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,  # bitsandbytes on a CPU needs rows of whole blocks of 64
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
_AUDIO = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "output_dim": 64,
}


def random_media_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a frozen random model in fp32: `qwen2_5_vl`, or the thinker of `qwen2_5_omni`."""
    torch.manual_seed(seed)
    if family == "qwen2_5_vl":
        ids = {"image_token_id": PADS["image"], "video_token_id": PADS["video"]}
        marks = {"vision_start_token_id": START, "vision_end_token_id": END}
        config: Any = Qwen2_5_VLConfig(text_config=dict(_TEXT), vision_config=dict(_VISION), **ids, **marks)
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    else:
        indices = {f"{kind}_token_index": pad for kind, pad in PADS.items()}
        parts = {"text_config": dict(_TEXT), "vision_config": dict(_VISION), "audio_config": dict(_AUDIO)}
        config = Qwen2_5OmniThinkerConfig(**parts, **indices, vision_start_token_id=START)
        config.audio_start_token_id, config.audio_end_token_id = SOUND_START, SOUND_END
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model.requires_grad_(False).eval()


def picture(file: Path, seed: int, width: int = 84, height: int = 56) -> Path:
    """Write a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def sound(file: Path, seed: int, seconds: float = 0.7) -> Path:
    """Write a sound of noise."""
    samples = np.random.default_rng(seed).integers(-9000, 9000, int(16000 * seconds), dtype=np.int16)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(16000)
        stream.writeframes(samples.tobytes())
    return file


def video(file: Path, seed: int, frames: int = 6) -> Path:
    """Write a video of noise."""
    import av

    random = np.random.default_rng(seed)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 256, (56, 84, 3), dtype=np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


_WRITERS = {"image": (picture, "png"), "audio": (sound, "wav"), "video": (video, "mp4")}


@dataclass(frozen=True)
class MediaDocuments:
    """Builds documents of one family with media of chosen kinds between random text."""

    family: str
    folder: Path

    @property
    def processor(self) -> MediaProcessor:
        return media_processor(self.family)

    def build(self, kinds: Sequence[str], seed: int) -> Document:
        """Return a document: text, each medium within its marks and text after it; the last tokens are targets."""
        random = np.random.default_rng(seed)
        ids, items, starts = list(random.integers(1, 90, 5)), [], []
        for number, kind in enumerate(kinds):
            write, suffix = _WRITERS[kind]
            media = self.processor.measure(kind, str(write(self.folder / f"{seed}-{number}.{suffix}", seed + number)))
            opening, closing = (SOUND_START, SOUND_END) if kind == "audio" else (START, END)
            ids.append(opening)
            items.append(media)
            starts.append(len(ids))
            ids += [PADS[kind]] * media.tokens + [closing, *random.integers(1, 90, 3)]
        answer = random.integers(1, 90, 8)
        labels = np.array([*[IGNORE_INDEX] * (len(ids) - 1), *answer, IGNORE_INDEX], np.int32)
        rule = FAMILIES[self.family].positions
        placed = PlacedMedia(tuple(items), tuple(starts), rule) if items else None
        return Document(np.array([*ids, *answer], np.int32), labels, f"row:{seed}", placed=placed)

    def inputs(self, document: Document) -> dict[str, Tensor]:
        """Return the arguments of transformers' forward for one document, as the official processor would."""
        ids = torch.from_numpy(document.ids.astype(np.int64))[None]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        by_kind: dict[str, list[Media]] = {}
        for media in document.media:
            by_kind.setdefault(media.kind, []).append(media)
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if found := by_kind.get(kind):
                inputs[pixels] = torch.cat([torch.from_numpy(self.processor.pixels(media)) for media in found])
                inputs[grid] = torch.tensor([media.grid for media in found])
        seconds = torch.tensor([media.seconds_per_grid for media in by_kind.get("video", [])])
        if self.family == "qwen2_5_vl":
            types = (ids == PADS["image"]).int() + 2 * (ids == PADS["video"]).int()
            inputs |= {"mm_token_type_ids": types, "second_per_grid_ts": seconds if len(seconds) else None}
        elif len(seconds):
            inputs["video_second_per_grid"] = seconds
        if found := by_kind.get("audio"):
            mels = [torch.from_numpy(self.processor.mel(media)) for media in found]
            longest = max(mel.shape[1] for mel in mels)
            pad = torch.nn.functional.pad
            inputs["input_features"] = torch.stack([pad(mel, (0, longest - mel.shape[1])) for mel in mels])
            inputs["feature_attention_mask"] = torch.tensor(
                [[1] * mel.shape[1] + [0] * (longest - mel.shape[1]) for mel in mels]
            )
        return inputs


# Checkpoints of models that read media, by the names of their tensors.
LAYOUTS = ("VL in Qwen's names", "VL in transformers' names", "Omni's thinker", "whole Omni")
_TALKER = {
    "vocab_size": 60,
    "embedding_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
_TOKEN2WAV = {
    "dit_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "ff_mult": 1,
        "emb_dim": 16,
        "num_embeds": 20,
        "mel_dim": 8,
        "enc_emb_dim": 8,
        "enc_dim": 8,
        "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 4,
        "enc_se_channels": 4,
        "look_ahead_layers": [0],
        "look_backward_layers": [0],
    },
    "bigvgan_config": {
        "mel_dim": 8,
        "upsample_initial_channel": 16,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
    },
}


def family_of_layout(layout: str) -> str:
    return "qwen2_5_vl" if layout.startswith("VL") else "qwen2_5_omni"


def save_media_base(layout: str, folder: Path, *, tied: bool = False, **saving: Any) -> Path:
    """Save a random checkpoint with its tokenizer and settings of media; saving: of `save_pretrained`."""
    family = family_of_layout(layout)
    model: Any = random_media_model(family)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    with quiet():
        if layout == "whole Omni":
            config = Qwen2_5OmniConfig(
                thinker_config=model.config.to_dict(), talker_config=_TALKER, token2wav_config=_TOKEN2WAV
            )
            whole = Qwen2_5OmniForConditionalGeneration(config)
            whole.thinker = model
            whole.save_pretrained(folder, **saving)
            torch.save({"Chelsie": {"bos_token": 1}}, folder / "spk_dict.pt")
        else:
            model.save_pretrained(folder, save_original_format=layout != "VL in transformers' names", **saving)
    media_words(family).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 56 * 56, "max_pixels": 112 * 112}))
    return folder


def media_words(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words t0 to t89, with the control tokens and the template of a family."""
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(90)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t2")
    kinds = FAMILIES[family].placeholders
    marks = ["start", "end"] if family == "qwen2_5_vl" else ["bos", "eos"]
    control = [*(f"<|vision_{mark}|>" for mark in marks), "<|audio_bos|>", "<|audio_eos|>"]
    control += [kinds.get(kind, f"<|{kind}|>") for kind in PADS]
    tokenizer.add_special_tokens({"additional_special_tokens": [*control, "<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATES[family][0]
    return tokenizer
