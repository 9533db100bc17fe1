"""Write a Qwen2.5-VL with random weights behind the tokenizer of the packaged Omni base.

    python -m benchmarks.media_models source=data/tiny-qwen2.5-omni folder=TARGET

Its vision tower has 43 million parameters; the decoder has the sizes of the packaged base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.processes import parse

DEFAULTS = {"source": "data/tiny-qwen2.5-omni", "folder": ""}
VISION = {
    "depth": 12,
    "hidden_size": 512,
    "num_heads": 8,
    "intermediate_size": 1368,
    "fullatt_block_indexes": [3, 7, 11],
}
# Special tokens of Omni, and of VL.
_RENAMED = {
    "<|IMAGE|>": "<|image_pad|>",
    "<|VIDEO|>": "<|video_pad|>",
    "<|vision_bos|>": "<|vision_start|>",
    "<|vision_eos|>": "<|vision_end|>",
}
_TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_random_vl(source: Path, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint in bf16 if it is missing."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    omni = json.loads((source / "config.json").read_text(encoding="utf-8"))
    text = {**omni["text_config"], "model_type": "qwen2_5_vl_text"}
    names = {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}
    ids = {name: omni[key] for name, key in names.items()}
    vision: dict[str, Any] = {**VISION, "out_hidden_size": text["hidden_size"]}
    marks = {key: omni[key] for key in ("vision_start_token_id", "vision_end_token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids, **marks)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TEXTS:
        content = (source / name).read_text(encoding="utf-8")
        for old, new in _RENAMED.items():
            content = content.replace(old, new)
        (folder / name).write_text(content, encoding="utf-8")
    model.save_pretrained(folder)
    return folder


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    folder = write_random_vl(Path(options["source"]), Path(options["folder"]))
    print(json.dumps({"folder": str(folder)}))


if __name__ == "__main__":
    main(sys.argv[1:])
