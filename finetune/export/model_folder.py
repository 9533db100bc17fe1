"""Everything of a model's folder that is not weights: configs, tokenizer, template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from finetune.export.merge import MergePlan
from finetune.export.trained import Trained
from finetune.models.load import TOKENIZER_FILES

# What a tokenizer may consist of; vocab.json and merges.txt are those of the slow ones.
_TOKENIZER = (
    *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_GENERATION = "generation_config.json"


def write_texts(trained: Trained, plan: MergePlan, dtype: str, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer: the adapter's own where it has one, else the base's.

    dtype: `bfloat16` and the like, of most of the weights.
    """
    config = json.loads((trained.folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": dtype, "vocab_size": plan.vocabulary}
    config.pop("torch_dtype", None)
    if plan.unties:
        config["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    if (trained.folder / _GENERATION).is_file():
        shutil.copyfile(trained.folder / _GENERATION, folder / _GENERATION)
    adapter = trained.adapters[0].folder
    source = adapter if (adapter / TOKENIZER_FILES[0]).is_file() else trained.folder
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
