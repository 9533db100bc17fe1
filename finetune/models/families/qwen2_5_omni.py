"""Qwen2.5-Omni's thinker, which reads text, pictures, sound and video; its talker, which speaks, is not trained.

A checkpoint holds the whole model, or the thinker alone, which has a model type of its own.
Source: arXiv:2503.20215, and the config.json of Qwen/Qwen2.5-Omni-<size>.
"""

from __future__ import annotations

from dataclasses import replace

from finetune.models.families.family import ModelFamily, PositionRule, Tower
from finetune.models.families.qwen2 import BIASED
from finetune.models.families.qwen2_5_vl import VISION_SIZES

_VISION = Tower(
    "model.visual",
    "model.visual.blocks",
    ("q", "k", "v", "proj", "gate_proj", "up_proj", "down_proj"),
    {"image": "<|IMAGE|>", "video": "<|VIDEO|>"},
    settings="vision_config",
    sizes=VISION_SIZES,
)
_AUDIO = Tower(
    "model.audio_tower",
    "model.audio_tower.layers",
    ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    {"audio": "<|AUDIO|>"},
    settings="audio_config",
    sizes={
        "encoder_layers": 32,
        "d_model": 1280,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "output_dim": None,
        "num_mel_bins": 128,
        "n_window": 100,
    },
)
_THINKER = ModelFamily(
    title="Qwen2.5-Omni",
    model_type="qwen2_5_omni_thinker",
    modeling="transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
    model="Qwen2_5OmniThinkerForConditionalGeneration",
    layer="Qwen2_5OmniDecoderLayer",
    norm="Qwen2_5OmniRMSNorm",
    biased=BIASED,
    window="if use_sliding_window",
    decoder="model.language_model",
    opened_by="Qwen2_5OmniThinkerForConditionalGeneration",
    task="any-to-any",
    # It has the names of Qwen's own files, and no adapters of towers.
    # Source: hf_to_vllm_mapper in vLLM's models/qwen2_5_omni_thinker.py; vLLM PR #24231.
    served=((r"^model\.language_model\.", "thinker.model."), (r"^model\.(?=visual\.|audio_tower\.)", "thinker.")),
    decoder_settings=("text_config",),
    renamed=(
        (r"^(?:talker|token2wav)\.", None),
        (r"^thinker\.", ""),
        (r"^(?=(?:visual|audio_tower)\.)", "model."),
        (r"^model\.(?!language_model\.|visual\.|audio_tower\.)", "model.language_model."),
    ),
    towers={"vision": _VISION, "audio": _AUDIO},
    axes=3,
    positions=PositionRule(steps_per_second=25, text_follows_time=True),
    steps_setting=("position_id_per_seconds",),
    hub_id=r"(?!)(?P<size>)",
    sizes={},
)
FAMILIES = (
    replace(
        _THINKER,
        model_type="qwen2_5_omni",
        loaded_settings=("thinker_config",),
        opened_by="Qwen2_5OmniForConditionalGeneration",
        companions=("spk_dict.pt",),  # the talker's voices
        hub_id=r"Qwen2\.5-Omni-(?P<size>\d+B)(?:-.*)?",
        sizes={
            "3B": (2048, 11008, 36, 16, 2, 151936, False, 128),
            "7B": (3584, 18944, 28, 28, 4, 152064, False, 128),
        },
    ),
    _THINKER,
)
