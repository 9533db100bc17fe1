"""Tokenizers, chat templates and files for rows with media."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, ModelConfig
from finetune.data.media.processor import MediaProcessor, build_media_processor
from finetune.models.families import FAMILIES
from finetune.models.tokenizer import load_tokenizer

# The published templates of Qwen2.5-VL and Qwen2.5-Omni, by what they write.
VL_TEMPLATE = """\
{%- set seen = namespace(image=0, video=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part %}
{%- set seen.image = seen.image + 1 %}{% if add_vision_id %}Picture {{ seen.image }}: {% endif -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' or 'video' in part %}
{%- set seen.video = seen.video + 1 %}{% if add_vision_id %}Video {{ seen.video }}: {% endif -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}
{%- endfor %}
{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
OMNI_TEMPLATE = """\
{%- set seen = namespace(image=0, audio=0, video=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part %}
{%- set seen.image = seen.image + 1 %}{% if add_vision_id %}Picture {{ seen.image }}: {% endif -%}
<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}
{%- set seen.audio = seen.audio + 1 %}{% if add_audio_id %}Audio {{ seen.audio }}: {% endif -%}
<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif part['type'] == 'video' or 'video' in part %}
{%- set seen.video = seen.video + 1 %}{% if add_vision_id %}Video {{ seen.video }}: {% endif -%}
<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}
{%- endfor %}
{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_VISION = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
_OMNI = "<|vision_bos|> <|vision_eos|> <|audio_bos|> <|audio_eos|> <|IMAGE|> <|VIDEO|> <|AUDIO|>"
TEMPLATES = {"qwen2_5_vl": (VL_TEMPLATE, _VISION), "qwen2_5_omni": (OMNI_TEMPLATE, _OMNI)}


def media_tokenizer(family: str, repo_root: Path) -> PreTrainedTokenizerBase:
    """Return the embedded tokenizer with the control tokens and the template of a family."""
    tokenizer = load_tokenizer(ModelConfig(name=str(repo_root / "data/tiny-qwen2.5")))
    tokenizer.chat_template, control = TEMPLATES[family]
    tokenizer.add_special_tokens({"additional_special_tokens": control.split()})
    return tokenizer


def media_processor(family: str, **data: Any) -> MediaProcessor:
    """Return the processor of a family, with settings of the section `data`."""
    return build_media_processor(FAMILIES[family], None, DataConfig.model_validate(data))


def png(width: int, height: int, color: int = 0) -> bytes:
    """Return a PNG of one gray."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes([color]) * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
