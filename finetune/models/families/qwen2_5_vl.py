"""Qwen2.5-VL: Qwen2.5's layers behind a vision tower, with positions of three axes.

Source: arXiv:2502.13923, and the config.json of Qwen/Qwen2.5-VL-<size>-Instruct.
"""

from __future__ import annotations

from finetune.models.families.family import ModelFamily, PositionRule, Tower
from finetune.models.families.qwen2 import BIASED

VISION_LINEARS = ("qkv", "proj", "gate_proj", "up_proj", "down_proj")
VISION_SIZES = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "out_hidden_size": None,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
_LARGE = {"intermediate_size": 3456}

FAMILY = ModelFamily(
    title="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    modeling="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    model="Qwen2_5_VLForConditionalGeneration",
    layer="Qwen2_5_VLDecoderLayer",
    norm="Qwen2_5_VLRMSNorm",
    biased=BIASED,
    window="if use_sliding_window",
    decoder="model.language_model",
    opened_by="AutoModelForImageTextToText",
    task="image-text-to-text",
    # Its mapper has the names of transformers. Source: vLLM's models/qwen2_5_vl.py; towers: vLLM PR #26674.
    serves_towers=True,
    decoder_settings=("text_config",),
    # Qwen's own files, and those of older versions of transformers.
    renamed=(
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    ),
    towers={
        "vision": Tower(
            "model.visual",
            "model.visual.blocks",
            VISION_LINEARS,
            {"image": "<|image_pad|>", "video": "<|video_pad|>"},
            settings="vision_config",
            sizes=VISION_SIZES,
            changed_sizes={"32B": _LARGE, "72B": _LARGE},
        ),
    },
    axes=3,
    positions=PositionRule(steps_per_second=4, text_follows_time=False),
    steps_setting=("vision_config", "tokens_per_second"),
    hub_id=r"Qwen2\.5-VL-(?P<size>\d+B)(?:-.*)?",
    sizes={
        "3B": (2048, 11008, 36, 16, 2, 151936, True, 128),
        "7B": (3584, 18944, 28, 28, 4, 152064, False, 128),
        "32B": (5120, 27648, 64, 40, 8, 152064, False, 128),
        "72B": (8192, 29568, 80, 64, 8, 152064, False, 128),
    },
)
